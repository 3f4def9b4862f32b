"""One op for the gate of a gated MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from .base import Pass, Result
from .graph import Program, arguments, call, replacing, value_of
from .match import FLOATS, operands

aten, optc = torch.ops.aten, torch.ops.optc


@dataclass(frozen=True, kw_only=True)
class FuseSiluMul(Pass):
    """silu(gate) * up  ->  optc.silu_mul(gate, up)
    gelu(gate) * up  ->  optc.gelu_mul(gate, up, tanh), tanh as gelu has it

    where both have the same shape and dtype, and the activation is used nowhere else. In 16 bits the result is rounded once,
    where the graph rounds two times.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})

    def apply(self, program: Program) -> Result:
        result = Result()
        for op in (aten.silu.default, aten.gelu.default):
            for activation in program.graph.find_nodes(op="call_function", target=op):
                _fuse(program, activation, result)
        return result


def _fuse(program: Program, activation: fx.Node, result: Result) -> None:
    product = next((user for user in activation.users if user.target is aten.mul.Tensor), None)
    factors = operands(product, aten.mul.Tensor)
    if product is None or factors is None:
        return  # no gate
    gate, up = activation.args[0], factors[1] if factors[0] is activation else factors[0]
    gated, upper = value_of(gate), value_of(up)
    if len(activation.users) > 1 or up is activation:
        result.decline(activation, "used elsewhere too")
    elif gated.shape != upper.shape or gated.dtype != upper.dtype or gated.dtype not in FLOATS:
        result.decline(
            activation, f"{gated.dtype} {tuple(gated.shape)} is multiplied by {upper.dtype} {tuple(upper.shape)}"
        )
    else:
        with replacing(program.graph, product) as new:
            if activation.target is aten.silu.default:
                new.append(call(program.graph, optc.silu_mul.default, gate, up))
            else:
                is_tanh = arguments(activation)["approximate"] == "tanh"
                new.append(call(program.graph, optc.gelu_mul.default, gate, up, is_tanh))
        result.matches += 1
