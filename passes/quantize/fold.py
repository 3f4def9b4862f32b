"""Factors on the input channels of linear layers, folded into whatever makes that input: proved from the graph.

    linear(x, W)  =  linear(x / s, W * s)      for any s > 0 of one number a channel of x

is exact, and costs nothing where x / s comes out of the graph as it stands, with other weights. It does if x is the output
of a producer with a weight of its own for each channel (a norm's weight and bias, or the rows and bias of a linear layer)
and every operation between is linear in that channel. `channels.py` proves that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ...runtime.scheme import Scheme
from ..base import Result
from ..graph import Program, arguments, get_weight, set_weight, value_of
from .calibrate import Calibration, Statistics, calibrate
from .channels import CASTS, Trace
from .quantize import check_finite
from .recipe import Assignment, Recipe, assign
from .roles import find_candidates

aten = torch.ops.aten

# How many roundings of a weight's dtype the logits may move by, relative to the largest, when every weight is rounded.
_ROUNDINGS = 4


@dataclass(frozen=True)
class Producer:
    """A node whose output [..., P] has weights of its own for each channel: channel n is linear in row n of them all.

    Attributes:
        node: a norm, the product with its weight, or a linear layer.
        weights: names, each with what the graph adds to it (1 for norms that multiply by 1 + weight).
    """

    node: fx.Node
    weights: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Site:
    """Linear layers whose input channels can take a factor.

    Attributes:
        producer: what takes the inverse factors.
        linears: all that its channels reach, in the order of the graph.
        index: i64[K]: the producer's channel behind each input channel. Several may share one: under grouped-query
            attention the query heads of a key-value head do.
    """

    producer: Producer
    linears: tuple[fx.Node, ...]
    index: Tensor = field(repr=False)

    @property
    def input(self) -> fx.Node:
        return _input(self.linears[0])

    @property
    def names(self) -> tuple[str, ...]:
        """The linear layers' weights."""
        return tuple(dict.fromkeys(str(linear.args[1].target) for linear in self.linears))  # type: ignore[union-attr]

    def per_channel(self, values: Tensor, reduce: str) -> Tensor:
        """Values [K] of input channels -> [P] of the producer's, reduced (mean, amax) over those that share one; else 1."""
        channels = int(value_of(self.producer.node).shape[-1])
        return values.new_ones(channels).scatter_reduce(0, self.index, values, reduce, include_self=False)

    def centred(self, factors: Tensor) -> Tensor:
        """Factors [P] over the geometric mean of the largest and smallest that are used.

        Of float16 they are at most 2^8 and at least 2^-8, so that no weight or input up to that overflows; else 1e4, 1e-4.
        """
        used = factors[self.index]
        limit = min(1e4, torch.finfo(value_of(self.linears[0].args[1]).dtype).max ** 0.5)
        return (factors / (used.amax() * used.amin()).sqrt()).clamp(1 / limit, limit)


def find_sites(program: Program) -> tuple[list[Site], dict[fx.Node, str]]:
    """Every place to fold, one at most for a linear layer, and why each other linear layer has none."""
    uses = _uses(program)
    sites: dict[fx.Node, Site] = {}
    reasons: dict[fx.Node, str] = {}
    for producer, shared in _producers(program, uses):
        trace = Trace(producer.node)
        if not trace.reached:
            continue
        if reason := shared or trace.why_not() or _why_not_together(trace, uses):
            for linear in trace.reached:
                reasons.setdefault(linear, reason)
        elif not any(linear in sites for linear in trace.reached):
            site = Site(producer, tuple(trace.reached), next(iter(trace.reached.values())))
            sites |= dict.fromkeys(site.linears, site)
    declined = {
        node: reasons.get(
            node, f"{_input(node).name} ({_input(node).target}) has no weights of its own for each channel"
        )
        for node in program.graph.find_nodes(op="call_function", target=aten.linear.default)
        if node not in sites
    }
    return list(dict.fromkeys(sites.values())), declined


Choose = Callable[[Site, Mapping[str, Assignment], Statistics], Tensor]


