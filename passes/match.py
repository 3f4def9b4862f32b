"""What the fusion passes ask of a node, however it is spelled: a cast, a product, a slice, a weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .graph import arguments, value_of

aten = torch.ops.aten

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What the fused ops compute on."""

_LAST = 2**62


def is_tensor(node: Any) -> bool:
    """Whether the operand is a node that gives one tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor)


def cast_input(node: Any) -> fx.Node | None:
    """What a node that changes the dtype and nothing else changes it of; None for any other node."""
    if not is_tensor(node) or node.op != "call_function":
        return None
    if node.target is aten._to_copy.default:
        is_cast = all(value is None for key, value in node.kwargs.items() if key not in ("dtype", "layout", "device"))
    else:
        is_cast = node.target in (aten.to.dtype, aten.type_as.default)
    x = node.args[0] if is_cast else None
    if not isinstance(x, fx.Node) or value_of(x).device != value_of(node).device:
        return None
    return x


def operands(node: Any, op: Any) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors that a product (`aten.mul.Tensor`) or a sum (`aten.add.Tensor`) is made of."""
    if not isinstance(node, fx.Node) or node.target is not op:
        return None
    given = arguments(node)
    a, b = given["self"], given["other"]
    return (a, b) if is_tensor(a) and is_tensor(b) and given.get("alpha", 1) == 1 else None


def plus_number(node: Any) -> tuple[fx.Node, float] | None:
    """The tensor and the number of a sum of both, in either order."""
    if not isinstance(node, fx.Node) or node.target not in (aten.add.Tensor, aten.add.Scalar):
        return None
    given = arguments(node)
    x, number = given["self"], given["other"]
    if isinstance(x, int | float):
        x, number = number, x
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    return (x, float(number)) if is_tensor(x) and is_number and given["alpha"] == 1 else None


def slice_of_last(node: Any) -> tuple[fx.Node, int, int] | None:
    """The tensor that a node takes adjacent elements of the last dimension from, the first and the one after the last."""
    if not isinstance(node, fx.Node) or node.target is not aten.slice.Tensor:
        return None
    given = arguments(node)
    x = given["self"]
    dims, size = value_of(x).dim(), value_of(x).shape[-1]
    start, end = given["start"] or 0, _LAST if given["end"] is None else given["end"]
    bounds = (start, end, size)
    if given["dim"] % dims != dims - 1 or given["step"] != 1 or not all(isinstance(bound, int) for bound in bounds):
        return None
    start, end = (bound + size if bound < 0 else bound for bound in (start, end))
    return x, min(start, size), min(end, size)


def weight_plus(node: Any, channels: Any) -> tuple[fx.Node, float] | str:
    """The weight [channels] that an operand is, and the number that is added to it in float32; or why it is none."""
    offset = 0.0
    while is_tensor(node) and node.op == "call_function":
        if (inner := cast_input(node)) is not None:
            if value_of(node).dtype != torch.float32:
                return f"{node.name} rounds the weight to {value_of(node).dtype}"
            node = inner
        elif (found := plus_number(node)) is not None and offset == 0.0:
            if value_of(node).dtype != torch.float32:
                return f"{node.name} adds to the weight in {value_of(node).dtype}"
            node, offset = found
        else:
            return f"{node.name} ({node.target}) is no weight"
    if not is_tensor(node) or node.op != "get_attr":
        return f"{node} is no weight"
    if tuple(value_of(node).shape) != (channels,):
        return f"{node.target} has shape {tuple(value_of(node).shape)}, expected ({channels},)"
    return node, offset
