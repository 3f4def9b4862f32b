"""One op for the rotary position embedding of a layer's queries and keys."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from .base import Pass, Result
from .graph import Program, arguments, call, value_of
from .match import FLOATS, cast_input, operands, slice_of_last

aten, optc = torch.ops.aten, torch.ops.optc

LARGEST_HEAD = 1024
"""The kernels keep a head on the stack."""


@dataclass(frozen=True, kw_only=True)
class FuseRope(Pass):
    """In optc.attention(q', k', v, ...) with q', k' both of the form

    x * cos4 + cat([-x[..., R/2:], x[..., :R/2]], -1) * sin4,  cos4 and sin4 [1, 1, T, R] = unsqueeze(cos or sin [1, T, R], 1),

    or that for x = X[..., :R] and then cat([..., X[..., R:]], -1):  q', k'  ->  optc.rope(q, k, cos, sin)

    The same cos and sin for both; how they are computed stays as it is. The arithmetic may be in float32 between casts. Other
    forms, such as the one that turns neighbours, are left alone.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})

    def apply(self, program: Program) -> Result:
        result = Result()
        for node in program.graph.find_nodes(op="call_function", target=optc.attention.default):
            q, k = node.args[:2]
            rotated_q, rotated_k = _rotation(q), _rotation(k)
            if isinstance(rotated_q, str) or isinstance(rotated_k, str):
                if not _is_plain(q) or not _is_plain(k):
                    reasons = [f"{x}: {why}" for x, why in ((q, rotated_q), (k, rotated_k)) if isinstance(why, str)]
                    result.decline(node, "; ".join(reasons))
            elif reason := _fuse(program, rotated_q, rotated_k):
                result.decline(node, reason)
            else:
                result.matches += 1
        return result


@dataclass(frozen=True)
class _Rotation:
    """`out` is `x` [B, H, T, D] rotated."""

    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    out: fx.Node


def _is_plain(node: Any) -> bool:
    """Whether a head comes out of a projection as it stands: the layer has no positions."""
    while isinstance(node, fx.Node) and node.target in (aten.transpose.int, aten.view.default, aten.reshape.default):
        node = node.args[0]
    return isinstance(node, fx.Node) and node.target not in _COMBINES and cast_input(node) is None


_COMBINES = (aten.add.Tensor, aten.sub.Tensor, aten.cat.default, aten.view_as_real.default)


def _rotation(out: Any) -> _Rotation | str:
    """The rotation that ends in `out`, or why it is none."""
    if not isinstance(out, fx.Node) or value_of(out).dim() != 4:
        return "not of four dimensions"
    dtype, dim = value_of(out).dtype, value_of(out).shape[-1]
    if dtype not in FLOATS or not isinstance(dim, int) or dim > LARGEST_HEAD:
        return f"heads of {dim} numbers in {dtype}"
    node, whole = out, None
    if node.target is aten.cat.default:  # of what is rotated and the rest
        parts, axis = node.args[0], arguments(node)["dim"]
        if not isinstance(parts, list | tuple) or len(parts) != 2 or axis % 4 != 3:
            return "a concatenation, but not of rotated and other columns"
        rest = slice_of_last(parts[1])
        if rest is None or rest[2] != dim:
            return "a concatenation whose end is not the end of a head"
        whole = rest[0]
        assert isinstance(parts[0], fx.Node)
        node = parts[0]
    node = cast_input(node) or node
    found = _halves(node)
    if isinstance(found, str):
        return found
    x, cos, sin = found
    narrow = cast_input(x)
    if whole is not None:
        sliced = slice_of_last(narrow if narrow is not None else x)
        width = value_of(x).shape[-1]
        if (x is not whole and sliced != (whole, 0, width)) or rest[1] != width:  # type: ignore[index]
            return "the columns that are rotated and the others are not of one head"
        x, narrow = whole, None
    if narrow is not None and value_of(narrow).dtype == dtype:
        x = narrow
    if value_of(x).dtype != dtype or value_of(x).shape != value_of(out).shape:
        return f"heads in {value_of(x).dtype} become {dtype}"
    angles = [value_of(angle) for angle in (cos, sin)]
    if angles[0].shape != angles[1].shape or any(a.dtype not in (dtype, torch.float32) for a in angles):
        return "cosines and sines of different shapes, or of another dtype"
    if angles[0].dtype != angles[1].dtype:
        return "cosines and sines of different dtypes"
    return _Rotation(x, cos, sin, out)


