"""Remove what capture leaves behind, and spell each operation one way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from .base import Pass, Result
from .graph import Program, add_weight, arguments, call, get_weight, replacing, value_of

aten = torch.ops.aten
_LAST = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Canonicalize(Pass):
    """Rules, each applied wherever it holds:

    1. _assert_tensor_metadata(x), _guards_fn(...)      ->  nothing
    2. alias(x), detach(x), lift_fresh_copy(x), dropout(x, p, train=False)  ->  x
    3. _to_copy(x, dtype=x.dtype), mul(x, 1.0), slice(x, dim, 0, end)       ->  x
    4. scaled_dot_product_attention(q, k, v, is_causal=True)  ->  transpose(optc.attention(q, k, v), 1, 2)
    5. addmm(bias, x, weight)  ->  linear(x, weight transposed, bias)
    6. matmul(x, permute(weight, [1, 0]))  ->  linear(x, weight)
    """

    provides: ClassVar[frozenset[str]] = frozenset({"canonical"})

    def apply(self, program: Program) -> Result:
        result = Result()
        for node in list(program.graph.nodes):
            if node.op == "call_function" and (rule := _RULES.get(node.target)):
                result.matches += rule(program, node, result)
            elif node.op == "call_module" and not node.users:  # the guards that export adds to a module
                program.graph.erase_node(node)
                result.matches += 1
        return result


def _erase(program: Program, node: fx.Node, result: Result) -> int:
    if node.users:
        result.decline(node, "its value is used")
        return 0
    program.graph.erase_node(node)
    return 1


def _forward_input(program: Program, node: fx.Node, result: Result) -> int:
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    program.graph.erase_node(node)
    return 1


def _dropout(program: Program, node: fx.Node, result: Result) -> int:
    if arguments(node)["train"]:
        result.decline(node, "dropout in training mode")
        return 0
    return _forward_input(program, node, result)


def _same_dtype_copy(program: Program, node: fx.Node, result: Result) -> int:
    changes_only_dtype = set(node.kwargs) <= {"dtype", "layout", "device", "pin_memory", "non_blocking"}
    if changes_only_dtype and value_of(node).dtype == value_of(node.args[0]).dtype:
        return _forward_input(program, node, result)
    return 0


def _times_one(program: Program, node: fx.Node, result: Result) -> int:
    factor, dtype = arguments(node)["other"], value_of(node).dtype
    if (
        isinstance(factor, int | float)
        and factor == 1
        and dtype.is_floating_point
        and dtype == value_of(node.args[0]).dtype
    ):
        return _forward_input(program, node, result)
    return 0


def _whole_slice(program: Program, node: fx.Node, result: Result) -> int:
    given = arguments(node)
    whole = given["start"] in (0, None) and given["end"] in (_LAST, None) and given["step"] == 1
    return _forward_input(program, node, result) if whole else 0


def _causal_sdpa(program: Program, node: fx.Node, result: Result) -> int:
    given = arguments(node)
    q, k, v = given["query"], given["key"], given["value"]
    reason = None
    if given["attn_mask"] is not None or not given["is_causal"]:
        reason = "attention with an explicit mask, or not causal"
    elif given["dropout_p"] != 0.0:
        reason = "attention with dropout"
    elif value_of(q).dim() != 4 or value_of(q).shape[2] != value_of(k).shape[2]:
        reason = f"attention over {tuple(value_of(q).shape)} and {tuple(value_of(k).shape)}"
    if reason:
        result.decline(node, reason)
        return 0
    scale = float(value_of(q).shape[-1]) ** -0.5 if given["scale"] is None else given["scale"]
    layer = len(program.graph.find_nodes(op="call_function", target=torch.ops.optc.attention.default))
    with replacing(program.graph, node) as new:
        out = call(program.graph, torch.ops.optc.attention.default, q, k, v, scale, 0, 0.0, None, layer)
        new.append(call(program.graph, aten.transpose.int, out, 1, 2))
    return 1


def _addmm(program: Program, node: fx.Node, result: Result) -> int:
    bias, x, weight = node.args
    assert isinstance(weight, fx.Node)
    if weight.op != "get_attr" or node.kwargs or value_of(bias).dim() != 1:
        result.decline(node, "addmm of computed operands")
        return 0
    name = f"{weight.target}_transposed"
    with replacing(program.graph, node) as new:
        if name not in program.sources:
            source = program.sources.get(str(weight.target), str(weight.target))
            value = get_weight(program.module, str(weight.target)).detach().t().contiguous()
            add_weight(program, name, value, source, layout="transposed")
        new.append(call(program.graph, aten.linear.default, x, program.graph.get_attr(name), bias))
    return 1


def _matmul(program: Program, node: fx.Node, result: Result) -> int:
    x, other = node.args
    assert isinstance(x, fx.Node) and isinstance(other, fx.Node)
    weight = other.args[0] if other.target is aten.permute.default and other.args[1] == [1, 0] else None
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return 0  # a product of two computed values
    with replacing(program.graph, node) as new:
        new.append(call(program.graph, aten.linear.default, x, weight))
    return 1


_RULES: dict[object, Callable[[Program, fx.Node, Result], int]] = {
    aten._assert_tensor_metadata.default: _erase,
    aten.alias.default: _forward_input,
    aten.detach.default: _forward_input,
    aten.detach_.default: _forward_input,
    aten.lift_fresh_copy.default: _forward_input,
    aten.dropout.default: _dropout,
    aten._to_copy.default: _same_dtype_copy,
    aten.mul.Tensor: _times_one,
    aten.slice.Tensor: _whole_slice,
    aten.scaled_dot_product_attention.default: _causal_sdpa,
    aten.addmm.default: _addmm,
    aten.matmul.default: _matmul,
}
