"""Give every attention layer a paged KV cache and write this step's keys and values into it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..errors import PassError
from ..runtime.manifest import KVCacheSpec, TensorSpec
from .base import Pass, Result
from .graph import Program, add_input, call, value_of

aten, optc = torch.ops.aten, torch.ops.optc


@dataclass(frozen=True, kw_only=True)
class KVCache(Pass):
    """optc.attention(q, k, v, ..., layer)  ->  the same, after
    optc.kv_cache_write(k [T, KV, Dk], v [T, KV, Dv], kv_cache.<layer>, slot_mapping)

    Adds the inputs `slot_mapping` i64[T] and one `kv_cache.<layer>` [N, KV, S, Dk + Dv] for each layer, in the dtype of
    its keys, and records the geometry. The symbol N is the number of blocks, S the block size.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    provides: ClassVar[frozenset[str]] = frozenset({"kv_cache"})

    def expected_matches(self, program: Program) -> int:
        return len(program.graph.find_nodes(op="call_function", target=optc.attention.default))

    def apply(self, program: Program) -> Result:
        result = Result()
        program.symbols |= {"N": (1, 2**24), "S": (1, 1024)}
        slots = add_input(program, TensorSpec(name="slot_mapping", dtype="int64", shape=("T",)))
        for layer, node in enumerate(program.graph.find_nodes(op="call_function", target=optc.attention.default)):
            _, k, v, _, window, *_ = node.args
            key, value = value_of(k), value_of(v)
            if key.dtype != value.dtype:
                raise PassError(f"layer {layer} has keys in {key.dtype} and values in {value.dtype}")
            spec = KVCacheSpec(
                layer=layer,
                kv_heads=int(key.shape[1]),
                k_dim=int(key.shape[3]),
                v_dim=int(value.shape[3]),
                window=int(window),
                dtype=str(key.dtype).removeprefix("torch."),
            )
            program.kv_cache.append(spec)
            shape = ("N", spec.kv_heads, "S", spec.row_size)
            cache = add_input(program, TensorSpec(name=spec.input_name, dtype=spec.dtype, shape=shape))
            with program.graph.inserting_before(node):
                keys, values = (
                    call(program.graph, aten.transpose.int, call(program.graph, aten.squeeze.dim, x, 0), 0, 1)
                    for x in (k, v)
                )
                call(program.graph, optc.kv_cache_write.default, keys, values, cache, slots)
            result.matches += 1
        return result
