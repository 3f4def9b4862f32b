"""Where the channels of a node's output go, and what else they meet: the graph run on labels instead of numbers.

Each element that is proportional to channel n of the node's output carries n, every other element -1. Views move labels as
they move numbers; attention hands the labels of a value head to the query heads that read it; a product passes on the label
of one factor. What a channel meets that is not linear in it spoils the channel: nobody may scale it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ...runtime import ops as _ops  # noqa: F401  the ops must be defined before they are named
from ..graph import value_of

aten, optc = torch.ops.aten, torch.ops.optc


class Trace:
    """Where the channels of a node's output go.

    Attributes:
        start: the node.
        reached: the linear layers, each with the channel behind each of its inputs, or -1.
    """

    def __init__(self, start: fx.Node) -> None:
        self.start = start
        self.reached: dict[fx.Node, Tensor] = {}
        shape = _shape(start)
        self._labels: dict[fx.Node, Any] = {start: torch.arange(shape[-1]).expand(shape).contiguous()}
        self._spoiled_by = torch.full(shape[-1:], -1)
        self._spoilers: list[fx.Node] = []
        self._run()

    def why_not(self) -> str | None:
        """Why the channels that linear layers see cannot take factors."""
        labels = torch.cat(list(self.reached.values()))
        if (labels < 0).any():
            return f"only some of the inputs come from {self.start.name}"
        spoiled = int(self._spoiled_by[labels].amax())
        return (
            f"what comes from {self.start.name} also goes to {self._spoilers[spoiled].name}" if spoiled >= 0 else None
        )

    def _run(self) -> None:
        waiting, node = set(self.start.users), self.start
        while waiting:
            node = node.next
            if node not in waiting:
                continue
            waiting.remove(node)
            result = self._step(node)
            if any((part >= 0).any() for part in _parts(result)):
                self._labels[node] = result
                waiting |= set(node.users)

    def _step(self, node: fx.Node) -> Any:
        """The labels of a node's value."""
        touched = [used for used in node.all_input_nodes if used in self._labels]
        if node.target is aten.linear.default and touched == [node.args[0]]:
            labels = self._labels[touched[0]].flatten(0, -2)
            if (labels == labels[0]).all():
                self.reached[node] = labels[0]
                return _NOTHING
        rule = _RULES.get(node.target)
        if rule is None:
            result, spoiled = _NOTHING, tuple(self._labels[used] for used in touched)
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._value)
            result, spoiled = rule(node.target, *args, **kwargs)
        for part in spoiled:
            labels = torch.cat([tensor.flatten() for tensor in _parts(part)])
            self._spoiled_by[labels[labels >= 0]] = len(self._spoilers)
        self._spoilers.append(node)
        return result

    def _value(self, node: fx.Node) -> Any:
        """The labels of a node, or its size if it is one; -1 everywhere for what the producer does not reach."""
        if node in self._labels:
            return self._labels[node]
        value = node.meta["val"]
        return torch.full(_shape(node), -1) if isinstance(value, Tensor) else _hint(value)


_NOTHING = torch.tensor(-1)


def _parts(labels: Any) -> Sequence[Tensor]:
    """The tensors of a node's labels: of a split there are several."""
    return labels if isinstance(labels, tuple | list) else (labels,)


def _hint(size: Any) -> Any:
    """A number of the size that a symbol stands for."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def _shape(node: fx.Node) -> list[int]:
    return [_hint(size) for size in value_of(node).shape]


# Each rule takes the op and its arguments as labels, and gives the labels of the result and those that are spoiled.
_Rule = Callable[..., tuple[Any, tuple[Tensor, ...]]]


def _view(op: Any, *args: Any, **kwargs: Any) -> tuple[Any, tuple[Tensor, ...]]:
    return op(*args, **kwargs), ()


def _reshape(op: Any, labels: Tensor, shape: list[int]) -> tuple[Any, tuple[Tensor, ...]]:
    return labels.reshape(shape), ()  # labels do not lie in memory as the values do, so a view of them may not exist


def _same(op: Any, labels: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """Elementwise and positively homogeneous: f(x / s) = f(x) / s for s > 0."""
    return labels, ()


def _type_as(op: Any, labels: Tensor, other: Tensor) -> tuple[Any, tuple[Tensor, ...]]:
    return labels, ()  # of the other only the dtype counts


def _product(op: Any, left: Any, right: Any) -> tuple[Any, tuple[Tensor, ...]]:
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return (left if isinstance(left, Tensor) else right), ()
    left, right = torch.broadcast_tensors(left, right)
    both = (left >= 0) & (right >= 0)
    return torch.where(both, -1, torch.maximum(left, right)), (left[both], right[both])


def _quotient(op: Any, left: Any, right: Any) -> tuple[Any, tuple[Tensor, ...]]:
    if not isinstance(right, Tensor):
        return left, ()
    if not isinstance(left, Tensor):
        return torch.full_like(right, -1), (right,)
    left, right = torch.broadcast_tensors(left, right)
    return torch.where(right >= 0, -1, left), (left[right >= 0], right)


def _attention(op: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """Q [B, H, T, Dk], k [B, KV, T, Dk], v [B, KV, T, Dv] -> [B, T, H, Dv], linear in v for each of its channels."""
    mixed = (v != v[:, :, :1]).any(dim=2, keepdim=True).expand_as(v)
    result = torch.where(mixed, -1, v).repeat_interleave(q.shape[1] // v.shape[1], 1).transpose(1, 2)
    sinks = tuple(arg for arg in args if isinstance(arg, Tensor))
    return result, (q, k, v[mixed], *sinks)


CASTS = (aten._to_copy.default, aten.to.dtype)
_VIEWS = (
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.transpose.int,
    aten.permute.default,
    aten.t.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.cat.default,
    operator.getitem,
)
_RULES: dict[object, _Rule] = {
    **dict.fromkeys(_VIEWS, _view),
    **dict.fromkeys((aten.view.default, aten.reshape.default, aten._unsafe_view.default), _reshape),
    **dict.fromkeys((*CASTS, aten.clone.default, aten.contiguous.default, aten.neg.default, aten.relu.default), _same),
    aten.type_as.default: _type_as,
    aten.mul.Tensor: _product,
    aten.div.Tensor: _quotient,
    optc.attention.default: _attention,
}
