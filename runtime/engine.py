"""The engine: schedule, execute, sample, commit; one step at a time."""

from __future__ import annotations

import contextlib
import itertools
import numbers
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import RequestError, UsageError
from .artifact import Artifact
from .executor import Executor, StepInputs
from .kv_cache import BlockPool
from .params import SamplingParams
from .request import Request
from .sampler import sample
from .scheduler import Scheduled, Scheduler

MEMORY_SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Limits of an engine.

    Attributes:
        max_num_seqs: most sequences in a step.
        max_num_batched_tokens: most tokens in a step; longer prompts run in chunks.
        kv_cache_memory: bytes for the KV cache. None takes what `max_num_seqs` sequences of full length need, at most a
            quarter of the memory that the weights leave available.

    Raises:
        UsageError: a limit below 1.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    kv_cache_memory: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)!r}: expected at least 1")


class Engine:
    """Runs requests over an artifact. Threads may share it: a lock lets one of them in at a time.

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
        self.manifest = manifest
        self.pool = BlockPool(_num_blocks(artifact, config), manifest.block_size)
        self.executor = Executor(artifact, num_blocks=self.pool.num_blocks, native=native)
        self.scheduler = Scheduler(
            self.pool, max_num_seqs=config.max_num_seqs, max_num_batched_tokens=config.max_num_batched_tokens
        )
        self._lock = threading.Lock()
        self.num_generated_tokens = 0
        self._ids = itertools.count()
        self._end_ids = frozenset(manifest.eos_token_ids)

    def add(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> Request:
        """Queue a prompt.

        Raises:
            RequestError: the prompt is empty, holds ids out of range, or leaves no room for a single token.
        """
        limit = self.manifest.model.max_model_len
        if not prompt_token_ids:
            raise RequestError("empty prompt: it has no tokens")
        ids = self.check_token_ids(prompt_token_ids)
        if len(ids) >= limit:
            raise RequestError(
                f"the prompt has {len(ids)} tokens; the context length is {limit}, prompt and completion together"
            )
        longest = min(len(ids) + params.max_tokens, limit)
        if self.pool.blocks_for(longest) > self.pool.num_blocks:
            held = self.pool.num_blocks * self.pool.block_size
            raise RequestError(
                f"the request needs {longest} tokens of KV cache, which holds {held}; raise kv_cache_memory or lower max_tokens"
            )
        seed = params.seed if params.seed is not None else int.from_bytes(os.urandom(8), "little") >> 1
        with self._lock:
            request = Request(next(self._ids), ids, params, seed, list(ids))
            self.scheduler.add(request)
        return request

    def check_token_ids(self, ids: Sequence[int]) -> list[int]:
        """The ids as plain integers; those the model does not have are refused.

        Raises:
            RequestError: one is out of range, or not an integer.
        """
        size = self.manifest.model.vocab_size
        if wrong := [t for t in ids if isinstance(t, bool) or not isinstance(t, numbers.Integral) or not 0 <= t < size]:
            raise RequestError(f"token id {wrong[0]!r} in the prompt: expected 0 to {size - 1}")
        return [int(t) for t in ids]

    def has_work(self) -> bool:
        return self.scheduler.has_work()

    def abort(self, requests: Iterable[Request]) -> None:
        """Drop requests that have not finished, and free their blocks."""
        with self._lock:
            for request in requests:
                self.scheduler.finish(request)

    def step(self) -> list[Request]:
        """Run one step; the requests that got a token in it. Those with a `finish_reason` have left the engine.

        A step happens as a whole or not at all: after an exception the same tokens are due again.

        Raises:
            ExecutionError: the model gave logits that are not finite.
        """
        with self._lock:
            return self._step()

    def _step(self) -> list[Request]:
        step = self.scheduler.schedule()
        if not step:
            return []
        logits = self.executor.run(self._inputs(step))
        advanced = [s.request for s in step if s.reaches_end]
        tokens = sample(logits, advanced) if advanced else []
        for scheduled in step:
            scheduled.request.num_computed += scheduled.num_new
        self.num_generated_tokens += len(tokens)
        for request, token in zip(advanced, tokens, strict=True):
            request.token_ids.append(token)
            self._finish_if_done(request, token)
        return advanced

    def _finish_if_done(self, request: Request, token: int) -> None:
        if token in self._end_ids and not request.params.ignore_eos:
            request.finish_reason = "stop"
        elif (
            request.num_output_tokens >= request.params.max_tokens
            or request.num_tokens >= self.manifest.model.max_model_len
        ):
            request.finish_reason = "length"
        if request.finish_reason:
            self.scheduler.finish(request)

    def _inputs(self, step: Sequence[Scheduled]) -> StepInputs:
        """Pack the step's tokens without padding."""
        block_size, width = self.pool.block_size, max(len(s.request.blocks) for s in step)
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        table: list[int] = []
        query_start_loc, seq_lens, ends = [0], [], []
        for s in step:
            blocks, first = s.request.blocks, s.request.num_computed
            last = first + s.num_new
            tokens += s.request.token_ids[first:last]
            positions += range(first, last)
            slots += [blocks[i // block_size] * block_size + i % block_size for i in range(first, last)]
            table += blocks + [0] * (width - len(blocks))
            query_start_loc.append(len(tokens))
            seq_lens.append(last)
            if s.reaches_end:
                ends.append(len(tokens) - 1)
        return StepInputs(
            input_ids=_tensor(tokens, np.int64),
            positions=_tensor(positions, np.int64),
            slot_mapping=_tensor(slots, np.int64),
            block_table=_tensor(table, np.int32).view(len(step), width),
            query_start_loc=_tensor(query_start_loc, np.int32),
            seq_lens=_tensor(seq_lens, np.int32),
            # A step of prompt chunks alone wants no logits; the program computes at least one row.
            logits_indices=_tensor(ends or [0], np.int64),
        )


def _tensor(values: list[int], dtype: type) -> Tensor:
    return torch.from_numpy(np.array(values, dtype))  # torch.tensor takes twice as long


def _num_blocks(artifact: Artifact, config: EngineConfig) -> int:
    manifest = artifact.manifest
    per_block = max(1, manifest.memory.kv_bytes_per_token * manifest.block_size)
    if config.kv_cache_memory is not None:
        blocks = config.kv_cache_memory // per_block
        if blocks < 1:
            raise RequestError(f"kv_cache_memory={config.kv_cache_memory}: a block takes {per_block} bytes")
        return blocks
    per_sequence = -(-manifest.model.max_model_len // manifest.block_size)
    left = max(0, _available_memory() - manifest.memory.weight_bytes)  # the executor loads the weights after this
    affordable = int(left * MEMORY_SHARE) // per_block
    return max(1, min(config.max_num_seqs * per_sequence, affordable))


def _available_memory() -> int:
    """Bytes that can be allocated without swapping, and within the limit of the container."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024
    except (OSError, StopIteration):
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        available = min(available, max(0, limit - used))
    return available
