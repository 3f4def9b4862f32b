"""What each weight is for, read off the graph: its role, and the nodes that use it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from ...runtime import ops as _ops  # noqa: F401  the ops must be defined before they are named
from ...runtime.manifest import Role
from ..graph import Program, value_of

aten, optc = torch.ops.aten, torch.ops.optc
_LINEAR, _EMBEDDING, _EXPERTS = aten.linear.default, aten.embedding.default, optc.grouped_mm.default
_TRANSPOSES = (aten.transpose.int, aten.permute.default, aten.mT.default)
_WEIGHT = {_LINEAR: 1, _EXPERTS: 1, _EMBEDDING: 0}  # which of the arguments it is
_CHOOSES = (aten.topk.default, aten.sort.default, aten.argsort.default)
_MIXES = (_LINEAR, optc.attention.default, _EXPERTS)
_FEW = 8  # a layer with fewer inputs or outputs is a gate, and as good as weightless


@dataclass(frozen=True)
class Candidate:
    """A weight that could be quantized, as a matrix [N, K]; of experts with theirs one below the other: [G * n, K].

    Attributes:
        name: of the weight in the program.
        role: what it is for; of a tied weight lm_head.
        shape: (N, K).
        linears: nodes that multiply by it: linear layers, or grouped products of experts.
        embeddings: nodes that look rows up in it.
        experts: G; none if the weight is a matrix.
        transposed: of experts, whether the program has it as [G, K, n].
    """

    name: str
    role: Role
    shape: tuple[int, int]
    linears: tuple[fx.Node, ...] = field(repr=False)
    embeddings: tuple[fx.Node, ...] = field(repr=False)
    experts: int | None = None
    transposed: bool = False

    @property
    def is_tied(self) -> bool:
        return bool(self.linears and self.embeddings)

    def as_matrix(self, weight: Tensor) -> Tensor:
        """The weight [N, K] of what the program has."""
        return (weight.mT if self.transposed else weight).reshape(self.shape)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """What the program has of the weight [N, K]; undoes `as_matrix`."""
        if self.experts is None:
            return matrix
        weight = matrix.reshape(self.experts, -1, self.shape[1])
        return weight.mT.contiguous() if self.transposed else weight


def find_candidates(program: Program) -> tuple[list[Candidate], list[tuple[fx.Node, str]]]:
    """The weights of linear layers, experts and embeddings in the order of their use, and the nodes that have none, with
    the reason.
    """
    uses: dict[str, list[_Use]] = {}
    declined: list[tuple[fx.Node, str]] = []
    for node in program.graph.nodes:
        if use := _use_of(node):
            if use.weight.op == "get_attr":
                uses.setdefault(str(use.weight.target), []).append(use)
            else:
                declined.append((node, "its weight is computed"))
    others = _used_otherwise(program)
    found = []
    for name, of_weight in uses.items():
        first = of_weight[0]
        if name in others:
            declined.append((first.node, f"its weight is also used by {others[name]}"))
        elif any(use.is_turned != first.is_turned for use in of_weight):
            declined.append((first.node, "its weight is used both turned and as it is"))
        else:
            found.append(_candidate(name, of_weight))
    return found, declined


@dataclass(frozen=True)
class _Use:
    """A node and the weight it multiplies by or looks up in; of experts also whether that is a view, [G, n, K] turned."""

    node: fx.Node
    weight: fx.Node
    is_turned: bool = False


def _use_of(node: fx.Node) -> _Use | None:
    if node.op != "call_function" or node.target not in _WEIGHT:
        return None
    weight = node.args[_WEIGHT[node.target]]
    assert isinstance(weight, fx.Node)
    if node.target is _EXPERTS and weight.target in _TRANSPOSES:
        order = torch.empty(1, 2, 3, device="meta")
        turned = weight.target(order, *weight.args[1:], **weight.kwargs)
        if turned.stride() == order.mT.stride():
            return _Use(node, weight.all_input_nodes[0], is_turned=True)
    return _Use(node, weight)


def _candidate(name: str, uses: list[_Use]) -> Candidate:
    nodes = [use.node for use in uses]
    linears = tuple(node for node in nodes if node.target is not _EMBEDDING)
    embeddings = tuple(node for node in nodes if node.target is _EMBEDDING)
    rows, columns = map(int, value_of(uses[0].weight).shape[-2:])
    if nodes[0].target is not _EXPERTS:
        role = role_of(linears[0]) if linears else "embedding"
        return Candidate(name, role, (rows, columns), linears, embeddings)
    experts, transposed = int(value_of(uses[0].weight).shape[0]), not uses[0].is_turned
    if transposed:
        rows, columns = columns, rows
    return Candidate(name, "mlp", (experts * rows, columns), linears, (), experts, transposed)


def _used_otherwise(program: Program) -> dict[str, str]:
    """Weights that anything but a linear layer, experts or an embedding takes, and what takes them."""
    found = {}
    for node in program.graph.find_nodes(op="get_attr"):
        for user in node.users:
            for taker in user.users if user.target in _TRANSPOSES else (user,):
                use = _use_of(taker)
                if use is None or use.weight is not node:
                    found[node.target] = taker.name
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
