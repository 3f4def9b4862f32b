"""Compute logits only for the rows that are wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ..runtime.manifest import TensorSpec
from .base import Pass, Result
from .graph import Program, add_input, call, value_of

aten = torch.ops.aten
# One row of the result depends on the same row of the first argument alone, and the shape stays.
_ROW_WISE = {
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.add.Tensor,
    aten.tanh.default,
    aten._to_copy.default,
    aten.clone.default,
}
_LINEARS = (aten.linear.default, torch.ops.optc.linear_quantized.default, torch.ops.optc.linear_packed.default)


@dataclass(frozen=True, kw_only=True)
class GatherLogits(Pass):
    """logits = row_wise(linear(hidden [1, T, D])), or of a quantized linear layer  ->
    logits = select(row_wise(linear(index_select(hidden, 1, logits_indices))), 0, 0) in float32

    Adds `logits_indices` i64[L]; the output becomes `logits` f32[L, V]. Where the way back from the output does not end
    at a linear layer, the rows are taken at the end instead and the pass says so.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"paged"})
    provides: ClassVar[frozenset[str]] = frozenset({"step"})

    def apply(self, program: Program) -> Result:
        graph, result = program.graph, Result()
        program.symbols["L"] = (1, 2**20)
        indices = add_input(program, TensorSpec(name="logits_indices", dtype="int64", shape=("L",)))
        output = graph.output_node()
        logits = output.args[0][0]  # type: ignore[index]
        assert isinstance(logits, fx.Node)
        head = _find_head(logits)
        with graph.inserting_before(head or output):
            if head is not None:
                rows = call(graph, aten.index_select.default, head.args[0], 1, indices)
                head.update_arg(0, rows)
            else:
                result.decline(
                    logits, f"logits come from {logits.target}, not from a linear layer; rows are taken at the end"
                )
                logits = call(graph, aten.index_select.default, logits, 1, indices)
        with graph.inserting_before(output):
            flat = call(graph, aten.select.int, logits, 0, 0)
            output.args = ((call(graph, aten._to_copy.default, flat, dtype=torch.float32),),)
        program.outputs = ("logits",)
        result.matches = int(head is not None)
        return result


def _find_head(logits: fx.Node) -> fx.Node | None:
    """The linear layer that `logits` [1, T, V] come from through row-wise operations alone."""
    node = logits
    while node.target in _ROW_WISE and isinstance(node.args[0], fx.Node):
        others = [argument for argument in node.args[1:] if isinstance(argument, fx.Node)]
        # Only a weight is surely the same for every row; a computed operand may be made of all of them.
        if any(other.op != "get_attr" or value_of(other).dim() > 1 for other in others):
            return None
        node = node.args[0]
    is_linear = node.target in _LINEARS
    return node if is_linear and value_of(node).dim() == 3 else None
