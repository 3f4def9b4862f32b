"""One op for an RMSNorm, and for the sum that it normalizes."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from .base import Pass, Result
from .graph import Program, arguments, call, replacing, value_of
from .match import FLOATS, cast_input, operands, plus_number, weight_plus

aten, optc = torch.ops.aten, torch.ops.optc


@dataclass(frozen=True, kw_only=True)
class FuseRmsNorm(Pass):
    """Rules, the first wherever it holds, then the second:

    1. y = x32 * rsqrt(mean(x32 ** 2, -1, keepdim) + eps), or ** -0.5 for rsqrt, with x32 = x in float32, and then one of
       weight * y in x's dtype  |  (weight * y) in x's dtype  |  (y * (1 + weight)) in x's dtype  |  aten.rms_norm(x, [D], weight, eps)
       ->  optc.rms_norm(x, weight, eps, 0 or 1)
    2. sum = a + b; optc.rms_norm(sum, ...)  ->  normed, sum = optc.add_rms_norm(a, b, ...)

    The weight is a parameter [D]. A mean that is subtracted, another dimension, another precision or no weight: left alone.
    In 16 bits the result is rounded once, where the graph may have rounded two times.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})

    def apply(self, program: Program) -> Result:
        result = Result()
        for node in program.graph.find_nodes(op="call_function", target=aten.rms_norm.default):
            _finish(program, _torch_norm(node), node, result)
        for node in _inverse_roots(program):
            _finish(program, _norm(node), node, result)
        for node in program.graph.find_nodes(op="call_function", target=optc.rms_norm.default):
            _fuse_sum(program, node)
        return result


def _inverse_roots(program: Program) -> list[fx.Node]:
    """The nodes rsqrt(x), however they are spelled."""
    powers = program.graph.find_nodes(op="call_function", target=aten.pow.Tensor_Scalar)
    roots = program.graph.find_nodes(op="call_function", target=aten.rsqrt.default)
    return [*roots, *(node for node in powers if node.args[1] == -0.5)]


@dataclass(frozen=True)
class _Norm:
    """`out` is the norm of `x`."""

    x: fx.Node
    weight: fx.Node
    eps: float
    offset: float
    out: fx.Node


def _finish(program: Program, found: _Norm | str, node: fx.Node, result: Result) -> None:
    if isinstance(found, str):
        result.decline(node, found)
        return
    with replacing(program.graph, found.out) as new:
        new.append(call(program.graph, optc.rms_norm.default, found.x, found.weight, found.eps, found.offset))
    result.matches += 1


def _torch_norm(node: fx.Node) -> _Norm | str:
    given = arguments(node)
    x, channels = given["input"], value_of(given["input"]).shape[-1]
    if list(given["normalized_shape"]) != [channels]:
        return f"a norm over {given['normalized_shape']}"
    if given["weight"] is None or not isinstance(given["eps"], float):
        return "a norm without a weight, or with the eps of its dtype"
    weight = weight_plus(given["weight"], channels)
    if isinstance(weight, str):
        return weight
    return _checked(_Norm(x, weight[0], given["eps"], weight[1], node))


def _norm(rsqrt: fx.Node) -> _Norm | str:
    """The norm that an inverse root belongs to, or why it belongs to none."""
    inner = plus_number(rsqrt.args[0])
    if inner is None:
        return f"{rsqrt.args[0]} is not a mean plus a number"
    mean, eps = inner
    squares = mean.args[0] if mean.target is aten.mean.dim else None
    if not isinstance(squares, fx.Node):
        return f"{mean.name} ({mean.target}) is no mean"
    given, dims = arguments(mean), value_of(squares).dim()
    if [d % dims for d in given["dim"]] != [dims - 1] or not given["keepdim"] or given["dtype"] is not None:
        return "a mean over other dimensions than the last, or not kept"
    wide = _squared(squares)
    if wide is None:
        return f"{squares.name} ({squares.target}) is no square"
    if value_of(wide).dtype != torch.float32:
        return f"computed in {value_of(wide).dtype}"
    if wide.target is aten.sub.Tensor and any(getattr(x, "target", None) is aten.mean.dim for x in wide.args):
        return "the mean is subtracted: a LayerNorm"
    narrow = cast_input(wide)
    x = narrow if narrow is not None and value_of(narrow).dtype in FLOATS else wide
    product = _only_user(rsqrt)
    factors = operands(product, aten.mul.Tensor)
    if product is None or factors is None or wide not in factors:
        return f"what is multiplied by it is not {wide.name}, which was squared"
    return _with_weight(x, product, eps)


