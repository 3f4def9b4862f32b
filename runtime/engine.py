"""The engine: schedule, execute, sample, commit; one step at a time."""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence

from torch import Tensor

from ..errors import ClosedError, DeadlineError, ExecutionError, OptcError
from .admission import Admission
from .artifact import Artifact
from .block_pool import BlockPool
from .constrain import Constrainer
from .engine_config import EngineConfig
from .executor import Executor
from .kv_cache import KVCacheManager
from .kv_memory import num_blocks
from .params import RequestOptions, SamplingParams
from .request import FinishReason, Logprobs, Request
from .sampler import NOT_FINITE, report_logprobs, sample
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
        self.executor = Executor(artifact, num_blocks=blocks, native=native)  # says so if there is no memory for them
        self.pool = BlockPool(blocks, manifest.block_size)
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
        self.admission = Admission(manifest, config, self.kv, self._constrainer)
        self.counters = Counters()
        self._lock = threading.Lock()  # who steps
        self._door = threading.Lock()  # who comes in, held for microseconds
        self._inbox: deque[Request] = deque()
        self._aborted: deque[Request] = deque()
        self._timed: dict[Request, None] = {}  # those with a deadline, and when the first of these is
        self._next_deadline = math.inf
        self._is_closed = False
        self._phase = "schedule"  # then "model", then "commit": where a step is
        self._ids = itertools.count()

    def add(
        self, prompt_token_ids: Sequence[int], params: SamplingParams, options: RequestOptions = _DEFAULT_OPTIONS
    ) -> Request:
        """Queue a prompt. With `n` above 1, `group` of the request that comes back has all of its completions.

        Raises:
            RequestError: the prompt is empty, holds ids out of range, or can never fit; or a parameter is wrong.
            OverloadedError: the queue is full, or too many grammars wait to be compiled.
            ClosedError: the engine was closed.
        """
        self._check_open()
        group = self.admission.make(prompt_token_ids, params, options)
        with self._door:
            self._check_open()
            self.admission.enter(group[0])
            for request in group:
                request.request_id = next(self._ids)
            self._inbox.append(group[0])
        return group[0]

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedError("the engine was closed")

    def has_work(self) -> bool:
        return bool(self._inbox or self._aborted) or self.scheduler.has_work()

    def abort(self, requests: Iterable[Request]) -> None:
        """Drop requests that have not finished, and free their blocks: now, or at the end of the step that runs."""
        self._aborted.extend(requests)
        if self._lock.acquire(blocking=False):
            try:
                self._open_inbox([])
            except BaseException:
                self.scheduler.start_over()
                raise
            finally:
                self._lock.release()

    def step(self) -> list[Request]:
        """Run one step; the requests that got a token in it or ended. Those with a `finish_reason` have left the engine.

        What goes wrong ends requests and not the engine: a step that raises ends those that were in it, logits that are
        not finite the one they belong to. Interrupted (KeyboardInterrupt) in the model or before, a step has not happened:
        its tokens are due again; interrupted behind it, its requests end.
        """
        with self._lock:
            started = time.perf_counter()
            changed: list[Request] = []
            step: Sequence[Scheduled] = ()
            members: list[Request] = []
            self._phase = "schedule"
            try:
                self._open_inbox(changed)
                if self._timed:
                    self._end_late(changed)
                step = self.scheduler.schedule()
                if step:
                    members = [member for each in step for member in (each.request, *each.request.forks)]
                    changed += self._run(step)
                if self._aborted:
                    self._open_inbox(changed)
            except Exception as error:
                logger.warning("a step of %d sequences failed", len(step), exc_info=error)
                changed += self._fail(members, error)
            except BaseException:
                if self._phase != "model":  # half done: what is in the books may be wrong
                    self.scheduler.start_over()
                if self._phase == "commit":
                    self._fail(members, ExecutionError("the step was interrupted"))
                raise
            if step:
                self.counters.steps += 1
                self.counters.last_step = time.monotonic()
                self.counters.step_seconds += time.perf_counter() - started
            return changed

    def _open_inbox(self, ended: list[Request]) -> None:
        """Queue what came and drop what was aborted; that goes into `ended`. An interrupt in the midst loses nothing."""
        self._take_in()
        while self._aborted:
            self._take_in()  # it may have come just before it was dropped
            ended += self._finish(self._aborted[0], "abort")
            self._aborted.popleft()

    def _take_in(self) -> None:
        while self._inbox:
            request = self._inbox[0]
            self.queue.enter(request)
            self.queue.push(request)
            if request.is_timed:
                self._timed |= dict.fromkeys(request.group)
                self._next_deadline = min(self._next_deadline, request.next_deadline)
            self._inbox.popleft()

    def _end_late(self, ended: list[Request]) -> None:
        """End the requests whose time is up."""
        if (now := time.monotonic()) < self._next_deadline:
            return
        for request in list(self._timed):
            if late := request.late_for(now):
                ended += self._finish(request, "timeout", DeadlineError(late))
            if request.finish_reason is not None:
                self._timed.pop(request, None)
        self._next_deadline = min((request.next_deadline for request in self._timed), default=math.inf)

    def _run(self, step: Sequence[Scheduled]) -> list[Request]:
        """Execute, sample, commit."""
        self._phase = "model"
        self.executor.pages.use(self.pool.num_touched)
        inputs, wanted = pack(step, self.pool.block_size)
        if self.kv.pending_copies:
            self.executor.copy_blocks(self.kv.pending_copies)
            self.kv.pending_copies.clear()
        started = time.perf_counter()
        logits = self.executor.run(inputs)
        self._phase = "commit"
        seconds = time.perf_counter() - started

        reports = self._prompt_logprobs(step, wanted, logits)
        advanced: list[Request] = []
        rows: list[int] = []
        row = 0
        for scheduled, positions, report in zip(step, wanted, reports, strict=True):
            row += len(positions)
            if scheduled.reaches_end and scheduled.request.params.max_tokens and not isinstance(report, OptcError):
                members = [scheduled.request, *scheduled.request.forks]
                advanced += members
                rows += [row - 1] * len(members)
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
    ) -> list[list[Logprobs] | OptcError]:
        """Of each sequence, the log-probabilities of the prompt tokens behind the positions whose logits were computed."""
        found: list[list[Logprobs] | OptcError] = []
        row = 0
        for scheduled, positions in zip(step, wanted, strict=True):
            request, count = scheduled.request, scheduled.request.params.prompt_logprobs
            inner = [position for position in positions if position + 1 < len(request.prompt_token_ids)]
            if count is None or not inner:
                found.append([])
            else:
                targets = [request.prompt_token_ids[position + 1] for position in inner]
                report = report_logprobs(logits[row : row + len(inner)].numpy(), targets, [count] * len(inner))
                is_bad = any(math.isnan(each[target]) for each, target in zip(report, targets, strict=True))
                found.append(ExecutionError(NOT_FINITE) if is_bad else report)
            row += len(positions)
        return found

    def _commit(self, step: Sequence[Scheduled], reports: Sequence[list[Logprobs] | OptcError]) -> list[Request]:
        """Note what was computed; the requests that end with that."""
        now = time.monotonic()
        ended: list[Request] = []
        for scheduled, report in zip(step, reports, strict=True):
            request = scheduled.request
            if isinstance(report, OptcError):
                for member in [request, *request.forks]:
                    ended += self._finish(member, "error", report)
                continue
            if request.admitted is None:
                for member in [request, *request.forks]:
                    member.admitted = now
                self.admission.leave(request)
            reached = min(len(request.prompt_token_ids), request.num_computed + scheduled.num_new)
            prompt = min(reached - request.num_prompt_run, scheduled.num_new)
            if prompt > 0:  # what is computed again after preemption counts once
                request.num_prompt_run = reached
                self.counters.prompt_tokens += prompt
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

    def _fail(self, members: Sequence[Request], error: Exception) -> list[Request]:
        """End those that were in a step that raised, or, if it was being put together, all that might have been; them."""
        if self._phase == "schedule":
            affected = [*self.scheduler.running, *filter(None, [self.queue.peek()])]
            members = [member for request in affected for member in (request, *request.forks)]
        if self._phase != "model":
            self.scheduler.start_over()
        self.kv.pending_copies.clear()
        reason = error if isinstance(error, OptcError) else ExecutionError(f"the step failed: {error}")
        for member in members:
            self._finish(member, "error", reason)
        return list(members)  # some of them may have ended before it raised, and nobody knows yet

    def _finish(self, request: Request, reason: FinishReason, error: OptcError | None = None) -> list[Request]:
        """End a request, once; it, if it had not ended. Broken off, it can be called again."""
        if request.finish_reason is not None:
            return []
        heir = self._promote(request) if request.forks else None
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
        self.admission.leave(request, heir)
        request.finished = time.monotonic()
        self.counters.finished[reason] += 1
        request.error, request.finish_reason = error, reason
        self._timed.pop(request, None)
        return [request]

    def _promote(self, request: Request) -> Request:
        """The one that was to compute the prompt ends: the next completion computes what is left of it."""
        heir, *rest = request.forks
        heir.token_ids = list(heir.token_ids)
        heir.admitted, heir.num_cached = request.admitted, request.num_cached
        heir.num_prompt_run, heir.prompt_logprobs = request.num_prompt_run, request.prompt_logprobs
        heir.prefix_root, heir.block_hashes = request.prefix_root, list(request.block_hashes)
        self.queue.push(heir)
        heir.forks = rest
        request.forks = []
        return heir

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
            self._open_inbox([])
            for request in [*self.scheduler.running, *self.queue]:
                for member in [request, *request.forks]:
                    self._finish(member, "abort")
        self._constrainer.close()
