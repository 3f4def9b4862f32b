"""Which tokens of which sequences run in the next step.

There is no prefill or decode: each step gives every sequence tokens until its computed tokens catch up with its tokens.
Running sequences come first, then waiting ones in order of arrival, within a budget of tokens. A sequence that finds no
free block takes those of the youngest running one, which starts again later (preemption by recompute).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from .kv_cache import BlockPool
from .request import Request


@dataclass(frozen=True)
class Scheduled:
    """One sequence's share of a step: its tokens `num_computed .. num_computed + num_new`."""

    request: Request
    num_new: int

    @property
    def reaches_end(self) -> bool:
        """Whether the next token can be chosen after this step."""
        return self.request.num_computed + self.num_new == self.request.num_tokens


class Scheduler:
    """Iteration-level scheduling over a block pool.

    Args:
        pool: blocks of the KV cache.
        max_num_seqs: most sequences in a step.
        max_num_batched_tokens: most tokens in a step.
    """

    def __init__(self, pool: BlockPool, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.pool = pool
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def schedule(self) -> list[Scheduled]:
        """The next step. Not empty while there is work: a request that cannot fit alone is refused before it gets here."""
        budget = self.max_num_batched_tokens
        step: list[Scheduled] = []
        for request in list(self.running):
            if budget == 0 or request not in self.running:  # preempted by an older one in this very loop
                continue
            num_new = min(request.num_tokens - request.num_computed, budget)
            if self._make_room(request, num_new, step):
                step.append(Scheduled(request, num_new))
                budget -= num_new
        while self.waiting and budget and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            num_new = min(request.num_tokens, budget)
            # All of the prompt must fit, not just this chunk: half-admitted prompts would preempt each other.
            if self.pool.blocks_for(request.num_tokens) > self.pool.num_free:
                break
            self.pool.grow(request, num_new)
            self.running.append(self.waiting.popleft())
            step.append(Scheduled(request, num_new))
            budget -= num_new
        assert step or not self.has_work()
        return step

    def _make_room(self, request: Request, num_new: int, step: list[Scheduled]) -> bool:
        """Blocks for `num_new` more tokens, preempting from the youngest on; False if `request` itself had to go."""
        while not self.pool.grow(request, request.num_computed + num_new):
            victim = self.running[-1]
            assert victim not in [scheduled.request for scheduled in step]
            self.running.remove(victim)
            self.pool.release(victim)
            victim.num_computed = 0
            self.waiting.appendleft(victim)
            self.num_preemptions += 1
            if victim is request:
                return False
        return True

    def finish(self, request: Request) -> None:
        """Take a sequence out, whatever its state, and free its blocks."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self.pool.release(request)
