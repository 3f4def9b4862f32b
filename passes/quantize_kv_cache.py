"""Store the keys and values of the KV cache in 8 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..errors import PassError
from .base import Pass, Result
from .graph import Program, input_node

optc = torch.ops.optc

DTYPES = {"int8": "int8", "fp8": "float8_e4m3fn"}


@dataclass(frozen=True, kw_only=True)
class QuantizeKVCache(Pass):
    """input kv_cache.<layer> [N, KV, S, Dk + Dv] of a float dtype  ->  [N, KV, S, Dk + Dv + 8] of int8 or float8_e4m3fn

    in every layer. No node changes: optc.kv_cache_write and optc.paged_attention go by the dtype of the cache.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"paged"})
    provides: ClassVar[frozenset[str]] = frozenset({"quantized_kv_cache"})
    # A lossy rewrite: a rounding may change which experts a router picks. No weights stand for it, so the check only finds
    # logits that are not finite or have nothing to do with those before; `optc eval` says how good they are.
    tolerance: ClassVar[float] = 4.0

    dtype: Literal["int8", "fp8"]

    def expected_matches(self, program: Program) -> int:
        return len(program.kv_cache)

    def apply(self, program: Program) -> Result:
        """Raises PassError: a cache is quantized already, or an op uses it that knows nothing of codes."""
        result = Result()
        positions = {spec.name: i for i, spec in enumerate(program.inputs)}
        for layer, spec in enumerate(program.kv_cache):
            if spec.dtype in DTYPES.values():
                raise PassError(f"{spec.input_name} is quantized already, to {spec.dtype}")
            for user in input_node(program, spec.input_name).users:
                if user.target not in (optc.kv_cache_write.default, optc.paged_attention.default):
                    raise PassError(
                        f"{spec.input_name} is used by {user.name} ({user.target}), which does not read quantized caches"
                    )
            quantized = spec.model_copy(update={"dtype": DTYPES[self.dtype]})
            program.kv_cache[layer] = quantized
            position = positions[spec.input_name]
            given = program.inputs[position]
            program.inputs[position] = given.model_copy(
                update={"dtype": quantized.dtype, "shape": (*given.shape[:3], quantized.row_size)}
            )
            result.matches += 1
        return result
