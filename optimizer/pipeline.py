"""The passes, in order. Read this first.

A captured graph becomes two programs: the scoring program, which takes one whole sequence and gives all its logits, and
the step program, which takes packed tokens of many sequences over a paged KV cache. The shared passes come first.
"""

from __future__ import annotations

from collections.abc import Callable

from ..passes.base import Pass
from ..passes.canonicalize import Canonicalize
from ..passes.gather_logits import GatherLogits
from ..passes.kv_cache import KVCache
from ..passes.paged_attention import PagedAttention
from ..passes.quantize.calibrate import Calibration
from ..passes.quantize.quantize import Quantize
from .config import CompileConfig


def shared_passes(
    config: CompileConfig,
    calibration: Calibration | None = None,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> list[Pass]:
    """Passes for both programs."""
    passes: list[Pass] = [Canonicalize()]
    if config.recipe is not None:
        passes += [Quantize(recipe=config.recipe, calibration=calibration, on_progress=on_progress)]
    return passes


def step_passes(config: CompileConfig) -> list[Pass]:
    """Passes that make the step program out of the shared graph."""
    return [KVCache(), PagedAttention(), GatherLogits()]
