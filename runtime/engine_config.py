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
        max_queued_requests, max_queued_tokens: completions, and tokens of their prompts, in the queue, beyond which
            requests are refused; an empty queue takes any. None is no limit.

    Raises:
        UsageError: a limit that is no whole number or below 1, or an unknown policy.
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
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            value = getattr(self, name)
            _check(name, value, _is_int(value) and value >= 1, "a whole number, at least 1")
        for name in ("max_queued_requests", "max_queued_tokens"):
            value = getattr(self, name)
            _check(name, value, value is None or (_is_int(value) and value >= 1), "a whole number above 0, or None")
        memory = self.kv_cache_memory
        _check("kv_cache_memory", memory, memory is None or _is_int(memory), "a whole number of bytes, or None")
        _check("prefix_caching", self.prefix_caching, isinstance(self.prefix_caching, bool), "True or False")
        _check("policy", self.policy, self.policy in POLICIES, ", ".join(POLICIES))
        stretch = self.decode_stretch
        right = stretch is None or (isinstance(stretch, int | float) and 1 < stretch < math.inf)
        _check("decode_stretch", stretch, right, "above 1, or None")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(name: str, value: object, right: bool, expected: str) -> None:
    if not right:
        raise UsageError(f"{name}={value!r}: expected {expected}")
