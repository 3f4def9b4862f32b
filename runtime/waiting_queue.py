"""Who is next: first come first served, by priority, or fair between clients."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Literal

from .request import Request

Policy = Literal["fcfs", "priority", "fair"]
POLICIES: tuple[Policy, ...] = ("fcfs", "priority", "fair")
INPUT_WEIGHT, OUTPUT_WEIGHT = 1, 2


class WaitingQueue:
    """Requests that wait, in the order of a policy.

    fcfs: as they came. priority: lower numbers first, equal ones as they came. fair: the client that was served least
    first, its own requests by priority. Service is counted in tokens (virtual token counter, Sheng et al. 2024,
    "Fairness in Serving Large Language Models"): one for each of the input that runs, two for each of the output. A
    client that comes back starts where the least served one of those that are there stands, so nobody saves up by being
    away.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._heaps: dict[str, list[tuple[int, int, Request]]] = {}
        self._members: dict[Request, None] = {}
        self._served: dict[str, float] = {}
        self._present: dict[str, set[int]] = {}  # of each client, the requests that are in the engine

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._members)

    def __contains__(self, request: Request) -> bool:
        return request in self._members

    def rank(self, request: Request) -> tuple[float, int, int]:
        """Sort key among all requests, running ones too; the least is served first, the largest preempted first."""
        priority = 0 if self.policy == "fcfs" else request.options.priority
        return (self._served.get(self._client(request), 0), priority, request.request_id)

    def push(self, request: Request) -> None:
        _, *order = self.rank(request)
        heapq.heappush(self._heaps.setdefault(self._client(request), []), (order[0], order[1], request))
        self._members[request] = None

    def peek(self) -> Request | None:
        """The one that is next."""
        best: Request | None = None
        for client, heap in list(self._heaps.items()):
            while heap and heap[0][2] not in self._members:  # taken out of the middle
                heapq.heappop(heap)
            if not heap:
                del self._heaps[client]
            elif best is None or self.rank(heap[0][2]) < self.rank(best):
                best = heap[0][2]
        return best

    def remove(self, request: Request) -> None:
        self._members.pop(request, None)
        client = self._client(request)
        heap = self._heaps.get(client, [])
        if len(heap) > 2 * len(self._members) + 16:  # mostly requests that were taken out of the middle
            self._heaps[client] = [entry for entry in heap if entry[2] in self._members]
            heapq.heapify(self._heaps[client])

    def enter(self, request: Request) -> None:
        """A request comes to the engine; its client is present from now on. Entering twice does no harm."""
        client = self._client(request)
        if client and client not in self._present:
            self._served[client] = max(self._served.get(client, 0), min(self._served_by_present(), default=0))
        self._present.setdefault(client, set()).add(_group_id(request))

    def leave(self, request: Request) -> None:
        """A request left the engine, if it was there. A client of which nothing is left is forgotten unless it is ahead of the others."""
        client = self._client(request)
        requests = self._present.get(client, set())
        requests.discard(_group_id(request))
        if not requests:
            self._present.pop(client, None)
            if self._served.get(client, 0) <= min(self._served_by_present(), default=0):
                self._served.pop(client, None)  # it would start there anyway
        if not self._present:
            self._served.clear()  # all start anew

    def charge(self, request: Request, *, inputs: int, outputs: int) -> None:
        """The request's client was served so many tokens."""
        if client := self._client(request):
            self._served[client] += INPUT_WEIGHT * inputs + OUTPUT_WEIGHT * outputs

    def _served_by_present(self) -> list[float]:
        return [self._served.get(client, 0) for client in self._present]

    def _client(self, request: Request) -> str:
        return f"client {request.options.client}" if self.policy == "fair" else ""


def _group_id(request: Request) -> int:
    """Completions of one prompt come and leave as one."""
    return request.group[0].request_id if request.group else request.request_id
