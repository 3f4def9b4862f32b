"""The passes, in order. Read this first.

A captured graph becomes two programs: the scoring program, which takes one whole sequence and gives all its logits, and
the step program, which takes packed tokens of many sequences over a paged KV cache. The shared passes come first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from ..passes.base import Pass
from ..passes.canonicalize import Canonicalize
from ..passes.fuse_quantize import FuseQuantize
from ..passes.fuse_rms_norm import FuseRmsNorm
from ..passes.fuse_rope import FuseRope
from ..passes.fuse_rope_kv_write import FuseRopeKVWrite
from ..passes.fuse_silu_mul import FuseSiluMul
from ..passes.gather_logits import GatherLogits
from ..passes.kv_cache import KVCache
from ..passes.merge_linears import MergeLinears
from ..passes.pack_weights import PackWeights
from ..passes.paged_attention import PagedAttention
from ..passes.quantize.awq import AWQ
from ..passes.quantize.calibrate import Calibration
from ..passes.quantize.given import GivenWeight
from ..passes.quantize.quantize import Quantize
from ..passes.quantize.recipe import Transform
from ..passes.quantize.smoothquant import SmoothQuant
from ..passes.quantize_kv_cache import QuantizeKVCache
from .config import CompileConfig

_TRANSFORMS: dict[Transform, type[SmoothQuant] | type[AWQ]] = {"smoothquant": SmoothQuant, "awq": AWQ}


def float_passes(
    config: CompileConfig,
    calibration: Calibration | None = None,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> list[Pass]:
    """Passes for both programs, as long as their weights are floating-point numbers."""
    passes: list[Pass] = [Canonicalize()]
    recipe = config.recipe
    if recipe is not None:
        for name in recipe.transforms:
            assert calibration is not None  # the recipe was checked
            passes += [_TRANSFORMS[name](recipe=recipe, calibration=calibration, on_progress=on_progress)]
    return passes


def quantize_passes(
    config: CompileConfig,
    calibration: Calibration | None = None,
    given: Mapping[str, GivenWeight] | None = None,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> list[Pass]:
    """Passes for both programs that choose codes for their weights. Between the two a budget chooses the schemes."""
    if config.recipe is None:
        return []
    return [Quantize(recipe=config.recipe, calibration=calibration, given=given or {}, on_progress=on_progress)]


def kernel_passes(config: CompileConfig, without: Collection[str] = ()) -> list[Pass]:
    """Passes for both programs that bring them into the form optc's CPU kernels run; none for other targets.

    `without` names fusions to leave out, which `benchmarks/fusions.py` does to see what each is worth.
    """
    if not config.uses_cpu_kernels:
        return []
    passes: list[Pass] = [MergeLinears(), FuseRmsNorm(), FuseSiluMul(), FuseRope(), PackWeights()]
    return [item for item in passes if item.name not in without]


def step_passes(config: CompileConfig, without: Collection[str] = ()) -> list[Pass]:
    """Passes that make the step program out of the shared graph; `without` as in `kernel_passes`."""
    passes: list[Pass] = [KVCache(), PagedAttention(), GatherLogits()]
    if config.recipe is not None and config.recipe.kv_cache is not None:
        passes += [QuantizeKVCache(dtype=config.recipe.kv_cache)]
    if config.uses_cpu_kernels:
        fusions: list[Pass] = [FuseRopeKVWrite(), FuseQuantize()]
        passes += [item for item in fusions if item.name not in without]
    return passes
