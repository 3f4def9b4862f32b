"""What an engine has done, and how it stands."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class EngineStats:
    """A snapshot.

    Attributes:
        num_running, num_waiting: requests now.
        kv_blocks, kv_blocks_used, kv_blocks_cached: of the cache; used ones belong to a request now, cached ones can be
            found by their content, whether used or not.
        kv_waste: share of the slots in used blocks that hold no token.
        prefix_hit_rate: share of the prompt tokens that were found in the prefix cache.
        evictions, block_copies, preemptions: since the engine was made.
        prompt_tokens, generated_tokens: that ran; prompt tokens from the cache are not among them.
        finished: completions by finish_reason.
        steps: how many.
        step_seconds, model_seconds: in steps, and of those in the step program.
    """

    num_running: int
    num_waiting: int
    kv_blocks: int
    kv_blocks_used: int
    kv_blocks_cached: int
    kv_waste: float
    prefix_queried_tokens: int
    prefix_hit_tokens: int
    evictions: int
    block_copies: int
    preemptions: int
    prompt_tokens: int
    generated_tokens: int
    finished: dict[str, int]
    steps: int
    step_seconds: float
    model_seconds: float

    @property
    def prefix_hit_rate(self) -> float:
        return self.prefix_hit_tokens / self.prefix_queried_tokens if self.prefix_queried_tokens else 0.0


@dataclass
class Counters:
    """What an engine counts as it goes."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    step_seconds: float = 0.0
    model_seconds: float = 0.0
    last_step: float | None = None
