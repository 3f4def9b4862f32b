"""How much the output changes if one group of weights is stored in one scheme, for every group and scheme."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from ...runtime.manifest import Role
from ...runtime.scheme import find_scheme
from ..graph import Program, get_weight
from .calibrate import Statistics, Walk
from .mix import Option
from .recipe import KEEP, Assignment
from .roles import Candidate

_ROWS = 128  # of logits at a time


@dataclass(frozen=True)
class Group:
    """Weights that get the same scheme: those that share an input, such as q, k and v.

    Attributes:
        weights: their names in the program.
        input: what they multiply.
        size: how many weights.
        columns: inputs of each.
        roles: what each is for.
    """

    weights: tuple[str, ...]
    input: fx.Node = field(repr=False)
    size: int
    columns: int
    roles: tuple[Role, ...]


def tied_groups(candidates: Sequence[Candidate]) -> list[Group]:
    """The candidates in groups, in the order of the graph; a weight with several inputs goes with its first."""
    by_input: dict[fx.Node, list[Candidate]] = {}
    for candidate in candidates:
        by_input.setdefault(candidate.linears[0].all_input_nodes[0], []).append(candidate)
    return [
        Group(
            tuple(c.name for c in found),
            x,
            sum(c.shape[0] * c.shape[1] for c in found),
            found[0].shape[1],
            tuple(c.role for c in found),
        )
        for x, found in by_input.items()
    ]


@torch.no_grad()
def measure_sensitivity(
    program: Program,
    groups: Sequence[Group],
    samples: Sequence[Tensor],
    schemes: Callable[[Group], Sequence[str]],
    quantize: Callable[[str, Assignment, Statistics], tuple[Tensor, int]],
    *,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> list[list[Option]]:
    """For each group its options: each scheme with its bytes and the KL divergence that it alone causes.

    Args:
        program: captured and canonical.
        groups: of its weights.
        samples: token sequences i64[n] to measure on.
        schemes: names for a group; none is full precision.
        quantize: a weight's name, what it gets and the statistics of its input -> the weight as its codes mean it, and
            its bytes.
        on_progress: called with the fraction that is done.
    """
    found: dict[fx.Node, list[Option]] = {}
    with Walk(program, samples, [group.input for group in groups], float32=True) as walk:
        reference: list[Tensor] = []
        by_input = {group.input: group for group in groups}
        for node in walk.run():
            if not reference:
                reference = [log_probabilities(output) for output in walk.outputs({})]
            group, statistics = by_input[node], walk.statistics()
            found[node] = list(_options(program, group, schemes(group), statistics, walk, reference, quantize))
            on_progress(len(found) / len(groups))
    return [found[group.input] for group in groups]


def _options(
    program: Program,
    group: Group,
    schemes: Sequence[str],
    statistics: Statistics,
    walk: Walk,
    reference: list[Tensor],
    quantize: Callable[[str, Assignment, Statistics], tuple[Tensor, int]],
) -> Iterator[Option]:
    for name in schemes:
        if name == KEEP:
            held = [get_weight(program.module, weight) for weight in group.weights]
            yield Option(KEEP, sum(weight.numel() * weight.element_size() for weight in held), 0.0)
            continue
        assignment = Assignment(name, find_scheme(name), "rtn")
        rounded = {weight: quantize(weight, assignment, statistics) for weight in group.weights}
        outputs = walk.outputs({weight: value for weight, (value, _) in rounded.items()}, assignment.scheme.activation)
        yield Option(name, sum(size for _, size in rounded.values()), mean_divergence(reference, outputs))


def log_probabilities(logits: Tensor) -> Tensor:
    """Logits [1, T, V] -> f32[T, V]."""
    return torch.log_softmax(logits[0].float(), dim=-1)


def mean_divergence(reference: Sequence[Tensor], outputs: Iterator[Tensor]) -> float:
    """Mean KL divergence in nats a token of the outputs' logits [1, T, V] from log-probabilities f32[T, V].

    Infinite where it is no number, so that nothing keeps a budget by breaking.
    """
    total, tokens = 0.0, 0
    for expected, output in zip(reference, outputs, strict=True):
        for rows, logits in zip(expected.split(_ROWS), output[0].split(_ROWS), strict=True):
            total += float((rows.exp() * (rows - torch.log_softmax(logits.float(), dim=-1))).sum())
        tokens += expected.shape[0]
    mean = total / tokens
    return max(mean, 0.0) if math.isfinite(mean) else math.inf