def _halves(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | str:
    """The x, cos [B, T, R] and sin of  x * cos + turned(x) * sin."""
    terms = operands(node, aten.add.Tensor)
    if terms is None:
        return f"{node.name} ({node.target}) is not the sum of two rotated halves"
    for straight, crossed in (terms, terms[::-1]):
        first, second = operands(straight, aten.mul.Tensor), operands(crossed, aten.mul.Tensor)
        if first is None or second is None:
            continue
        for turned, sin in (second, second[::-1]):
            x = _turned(turned)
            if x is None or x not in first:
                continue
            cos = first[1] if first[0] is x else first[0]
            angles = [_angles(angle, value_of(x)) for angle in (cos, sin)]
            if angles[0] is None or angles[1] is None:
                return "cosines and sines are not the same for all heads"
            return x, angles[0], angles[1]
    return f"{node.name} does not turn one half of a head against the other"


def _turned(node: fx.Node) -> fx.Node | None:
    """The x of  cat([-x[..., R/2:], x[..., :R/2]], -1)."""
    if node.target is not aten.cat.default or not isinstance(node.args[0], list | tuple) or len(node.args[0]) != 2:
        return None
    first, second = node.args[0]
    if arguments(node)["dim"] % value_of(node).dim() != value_of(node).dim() - 1:
        return None
    if not isinstance(first, fx.Node) or first.target is not aten.neg.default:
        return None
    upper, lower = slice_of_last(first.args[0]), slice_of_last(second)
    if upper is None or lower is None or upper[0] is not lower[0]:
        return None
    x, width = upper[0], value_of(upper[0]).shape[-1]
    return x if upper[1:] == (width // 2, width) and lower[1:] == (0, width // 2) and width % 2 == 0 else None


def _angles(node: fx.Node, x: torch.Tensor) -> fx.Node | None:
    """The [B, T, R] behind  unsqueeze(., 1), as wide as x [B, H, T, R]."""
    if node.target is not aten.unsqueeze.default or not isinstance(node.args[0], fx.Node):
        return None
    value = value_of(node.args[0])
    if value.dim() != 3 or node.args[1] not in (1, -3) or tuple(value.shape) != (x.shape[0], x.shape[2], x.shape[3]):
        return None
    return node.args[0]


def _fuse(program: Program, q: _Rotation, k: _Rotation) -> str | None:
    """Rewrite both; or why not."""
    if (q.cos, q.sin) != (k.cos, k.sin):
        return "queries and keys are turned by different angles"
    if value_of(q.x).dtype != value_of(k.x).dtype or value_of(q.x).shape[-1] != value_of(k.x).shape[-1]:
        return "queries and keys are of different dtypes or widths"
    last = max(q.out, k.out)
    if any(user < last for out in (q.out, k.out) for user in out.users if user is not last):
        return "one is used before the other is there"
    graph = program.graph
    with graph.inserting_before(last):
        fused = call(graph, optc.rope.default, q.x, k.x, q.cos, q.sin)
        new = [graph.call_function(operator.getitem, (fused, i)) for i in range(2)]
    for rotation, rotated in zip((q, k), new, strict=True):
        rotated.meta = dict(rotation.out.meta)
        rotation.out.replace_all_uses_with(rotated)
        graph.erase_node(rotation.out)
    fused.meta = {key: value for key, value in q.out.meta.items() if key != "val"}
    fused.meta["val"] = tuple(value_of(node) for node in new)
    return None
