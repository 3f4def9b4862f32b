"""Limits of an engine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import UsageError
from .waiting_queue import POLICIES, Policy


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Limits of an engine.

    Attributes:
        max_num_seqs: most sequences in a step.
        max_num_batched_tokens: most tokens in a step; longer prompts run in chunks.
        kv_cache_memory: bytes for the KV cache. None takes what `max_num_seqs` sequences of full length need, at most a
            quarter of the memory that the weights leave available.
        prefix_caching: whether requests reuse what others with the same beginning computed.
        policy: who runs first: fcfs, priority or fair (between clients).
        decode_stretch: a step that runs prompts besides aims to take at most so many times as long as the next tokens of the
            running sequences alone, by what steps of so many tokens took; prompts run in smaller chunks then. None takes
            whole steps.
        max_queued_requests, max_queued_tokens: in the queue, beyond which requests are refused; None is no limit.

    Raises:
        UsageError: a limit below 1, or an unknown policy.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    kv_cache_memory: int | None = None
    prefix_caching: bool = True
    policy: Policy = "fcfs"
    decode_stretch: float | None = None
    max_queued_requests: int | None = None
    max_queued_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_queued_requests", "max_queued_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}={value!r}: expected at least 1")
        if self.policy not in POLICIES:
            raise UsageError(f"policy={self.policy!r}: expected {', '.join(POLICIES)}")
        if self.decode_stretch is not None and not 1 < self.decode_stretch < math.inf:
            raise UsageError(f"decode_stretch={self.decode_stretch!r}: expected above 1, or None")
