"""Which tokens of which sequences run in the next step.

There is no prefill or decode: each step gives sequences tokens until their computed tokens catch up with their tokens.
Running sequences come before waiting ones, and those that lack a single token before the others, so that a long prompt
holds nobody up. A sequence that finds no free block takes those of the last one in rank, which starts again later
(preemption by recompute). What that one had computed stays in the prefix cache until it is needed for others, last blocks
first, and is found again: so preemption costs as little as it can.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .kv_cache import KVCacheManager
from .request import Request
from .step_costs import StepCosts
from .waiting_queue import WaitingQueue

LEAST_CHUNK = 8  # tokens of prompts that a step runs in any case, while others wait for theirs


@dataclass(frozen=True)
class Scheduled:
    """One sequence's share of a step: its tokens `num_computed .. num_computed + num_new`."""

    request: Request
    num_new: int

    @property
    def reaches_end(self) -> bool:
        """Whether the next token can be chosen after this step."""
        return self.request.num_computed + self.num_new == self.request.num_tokens


@dataclass
class _Plan:
    """A step as it is put together: its sequences' shares, and what they come to."""

    shares: dict[Request, int] = field(default_factory=dict)
    preempted: set[Request] = field(default_factory=set)
    num_tokens: int = 0
    num_logits: int = 0  # for prompt log-probabilities

    def put(self, request: Request, num_new: int) -> None:
        self.shares[request] = num_new
        self._count(request, num_new)

    def drop(self, request: Request) -> None:
        self.preempted.add(request)
        self._count(request, -self.shares.pop(request, 0))

    def _count(self, request: Request, num_new: int) -> None:
        self.num_tokens += num_new
        if request.params.prompt_logprobs is not None:
            self.num_logits += num_new


class Scheduler:
    """Iteration-level scheduling (Orca, Yu et al. 2022) with chunked prefill (Sarathi-Serve, Agrawal et al. 2024).

    Args:
        kv: block tables.
        waiting: the queue, with its policy.
        costs: of steps so far.
        max_num_seqs: most sequences in a step.
        max_num_batched_tokens: most tokens in a step.
        decode_stretch: a step that runs prompts besides takes at most so many times as long as the running sequences'
            next tokens alone; None is no limit.
        max_logits_rows: most positions of a step whose logits are computed, for prompt log-probabilities.
    """

    def __init__(
        self,
        kv: KVCacheManager,
        waiting: WaitingQueue,
        costs: StepCosts,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        decode_stretch: float | None = None,
        max_logits_rows: int = 2**31,
    ) -> None:
        self.kv, self.waiting, self.costs = kv, waiting, costs
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.decode_stretch, self.max_logits_rows = decode_stretch, max_logits_rows
        self.running: list[Request] = []
        self.num_preemptions = 0

    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def schedule(self) -> list[Scheduled]:
        """The next step. Not empty while there is work: a request that cannot fit alone is refused before it gets here."""
        plan = _Plan()
        ranked = sorted(self.running, key=self.waiting.rank) if len(self.running) > 1 else list(self.running)
        decoding = [request for request in ranked if request.num_tokens - request.num_computed == 1]
        for request in decoding:
            if plan.num_tokens < self.max_num_batched_tokens and request not in plan.preempted:
                self._run(request, 1, plan)
        limit = self._limit(plan.num_tokens)
        if len(decoding) < len(ranked):
            for request in ranked:
                if request not in plan.shares and request not in plan.preempted:
                    self._run(request, self._chunk(request, plan, limit), plan)
        while not plan.preempted and (head := self.waiting.peek()) and self._chunk(head, plan, limit):
            if not self._admit(head):
                break
            self._run(head, self._chunk(head, plan, limit), plan)
        assert plan.shares or not self.has_work()
        return [Scheduled(request, num_new) for request, num_new in plan.shares.items()]

    def _limit(self, decoding: int) -> int:
        """How many tokens the step may have in all, once `decoding` sequences get one each."""
        most = self.max_num_batched_tokens
        if self.decode_stretch is None or not decoding or decoding >= most:
            return most
        if len(self.running) == decoding and not self.waiting:
            return decoding
        return min(most, max(self.costs.most_tokens(decoding, most, self.decode_stretch), decoding + LEAST_CHUNK))

    def _chunk(self, request: Request, plan: _Plan, limit: int) -> int:
        """How many tokens of `request` there is room for in a step of `limit` tokens."""
        room = limit - plan.num_tokens
        if request.params.prompt_logprobs is not None:
            room = min(room, self.max_logits_rows - plan.num_logits)
        return max(0, min(request.num_tokens - request.num_computed, room))

    def _admit(self, request: Request) -> bool:
        """Give a waiting request its first blocks, if there is room for it and all completions of its prompt."""
        seats = sum(1 + len(other.forks) for other in self.running)
        if seats + 1 + len(request.forks) > self.max_num_seqs:
            return False
        spare = 1 if self.running else 0  # or the next token of one of them would take its blocks away at once
        if not self.kv.admit(request, chunk=self.max_num_batched_tokens, spare=spare):
            return False
        self.running.append(request)
        self.waiting.remove(request)
        return True

    def _run(self, request: Request, num_new: int, plan: _Plan) -> None:
        """Put `num_new` tokens of `request` into the step; for want of blocks, others or `request` itself are preempted."""
        if num_new == 0:
            return
        while not self.kv.grow(request, request.num_computed + num_new):
            victim = max(self.running, key=self.waiting.rank)
            plan.drop(victim)
            self._preempt(victim)
            if victim is request:
                return
        plan.put(request, num_new)

    def _preempt(self, victim: Request) -> None:
        self.kv.release(victim)
        victim.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.push(victim)
        self.running.remove(victim)

    def start_over(self) -> None:
        """Whatever broke off in the midst of scheduling: all wait, and no block is taken."""
        for request in [*self.running, *self.waiting]:
            for member in [request, *request.forks]:
                member.blocks.clear()
                member.num_freed = member.num_computed = 0
            self.waiting.push(request)
        self.running.clear()
        self.kv.pending_copies.clear()
        self.kv.pool.reset()

    def fork(self, parent: Request) -> list[Request]:
        """The prompt of `parent` is computed: its other completions run as sequences of their own from here on."""
        children = list(parent.forks)
        for child in children:
            self.kv.fork(parent, child)
            child.token_ids = list(child.token_ids)
            child.admitted, child.num_prompt_run = parent.admitted, parent.num_prompt_run
            child.prompt_logprobs = parent.prompt_logprobs
            self.running.append(child)
            parent.forks.remove(child)
        return children

    def finish(self, request: Request) -> None:
        """Take a sequence out, whatever its state, and free its blocks."""
        self.kv.release(request)
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