def fold_calibrated(
    program: Program,
    recipe: Recipe,
    calibration: Calibration,
    choose: Choose,
    *,
    wanted: Callable[[Scheme], bool],
    norms_only: bool = False,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> Result:
    """Fold factors chosen from what the unquantized model sees into every site with a layer whose scheme is wanted.

    Args:
        program: rewritten in place.
        recipe: says which scheme each weight gets.
        calibration: the samples to measure the inputs on.
        choose: gives a site's factors f32[P] > 0 from the assignments of its wanted weights and its input's statistics.
        wanted: whether a scheme gains from the transform.
        norms_only: leave alone what comes from another linear layer.
        on_progress: called with the fraction of the work that is done.
    """
    result = Result()
    candidates, _ = find_candidates(program)
    names = {candidate.name: program.sources.get(candidate.name, candidate.name) for candidate in candidates}
    assignments = {k: found for k, found in assign(recipe, candidates, names).items() if wanted(found.scheme)}
    sites, declined = find_sites(program)
    for linear, reason in declined.items():
        if str(linear.args[1].target) in assignments:  # type: ignore[union-attr]
            result.decline(linear, reason)
    by_input: dict[fx.Node, Site] = {}
    for site in sites:
        if not assignments.keys() & set(site.names):
            continue
        if norms_only and site.producer.node.target is aten.linear.default:
            result.decline(site.linears[0], f"its input comes from {site.producer.node.name}, which is no norm")
        else:
            by_input[site.input] = site
    for weight in dict.fromkeys(name for site in by_input.values() for name in site.names):
        check_finite(names.get(weight, weight), get_weight(program.module, weight))
    factors: dict[fx.Node, Tensor] = {}

    def visit(x: fx.Node, statistics: Statistics) -> dict[str, Tensor]:
        given = {name: assignments[name] for name in by_input[x].names if name in assignments}
        factors[x] = choose(by_input[x], given, statistics)
        return {}

    calibrate(program, calibration, list(by_input), visit, on_progress=on_progress)
    for x, site in by_input.items():
        fold(program, site, factors[x])
    result.matches = len(by_input)
    dtypes = {get_weight(program.module, name).dtype for site in by_input.values() for name in site.names}
    result.rounding = max((_ROUNDINGS * torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
    return result


def fold(program: Program, site: Site, factors: Tensor) -> None:
    """Divide the producer's channels by `factors` f32[P] > 0 and multiply the linear layers' columns by them.

    Channels that the linear layers do not see, such as the queries of a fused projection, stay as they are.
    Weights are computed in float32 and stored in their own dtype. Where the producer is a norm, the columns make up for
    the rounding of its weight, so that only the columns' own remains.
    """
    vector = get_weight(program.module, producer_weight := site.producer.weights[0][0])
    is_seen = torch.zeros_like(factors, dtype=torch.bool).index_fill_(0, site.index, True)
    factors = torch.where(is_seen, factors, 1.0)
    for name, offset in site.producer.weights:
        value = get_weight(program.module, name).detach()
        shape = (-1,) + (1,) * (value.dim() - 1)
        effective = value.float() + offset
        folded = (effective / factors.view(shape) - offset).to(value.dtype)
        if name == producer_weight and vector.dim() == 1:
            made_up = effective / (folded.float() + offset)
            factors = torch.where((made_up / factors - 1).abs() < 2**-6, made_up, factors)
        _replace(program, name, folded)
    for name in site.names:
        value = get_weight(program.module, name).detach()
        _replace(program, name, (value.float() * factors[site.index]).to(value.dtype))


def _replace(program: Program, name: str, value: Tensor) -> None:
    is_transposed = program.layouts.get(name, "plain").endswith("transposed")
    set_weight(program, name, value, layout="folded-transposed" if is_transposed else "folded")


def _input(linear: fx.Node) -> fx.Node:
    x = linear.args[0]
    assert isinstance(x, fx.Node)
    return x


def _uses(program: Program) -> dict[str, list[tuple[fx.Node, fx.Node]]]:
    """Who takes each weight: pairs of the user and the `get_attr` node."""
    found: dict[str, list[tuple[fx.Node, fx.Node]]] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        found.setdefault(str(node.target), []).extend((user, node) for user in node.users)
    return found


def _producers(
    program: Program, uses: dict[str, list[tuple[fx.Node, fx.Node]]]
) -> Iterator[tuple[Producer, str | None]]:
    """Nodes whose output channels have weights of their own, and why those cannot be changed, if so."""
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target not in _WEIGHTED:
            continue
        given = arguments(node)
        for names in _WEIGHTED[node.target]:
            operands = [given[name] for name in names if given[name] is not None]
            found = [_weight(operand) for operand in operands]
            if not found or None in found or not all(_is_per_channel(operand, node) for operand in operands):
                continue
            weights = tuple(weight for weight in found if weight is not None)
            shared = [name for name, _ in weights if len(uses[name]) > 1]
            reason = f"{shared[0]}, which would take the inverse factors, is used more than once" if shared else None
            yield Producer(node, weights), reason
            break


# Which arguments hold the weights, the main one first; a product may hold its weight on either side.
_WEIGHTED: dict[object, tuple[tuple[str, ...], ...]] = {
    aten.linear.default: (("weight", "bias"),),
    aten.layer_norm.default: (("weight", "bias"),),
    aten.rms_norm.default: (("weight",),),
    aten.mul.Tensor: (("self",), ("other",)),
}


def _weight(operand: Any) -> tuple[str, float] | None:
    """The name of a weight and what is added to it, if the operand is nothing else."""
    while isinstance(operand, fx.Node) and operand.target in CASTS and len(operand.users) == 1:
        operand = operand.args[0]
    if not isinstance(operand, fx.Node):
        return None
    if operand.op == "get_attr":
        return str(operand.target), 0.0
    if operand.target is aten.add.Tensor and len(operand.users) == 1:
        given = arguments(operand)
        inner = _weight(given["self"])
        if inner and isinstance(given["other"], int | float) and given["alpha"] == 1:
            return inner[0], inner[1] + given["other"]
    return None


def _is_per_channel(operand: fx.Node, node: fx.Node) -> bool:
    """Whether row n of a weight makes channel n of the node's output, and no other."""
    value, out = value_of(operand), value_of(node)
    matrix = node.target is aten.linear.default and operand is node.args[1]
    floating = value.is_floating_point() and out.is_floating_point()
    channels = out.shape[-1] if out.dim() > 1 else None
    return floating and value.dim() == (2 if matrix else 1) and isinstance(channels, int) and value.shape[0] == channels


def _why_not_together(trace: Trace, uses: dict[str, list[tuple[fx.Node, fx.Node]]]) -> str | None:
    """Why the linear layers that a producer reaches cannot all take its factors."""
    first, *others = trace.reached.values()
    if any(not torch.equal(first, other) for other in others):
        return f"the linear layers behind {trace.start.name} see its channels in different orders"
    for linear in trace.reached:
        weight = linear.args[1]
        assert isinstance(weight, fx.Node)
        if weight.op != "get_attr":
            return f"the weight of {linear.name} is computed"
        for user, _ in uses[str(weight.target)]:
            if user not in trace.reached:
                return f"{weight.target} is also used by {user.name}"
    return None
