"""Let what makes the input of quantized linear layers round it, once for all of them."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from .base import Pass, Result
from .graph import Program, arguments, call, value_of

optc = torch.ops.optc

_ROUNDED = {
    optc.rms_norm.default: optc.rms_norm_a8.default,
    optc.add_rms_norm.default: optc.add_rms_norm_a8.default,
    optc.silu_mul.default: optc.silu_mul_a8.default,
    optc.gelu_mul.default: optc.gelu_mul_a8.default,
}


@dataclass(frozen=True, kw_only=True)
class FuseQuantize(Pass):
    """x = optc.rms_norm(...), or add_rms_norm, silu_mul, gelu_mul; optc.linear_packed(x, ..., activation) once or more
    ->  codes, steps = optc.rms_norm_a8(..., activation); optc.linear_packed_a8(codes, steps, ..., activation)

    where x goes nowhere else, and all round it alike: to int8, with a step for each row or for each group of columns.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})

    def apply(self, program: Program) -> Result:
        result = Result()
        for op, rounded in _ROUNDED.items():
            for node in program.graph.find_nodes(op="call_function", target=op):
                x = _item(node, 0) if op is optc.add_rms_norm.default else node
                if x is None:
                    continue
                activation = _activation(x)
                if activation is None:
                    continue  # not rounded, or not to int8
                if reason := _why_not(x, activation):
                    result.decline(node, reason)
                    continue
                _fuse(program, node, x, rounded, activation)
                result.matches += 1
        return result


def _item(node: fx.Node, index: int) -> fx.Node | None:
    """What takes this result of a node that has several."""
    return next((user for user in node.users if user.target is operator.getitem and user.args[1] == index), None)


def _activation(x: fx.Node) -> str | None:
    """How the first packed linear layer that takes x rounds it, if to int8 and by what x is."""
    for user in x.users:
        if user.target is optc.linear_packed.default and user.args[0] is x:
            activation = arguments(user)["activation"]
            if activation == "int8-token" or activation.startswith("int8-group"):
                return str(activation)
    return None


def _why_not(x: fx.Node, activation: str) -> str | None:
    for user in x.users:
        if user.target is not optc.linear_packed.default:
            return f"{user.name} ({user.target}) takes it as it is"
        given = arguments(user)
        if given["activation"] != activation:
            return f"{user.name} rounds it by {given['activation']}, another layer by {activation}"
        if given["scale"] is None:
            return f"the weight of {user.name} is not quantized"
    return None


def _fuse(program: Program, node: fx.Node, x: fx.Node, op: Any, activation: str) -> None:
    graph = program.graph
    with graph.inserting_before(node):
        rounded = call(graph, op, *node.args, activation)
        rounded.meta = {key: value for key, value in node.meta.items() if key != "val"}
        codes, steps = (graph.call_function(operator.getitem, (rounded, i)) for i in range(2))
        if (total := _item(node, 1)) is not None and x is not node:
            new_total = graph.call_function(operator.getitem, (rounded, 2))
            new_total.meta = dict(total.meta)
            total.replace_all_uses_with(new_total)
    for linear in list(x.users):
        given = arguments(linear)
        with graph.inserting_before(linear):
            what = [given[name] for name in ("weight", "scale", "zero", "bias", "outputs", "bits", "group")]
            new = call(graph, optc.linear_packed_a8.default, codes, steps, *what, value_of(linear).dtype, activation)
        new.meta = dict(linear.meta)
        linear.replace_all_uses_with(new)
        graph.erase_node(linear)
