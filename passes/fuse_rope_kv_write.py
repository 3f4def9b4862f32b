"""One op for all that happens to queries, keys and values between their projection and attention."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from .base import Pass, Result
from .fuse_rope import LARGEST_HEAD
from .graph import Program, call, value_of

aten, optc = torch.ops.aten, torch.ops.optc


@dataclass(frozen=True, kw_only=True)
class FuseRopeKVWrite(Pass):
    """q', k' = optc.rope(q, k, cos, sin); optc.kv_cache_write(packed(k'), v, kv_cache, slots); packed(q')
    ->  optc.rope_kv_write(packed(q), packed(k), v, squeeze(cos), squeeze(sin), none, none, ..., kv_cache, slots)

    where packed(x) = transpose(squeeze(x, 0), 0, 1). If q and k are optc.rms_norm of heads, with the same eps and offset and used
    nowhere else, the norms go in too, before or after the transposition to [1, H, T, D].
    """

    requires: ClassVar[frozenset[str]] = frozenset({"paged"})

    def apply(self, program: Program) -> Result:
        result = Result()
        for node in program.graph.find_nodes(op="call_function", target=optc.kv_cache_write.default):
            rope = _rope_of(node.args[0])
            if rope is None:
                continue  # keys that are not rotated
            if isinstance(rope, str):
                result.decline(node, rope)
                continue
            if value_of(node.args[1]).shape[-1] > LARGEST_HEAD:
                result.decline(node, f"values of {value_of(node.args[1]).shape[-1]} numbers")
                continue
            outputs = {user.args[1]: user for user in rope.users}
            if set(outputs) != {0, 1} or len(outputs[1].users) != 1:
                result.decline(node, "the rotated keys are used elsewhere too")
                continue
            queries = _packed_user(outputs[0])
            if queries is None or queries < node:
                result.decline(node, "the rotated queries are not those of packed tokens alone")
                continue
            _fuse(program, node, rope, queries)
            result.matches += 1
        return result


def _rope_of(keys: Any) -> fx.Node | str | None:
    """The optc.rope that keys [T, KV, D] come from through `packed`."""
    if not isinstance(keys, fx.Node) or keys.target is not aten.transpose.int or list(keys.args[1:]) != [0, 1]:
        return None
    squeezed = keys.args[0]
    if not isinstance(squeezed, fx.Node) or squeezed.target is not aten.squeeze.dim or squeezed.args[1] != 0:
        return None
    item = squeezed.args[0]
    if not isinstance(item, fx.Node) or item.target is not operator.getitem or not isinstance(item.args[0], fx.Node):
        return None
    rope = item.args[0]
    if rope.target is not optc.rope.default or item.args[1] != 1:
        return None
    return rope if len(keys.users) == 1 else "the packed keys are used elsewhere too"


def _packed_user(node: fx.Node) -> fx.Node | None:
    """The node `packed(node)`, if nothing else uses `node`."""
    for target, args in ((aten.squeeze.dim, [0]), (aten.transpose.int, [0, 1])):
        users = list(node.users)
        if len(users) != 1 or users[0].target is not target or list(users[0].args[1:]) != args:
            return None
        node = users[0]
    return node


def _fuse(program: Program, write: fx.Node, rope: fx.Node, queries: fx.Node) -> None:
    graph = program.graph
    q, k, cos, sin = rope.args
    _, v, kv_cache, slots = write.args
    norms = (_head_norm(q), _head_norm(k))
    weights: tuple[Any, Any] = (None, None)
    how: tuple[Any, Any] = (0.0, 0.0)
    if norms[0] is not None and norms[1] is not None and norms[0].args[2:] == norms[1].args[2:]:
        weights = (norms[0].args[1], norms[1].args[1])
        how = (norms[0].args[2], norms[0].args[3])
    with graph.inserting_before(write):
        heads = (_packed(graph, x, skipped=norm if weights[0] else None) for x, norm in zip((q, k), norms, strict=True))
        angles = (_squeezed(graph, angle) for angle in (cos, sin))
        inputs = (*heads, v, *angles, *weights, *how, kv_cache, slots)
        fused = call(graph, optc.rope_kv_write.default, *inputs)
        fused.meta = dict(queries.meta)
    queries.replace_all_uses_with(fused)
    graph.erase_node(write)


def _head_norm(x: Any) -> fx.Node | None:
    """The RMSNorm over the last dimension of x [1, H, T, D], if it is one or a transposed one, used nowhere else."""
    node = x
    if isinstance(node, fx.Node) and node.target is aten.transpose.int and len(node.users) == 1:
        node = node.args[0] if _swaps_heads_and_tokens(node) else None
    if not isinstance(node, fx.Node) or node.target is not optc.rms_norm.default or len(node.users) != 1:
        return None
    return node


def _swaps_heads_and_tokens(transpose: fx.Node) -> bool:
    return tuple(transpose.args[1:]) in ((1, 2), (2, 1))


def _packed(graph: fx.Graph, x: Any, skipped: fx.Node | None) -> fx.Node:
    """X [1, H, T, D] as [T, H, D], past the norm `skipped`: the view that x itself was before it was transposed, if it was."""
    assert isinstance(x, fx.Node)
    if skipped is not None and x is skipped:
        x = x.args[0]
        assert isinstance(x, fx.Node)
    if x.target is aten.transpose.int and _swaps_heads_and_tokens(x):
        tokens_first = x.args[0]
        if skipped is not None and tokens_first is skipped:
            tokens_first = skipped.args[0]
        return call(graph, aten.squeeze.dim, tokens_first, 0)
    return call(graph, aten.transpose.int, call(graph, aten.squeeze.dim, x, 0), 0, 1)


def _squeezed(graph: fx.Graph, angle: Any) -> fx.Node:
    """[1, T, R] as [T, R], once for all layers."""
    assert isinstance(angle, fx.Node)
    for user in angle.users:
        if user.target is aten.squeeze.dim and user.args[1] == 0:
            return user
    with graph.inserting_after(angle):
        return call(graph, aten.squeeze.dim, angle, 0)
