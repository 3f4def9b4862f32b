"""What each weight is for, read off the graph: its role, and the linear layers that share an input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import fx

from ...runtime import ops as _ops  # noqa: F401  the ops must be defined before they are named
from ...runtime.manifest import Role
from ..graph import Program, value_of

aten, optc = torch.ops.aten, torch.ops.optc
_LINEAR, _EMBEDDING = aten.linear.default, aten.embedding.default
_CHOOSES = (aten.topk.default, aten.sort.default, aten.argsort.default)
_MIXES = (_LINEAR, optc.attention.default, optc.grouped_mm.default)
_FEW = 8  # a layer with fewer inputs or outputs is a gate, and as good as weightless


@dataclass(frozen=True)
class Candidate:
    """A weight [N, K] that could be quantized.

    Attributes:
        name: of the weight in the program.
        role: what it is for; of a tied weight lm_head.
        shape: (N, K).
        linears: nodes that multiply by it.
        embeddings: nodes that look rows up in it.
    """

    name: str
    role: Role
    shape: tuple[int, int]
    linears: tuple[fx.Node, ...] = field(repr=False)
    embeddings: tuple[fx.Node, ...] = field(repr=False)

    @property
    def is_tied(self) -> bool:
        return bool(self.linears and self.embeddings)


def find_candidates(program: Program) -> tuple[list[Candidate], list[tuple[fx.Node, str]]]:
    """The weights of linear layers and embeddings in the order of their use, and the linear nodes that have none, with
    the reason.
    """
    uses: dict[str, list[tuple[fx.Node, fx.Node]]] = {}
    declined: list[tuple[fx.Node, str]] = []
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in (_LINEAR, _EMBEDDING):
            weight = node.args[1] if node.target is _LINEAR else node.args[0]
            if weight.op == "get_attr":
                uses.setdefault(weight.target, []).append((node, weight))
            else:
                declined.append((node, "its weight is computed"))
    others = _used_otherwise(program)
    found = []
    for name, nodes in uses.items():
        linears = tuple(node for node, _ in nodes if node.target is _LINEAR)
        embeddings = tuple(node for node, _ in nodes if node.target is _EMBEDDING)
        if name in others:
            declined.append((nodes[0][0], f"its weight is also used by {others[name]}"))
            continue
        shape = value_of(nodes[0][1]).shape
        role = role_of(linears[0]) if linears else "embedding"
        found.append(Candidate(name, role, (int(shape[0]), int(shape[1])), linears, embeddings))
    return found, declined


def _used_otherwise(program: Program) -> dict[str, str]:
    """Weights that anything but a linear layer or an embedding takes, and what takes them."""
    found = {}
    for node in program.graph.find_nodes(op="get_attr"):
        for user in node.users:
            is_weight = (user.target is _LINEAR and user.args[1] is node) or (
                user.target is _EMBEDDING and user.args[0] is node
            )
            if not is_weight:
                found[node.target] = user.name
    return found


def role_of(linear: fx.Node) -> Role:
    """What a linear layer is for.

    lm_head: nothing but the output uses its result.
    router: its result chooses (topk) without another linear layer between; or it is a gate of a few numbers a token, as
        that of Qwen2-MoE's shared expert.
    attention: everything that its result reaches, it reaches through an attention node (q, k, v and what they are made
        from); or its input comes from one without another linear layer between (o); or it gates such an input.
    mlp: the rest.
    """
    after = _reach(linear, lambda node: list(node.users), stop=_is_mix)
    mixes = [node for node in after if _is_mix(node)]
    if any(node.op == "output" for node in after) and not mixes:
        return "lm_head"
    if any(node.target in _CHOOSES for node in after) or min(value_of(linear.args[1]).shape) < _FEW:
        return "router"
    beyond_attention = _reach(
        linear, lambda node: list(node.users), stop=lambda node: node.target is optc.attention.default
    )
    if not any(node.op == "output" for node in beyond_attention) or _takes_attention(linear):
        return "attention"
    return "attention" if mixes and all(map(_takes_attention, mixes)) else "mlp"


def _takes_attention(linear: fx.Node) -> bool:
    """Whether a linear layer's input is an attention's result, reshaped or gated, and not a stream that many layers were
    added to, which the embedding is part of.
    """
    x = linear.all_input_nodes[0]
    before = {*_reach(x, lambda node: list(node.all_input_nodes), stop=_is_mix), x} if not _is_mix(x) else {x}
    targets = [node.target for node in before]
    return linear.target is _LINEAR and optc.attention.default in targets and _EMBEDDING not in targets


def _is_mix(node: fx.Node) -> bool:
    return node.target in _MIXES


def _reach(start: fx.Node, step: Callable[[fx.Node], list[fx.Node]], stop: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """Nodes reached from `start`, without it; nodes that `stop` holds for are reached and not passed."""
    seen: set[fx.Node] = set()
    queue = step(start)
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        if not stop(node):
            queue += step(node)
    return seen
