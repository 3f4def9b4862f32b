"""Turn stateless attention over one sequence into attention of packed tokens over the paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..runtime.manifest import TensorSpec
from .base import Pass, Result
from .graph import Program, add_input, call, input_node, replacing, value_of

aten, optc = torch.ops.aten, torch.ops.optc


@dataclass(frozen=True, kw_only=True)
class PagedAttention(Pass):
    """optc.attention(q [1, H, T, Dk], k, v, ...)  ->
    unsqueeze(optc.paged_attention(q [T, H, Dk], kv_cache.<layer>, block_table, query_start_loc, seq_lens, ...), 0)

    and the inputs `input_ids`, `positions` [1, T] -> [T]. Adds `block_table` i32[B, P], `query_start_loc` i32[Q] with
    Q = B + 1, and `seq_lens` i32[B]. From here on T tokens belong to B sequences.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"kv_cache"})
    provides: ClassVar[frozenset[str]] = frozenset({"paged"})

    def expected_matches(self, program: Program) -> int:
        return len(program.kv_cache)

    def apply(self, program: Program) -> Result:
        graph, result = program.graph, Result()
        _pack_inputs(program)
        # T was bounded by the length of one sequence; now it counts the tokens of all.
        program.symbols |= {"T": (1, 2**20), "B": (1, 2**16), "P": (1, 2**20), "Q": (2, 2**16 + 1)}
        block_table = add_input(program, TensorSpec(name="block_table", dtype="int32", shape=("B", "P")))
        query_start_loc = add_input(program, TensorSpec(name="query_start_loc", dtype="int32", shape=("Q",)))
        seq_lens = add_input(program, TensorSpec(name="seq_lens", dtype="int32", shape=("B",)))
        nodes = graph.find_nodes(op="call_function", target=optc.attention.default)
        for spec, node in zip(program.kv_cache, nodes, strict=True):
            q, _, v, scale, window, softcap, sinks, _ = node.args
            cache = input_node(program, spec.input_name)
            v_dim = int(value_of(v).shape[3])
            with replacing(graph, node) as new:
                queries = call(graph, aten.transpose.int, call(graph, aten.squeeze.dim, q, 0), 0, 1)
                where = (cache, block_table, query_start_loc, seq_lens)
                how = (v_dim, scale, window, softcap, sinks)
                out = call(graph, optc.paged_attention.default, queries, *where, *how)
                new.append(call(graph, aten.unsqueeze.default, out, 0))
            result.matches += 1
        return result


def _pack_inputs(program: Program) -> None:
    """[1, T] token inputs become [T]; the graph sees them as before through an unsqueeze."""
    graph = program.graph
    last = graph.find_nodes(op="placeholder")[-1]
    for name in ("input_ids", "positions"):
        node = input_node(program, name)
        position = next(i for i, spec in enumerate(program.inputs) if spec.name == name)
        program.inputs[position] = program.inputs[position].model_copy(update={"shape": ("T",)})
        with graph.inserting_after(last):
            batched = graph.call_function(aten.unsqueeze.default, (node, 0))
        for user in [user for user in node.users if user is not batched]:
            user.replace_input_with(node, batched)