def _squared(node: fx.Node) -> fx.Node | None:
    if node.target is aten.pow.Tensor_Scalar and node.args[1] == 2 and isinstance(node.args[0], fx.Node):
        return node.args[0]
    if node.target is aten.square.default and isinstance(node.args[0], fx.Node):
        return node.args[0]
    factors = operands(node, aten.mul.Tensor)
    return factors[0] if factors and factors[0] is factors[1] else None


def _with_weight(x: fx.Node, normed: fx.Node, eps: float) -> _Norm | str:
    """From `normed`, f32, past casts and the weight to the end of the norm."""
    dtype, channels = value_of(x).dtype, value_of(x).shape[-1]
    node = _only_user(normed)
    if node is not None and cast_input(node) is normed and value_of(node).dtype == dtype:
        normed, node = node, _only_user(node)
    factors = operands(node, aten.mul.Tensor)
    if node is None or factors is None:
        return "no weight, or what it multiplies is used elsewhere"
    weight = weight_plus(factors[1] if factors[0] is normed else factors[0], channels)
    if isinstance(weight, str):
        return weight
    if value_of(node).dtype != dtype:
        cast = _only_user(node)
        if cast is None or cast_input(cast) is not node:
            return f"its result stays in {value_of(node).dtype}, and its input is in {dtype}"
        node = cast
    cast = _only_user(node)
    if cast is not None and cast_input(cast) is node and value_of(cast).dtype == dtype:
        node = cast  # in float32 the last cast changes nothing
    return _checked(_Norm(x, weight[0], eps, weight[1], node))


def _checked(found: _Norm) -> _Norm | str:
    x, weight, out = (value_of(node) for node in (found.x, found.weight, found.out))
    if x.dtype not in FLOATS or out.dtype != x.dtype or weight.dtype not in (x.dtype, torch.float32):
        return f"{x.dtype} by a weight in {weight.dtype} gives {out.dtype}"
    if out.shape != x.shape:
        return f"the weight spreads {tuple(x.shape)} to {tuple(out.shape)}"
    return found


def _only_user(node: fx.Node | None) -> fx.Node | None:
    users = list(node.users) if node is not None else []
    return users[0] if len(users) == 1 else None


def _fuse_sum(program: Program, norm: fx.Node) -> None:
    """Rule 2, if the norm's input is a sum."""
    graph = program.graph
    total, weight, eps, offset = norm.args
    parts = operands(total, aten.add.Tensor)
    if parts is None or not isinstance(total, fx.Node) or not isinstance(weight, fx.Node):
        return
    value = value_of(total)
    if any(value_of(part).shape != value.shape or value_of(part).dtype != value.dtype for part in parts):
        return
    with graph.inserting_before(total):
        fused = call(graph, optc.add_rms_norm.default, *parts, graph.get_attr(str(weight.target)), eps, offset)
        normed, summed = (graph.call_function(operator.getitem, (fused, i)) for i in range(2))
    for old, new in ((norm, normed), (total, summed)):
        new.meta = dict(old.meta)
        old.replace_all_uses_with(new)
        graph.erase_node(old)
    fused.meta = {key: value for key, value in norm.meta.items() if key != "val"}
    fused.meta["val"] = (value_of(normed), value_of(summed))
