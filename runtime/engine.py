"""The engine: schedule, execute, sample, commit; one step at a time."""

from __future__ import annotations

import itertools
import logging
import numbers
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence

from torch import Tensor

from ..errors import ClosedError, DeadlineError, ExecutionError, OptcError, OverloadedError, RequestError
from .artifact import Artifact
from .block_pool import BlockPool
from .constrain import Constrainer
from .engine_config import EngineConfig
from .executor import Executor
from .kv_cache import KVCacheManager
from .kv_memory import num_blocks
from .params import RequestOptions, SamplingParams
from .request import FinishReason, Request
from .sampler import derived_seed, report_logprobs, sample
from .scheduler import Scheduled, Scheduler
from .stats import Counters, EngineStats
from .step_costs import StepCosts
from .step_inputs import pack
from .tokenizer import Tokenizer
from .waiting_queue import WaitingQueue

logger = logging.getLogger("optc")
_DEFAULT_OPTIONS = RequestOptions()
PROMPT_LOGITS = 2**24  # most logits of prompt positions in a step: 64 MB


class Engine:
    """Runs requests over an artifact.

    Threads may share it: one steps at a time, and adding and aborting wait for no step.

    Args:
        artifact: opened and checked.
        config: limits.
        native: use the artifact's native code.

    Raises:
        ArtifactError: the code does not fit this machine.
        RequestError: the memory for the KV cache does not hold a single block.
    """

    def __init__(self, artifact: Artifact, config: EngineConfig, *, native: bool = True) -> None:
        manifest = artifact.manifest
        self.manifest, self.config = manifest, config
        blocks = num_blocks(artifact, max_num_seqs=config.max_num_seqs, kv_cache_memory=config.kv_cache_memory)
        self.pool = BlockPool(blocks, manifest.block_size)
        self.executor = Executor(artifact, num_blocks=blocks, native=native)
        windows = [layer.window for layer in manifest.kv_cache]
        self.kv = KVCacheManager(
            self.pool, prefix_caching=config.prefix_caching, window=max(windows) if all(windows) else 0
        )
        self.queue = WaitingQueue(config.policy)
        self.scheduler = Scheduler(
            self.kv,
            self.queue,
            StepCosts(),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            decode_stretch=config.decode_stretch,
            max_logits_rows=max(1, PROMPT_LOGITS // manifest.model.vocab_size),
        )
        record = manifest.tokenizer
        self.tokenizer = Tokenizer(artifact.path, record) if record else None
        self._constrainer = Constrainer(artifact, self.tokenizer)
        self.counters = Counters()
        self._lock = threading.Lock()  # who steps
        self._door = threading.Lock()  # the inbox and the queue's size, held for microseconds
        self._inbox: deque[Request] = deque()
        self._aborted: deque[Request] = deque()
        self._queued: dict[Request, None] = {}
        self._queued_tokens = 0
        self._num_timed = 0
        self._is_closed = False
        self._is_computed = False
        self._ids = itertools.count()

    def add(
        self, prompt_token_ids: Sequence[int], params: SamplingParams, options: RequestOptions = _DEFAULT_OPTIONS
    ) -> Request:
        """Queue a prompt. With `n` above 1, `group` of the request that comes back has all of its completions.

        Raises:
            RequestError: the prompt is empty, holds ids out of range, or can never fit; or a parameter is wrong.
            OverloadedError: the queue is full.
        """
        if self._is_closed:
            raise ClosedError("the engine was closed")
        ids = self._checked(prompt_token_ids, params)
        self._refuse_if_full(len(ids))  # before its grammar is compiled
        seed = params.seed if params.seed is not None else int.from_bytes(os.urandom(8), "little") >> 1
        group = [
            self._constrainer.prepare(Request(0, ids, params, derived_seed(seed, number), list(ids), options))
            for number in range(params.n)
        ]
        first, *forks = group
        first.forks = forks
        with self._door:
            if self._is_closed:
                raise ClosedError("the engine was closed")
            self._refuse_if_full(len(ids))
            for request in group:
                request.request_id, request.group = next(self._ids), group
            self._inbox.append(first)
            self._queued[first] = None
            self._queued_tokens += len(ids)
        return first

    def _checked(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> list[int]:
        limit = self.manifest.model.max_model_len
        if not prompt_token_ids:
            raise RequestError("empty prompt: it has no tokens")
        ids = self.check_token_ids(prompt_token_ids)
        if len(ids) + bool(params.max_tokens) > limit:
            raise RequestError(
                f"the prompt has {len(ids)} tokens; the context length is {limit}, prompt and completion together"
            )
        longest = min(len(ids) + params.max_tokens, limit)
        if self.kv.most_blocks(longest, self.config.max_num_batched_tokens) > self.pool.num_blocks:
            held = self.pool.num_blocks * self.pool.block_size
            raise RequestError(
                f"the request needs {longest} tokens of KV cache, which holds {held}; raise kv_cache_memory or lower max_tokens"
            )
        if params.n > self.config.max_num_seqs:
            raise RequestError(f"n={params.n}: expected at most {self.config.max_num_seqs}, the engine's max_num_seqs")
        return ids

    def check_token_ids(self, ids: Sequence[int]) -> list[int]:
        """The ids as plain integers; those the model does not have are refused.

        Raises:
            RequestError: one is out of range, or not an integer.
        """
        size = self.manifest.model.vocab_size
        if wrong := [t for t in ids if isinstance(t, bool) or not isinstance(t, numbers.Integral) or not 0 <= t < size]:
            raise RequestError(f"token id {wrong[0]!r} in the prompt: expected 0 to {size - 1}")
        return [int(t) for t in ids]

    def _refuse_if_full(self, num_tokens: int) -> None:
        config = self.config
        if config.max_queued_requests is not None and len(self._queued) >= config.max_queued_requests:
            raise OverloadedError(f"the queue is full: {len(self._queued)} requests wait; try again later")
        if (
            config.max_queued_tokens is not None
            and self._queued
            and self._queued_tokens + num_tokens > config.max_queued_tokens
        ):
            raise OverloadedError(
                f"the queue is full: {self._queued_tokens} tokens wait, {num_tokens} more would exceed "
                f"{config.max_queued_tokens}; try again later"
            )

    def has_work(self) -> bool:
        return bool(self._inbox or self._aborted) or self.scheduler.has_work()

    def abort(self, requests: Iterable[Request]) -> None:
        """Drop requests that have not finished, and free their blocks: now, or at the end of the step that runs."""
        self._aborted.extend(requests)
        if self._lock.acquire(blocking=False):
            try:
                self._open_inbox()
            finally:
                self._lock.release()

    def step(self) -> list[Request]:
        """Run one step; the requests that got a token in it or ended. Those with a `finish_reason` have left the engine.

        What goes wrong ends requests and not the engine: a step that raises ends those that were in it, logits that are
        not finite the one they belong to. Interrupted (KeyboardInterrupt) in the model, a step has not happened: its
        tokens are due again; interrupted behind it, its requests end.
        """
        with self._lock:
            started = time.perf_counter()
            changed = self._open_inbox()
            if self._num_timed:
                changed += self._end_late()
            step = self.scheduler.schedule()
            if step:
                try:
                    changed += self._run(step)
                except Exception as error:
                    logger.warning("a step of %d sequences failed", len(step), exc_info=error)
                    changed += self._fail(step, error)
                except BaseException:
                    if self._is_computed:  # half committed: its requests cannot go on
                        self._fail(step, ExecutionError("the step was interrupted"))
                    raise
                if self._aborted:
                    changed += self._open_inbox()
                self.counters.steps += 1
                self.counters.last_step = time.monotonic()
                self.counters.step_seconds += time.perf_counter() - started
            return changed

    def _open_inbox(self) -> list[Request]:
        """Queue what came and drop what was aborted; that."""
        ended: list[Request] = []
        while self._inbox:
            request = self._inbox.popleft()
            self.queue.enter(request)
            self.queue.push(request)
            self._num_timed += request.is_timed
        while self._aborted:
            ended += self._finish(self._aborted.popleft(), "abort")
        return ended

    def _end_late(self) -> list[Request]:
        """End the requests whose time is up."""
        ended: list[Request] = []
        now = time.monotonic()
        for request in [*self.scheduler.running, *self.queue]:
            if late := request.late_for(now):
                for member in [request, *request.forks]:
                    ended += self._finish(member, "timeout", DeadlineError(late))
        return ended

    def _run(self, step: Sequence[Scheduled]) -> list[Request]:
        """Execute, sample, commit."""
        self.executor.pages.use(self.pool.num_touched)
        inputs, wanted = pack(step, self.pool.block_size)
        if self.kv.pending_copies:
            self.executor.copy_blocks(self.kv.pending_copies)
            self.kv.pending_copies.clear()
        self._is_computed = False
        started = time.perf_counter()
        logits = self.executor.run(inputs)
        self._is_computed = True
        seconds = time.perf_counter() - started

        advanced: list[Request] = []
        rows: list[int] = []
        row = 0
        for scheduled, positions in zip(step, wanted, strict=True):
            row += len(positions)
            if scheduled.reaches_end and scheduled.request.params.max_tokens:
                members = [scheduled.request, *scheduled.request.forks]
                advanced += members
                rows += [row - 1] * len(members)
        reports = self._prompt_logprobs(step, wanted, logits)
        as_they_are = rows == list(range(len(logits)))
        chosen = sample(logits, advanced, None if as_they_are else rows) if advanced else []

        self.counters.model_seconds += seconds
        self.scheduler.costs.add(len(inputs.input_ids), seconds)
        ended = self._commit(step, reports)
        for request, choice in zip(advanced, chosen, strict=True):
            self._accept(request, choice)
        return advanced + ended

    def _prompt_logprobs(
        self, step: Sequence[Scheduled], wanted: Sequence[list[int]], logits: Tensor
    ) -> list[list[dict[int, float]]]:
        """Of each sequence, the log-probabilities of the prompt tokens behind the positions whose logits were computed."""
        found: list[list[dict[int, float]]] = []
        row = 0
        for scheduled, positions in zip(step, wanted, strict=True):
            request, count = scheduled.request, scheduled.request.params.prompt_logprobs
            inner = [position for position in positions if position + 1 < len(request.prompt_token_ids)]
            if count is None or not inner:
                found.append([])
            else:
                targets = [request.prompt_token_ids[position + 1] for position in inner]
                found.append(report_logprobs(logits[row : row + len(inner)].numpy(), targets, [count] * len(inner)))
            row += len(positions)
        return found

    def _commit(self, step: Sequence[Scheduled], reports: Sequence[list[dict[int, float]]]) -> list[Request]:
        """Note what was computed; the requests that wanted no more than that."""
        now = time.monotonic()
        ended: list[Request] = []
        for scheduled, report in zip(step, reports, strict=True):
            request = scheduled.request
            prompt = max(0, min(len(request.prompt_token_ids) - request.num_computed, scheduled.num_new))
            if prompt:
                self.counters.prompt_tokens += prompt
                if request.admitted is None:
                    request.admitted = now
                    self._leave_queue(request)
                if self.config.policy == "fair":
                    self.queue.charge(request, inputs=prompt, outputs=0)
            request.prompt_logprobs += report
            reaches_end = scheduled.reaches_end
            self.kv.commit(request, request.num_computed + scheduled.num_new)
            if reaches_end and request.forks:
                self.scheduler.fork(request)
            if reaches_end and not request.params.max_tokens:
                for member in request.group:
                    ended += self._finish(member, "length")
        return ended

    def _accept(self, request: Request, choice: int | OptcError) -> None:
        """Append the token, and end the request if it is complete with it."""
        if isinstance(choice, OptcError):
            self._finish(request, "error", choice)
            return
        params = request.params
        request.token_ids.append(choice)
        self.counters.generated_tokens += 1
        if request.first_token is None:
            request.first_token = time.monotonic()
        if self.config.policy == "fair":
            self.queue.charge(request, inputs=0, outputs=1)
        try:
            if request.constraints is not None:
                request.constraints.observe(choice)
        except OptcError as error:
            self._finish(request, "error", error)
            return
        if request.text is not None:
            request.text.catch_up(request.token_ids)
        if (
            choice in request.end_ids
            or (request.text is not None and request.text.is_stopped)
            or (request.constraints is not None and request.constraints.is_complete)
        ):
            self._finish(request, "stop")
        elif request.num_output_tokens >= params.max_tokens or request.num_tokens >= self.manifest.model.max_model_len:
            self._finish(request, "length")

    def _fail(self, step: Sequence[Scheduled], error: Exception) -> list[Request]:
        """End the sequences of a step that raised. What they wrote is in no block that others can find."""
        self.kv.pending_copies.clear()
        members = [member for scheduled in step for member in (scheduled.request, *scheduled.request.forks)]
        reason = error if isinstance(error, OptcError) else ExecutionError(f"the step failed: {error}")
        return [ended for member in members for ended in self._finish(member, "error", reason)]

    def _finish(self, request: Request, reason: FinishReason, error: OptcError | None = None) -> list[Request]:
        """End a request, once; it, if it had not ended."""
        if request.finish_reason is not None:
            return []
        if request.forks and reason == "abort":
            self._promote(request)
        if request.text is not None:
            request.text.catch_up(request.token_ids, ended=True)
            if reason == "length" and request.text.is_stopped:  # by the last, unfinished character
                reason = "stop"
        self.scheduler.finish(request)
        for other in request.group:
            if request in other.forks:
                other.forks.remove(request)
        if all(other.finish_reason is not None or other is request for other in request.group):
            self.queue.leave(request)
            self._num_timed -= request.is_timed
        self._leave_queue(request)
        request.finished = time.monotonic()
        self.counters.finished[reason] += 1
        request.error, request.finish_reason = error, reason
        return [request]

    def _promote(self, request: Request) -> None:
        """The one that was to compute the prompt is dropped: the next completion computes it."""
        heir, *rest = request.forks
        request.forks, heir.forks = [], rest
        self.queue.push(heir)
        with self._door:
            if request in self._queued:
                self._queued[heir] = None
                self._queued_tokens += len(heir.prompt_token_ids)

    def _leave_queue(self, request: Request) -> None:
        with self._door:
            if request in self._queued:
                del self._queued[request]
                self._queued_tokens -= len(request.prompt_token_ids)

    def reset_prefix_cache(self) -> None:
        """Forget what was computed for requests that are gone."""
        with self._lock:
            self.pool.forget_all()

    @property
    def seconds_since_step(self) -> float | None:
        """Since the last step ended; None before the first. Waits for nothing, so it tells of an engine that hangs."""
        last = self.counters.last_step
        return None if last is None else time.monotonic() - last

    def stats(self) -> EngineStats:
        """How the engine stands, between two steps; waits for the one that runs."""
        with self._lock:
            counters, pool = self.counters, self.pool
            wasted, slots = self.kv.num_wasted_slots(self.scheduler.running)
            return EngineStats(
                num_running=len(self.scheduler.running),
                num_waiting=len(self.queue) + len(self._inbox),
                kv_blocks=pool.num_blocks,
                kv_blocks_used=pool.num_blocks - pool.num_free,
                kv_blocks_cached=pool.num_cached,
                kv_waste=wasted / slots if slots else 0.0,
                prefix_queried_tokens=pool.stats.queried_tokens,
                prefix_hit_tokens=pool.stats.hit_tokens,
                evictions=pool.stats.evictions,
                block_copies=pool.stats.copies,
                preemptions=self.scheduler.num_preemptions,
                prompt_tokens=counters.prompt_tokens,
                generated_tokens=counters.generated_tokens,
                finished=dict(counters.finished),
                steps=counters.steps,
                step_seconds=counters.step_seconds,
                model_seconds=counters.model_seconds,
            )

    def close(self) -> None:
        """Take no more requests, drop those that have not finished, end the process that compiles grammars."""
        with self._door:
            self._is_closed = True
        with self._lock:
            self._open_inbox()
            for request in [*self.scheduler.running, *self.queue]:
                for member in [request, *request.forks]:
                    self._finish(member, "abort")
        self._constrainer.close()
