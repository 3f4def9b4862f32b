"""Sequential calibration: what flows into each linear layer, with everything before it already quantized.

The graph is cut at the inputs of the layers. Each piece runs for all samples before the next starts, so a layer is
quantized on what the quantized layers before it give, as in "true sequential" GPTQ, and every node runs once per sample.
Only values that a later piece needs are kept, past a limit in files that the system can page out.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ...runtime.manifest import CalibrationRecord
from ..graph import Program, get_weight

optc = torch.ops.optc


@dataclass(frozen=True)
class Calibration:
    """Token sequences to calibrate on.

    Attributes:
        samples: each i64[n].
        source: where they are from, for the record.
        seed: that they were drawn with.
    """

    samples: tuple[Tensor, ...] = field(repr=False)
    source: str
    seed: int

    def record(self) -> CalibrationRecord:
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(sample.numpy().tobytes())
        return CalibrationRecord(
            source=self.source,
            sha256=digest.hexdigest(),
            num_samples=len(self.samples),
            sequence_length=max(map(len, self.samples)),
            seed=self.seed,
        )


@dataclass(frozen=True)
class Statistics:
    """What was seen of an input x [tokens, K].

    Attributes:
        hessian: mean of x^T x, f32[K, K].
        largest: largest magnitude of each column, f32[K].
        mean: mean magnitude of each column, f32[K].
        tokens: how many.
    """

    hessian: Tensor
    largest: Tensor
    mean: Tensor
    tokens: int


class _Collector:
    def __init__(self) -> None:
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        rows = x.flatten(0, -2).float()
        if not self.tokens:
            self.hessian = rows.new_zeros(rows.shape[1], rows.shape[1])
            self.largest, self.total = rows.new_zeros(rows.shape[1]), rows.new_zeros(rows.shape[1])
        self.tokens += rows.shape[0]
        self.hessian.addmm_(rows.t(), rows)
        self.largest = torch.maximum(self.largest, rows.abs().amax(dim=0))
        self.total += rows.abs().sum(dim=0)

    def statistics(self) -> Statistics:
        return Statistics(self.hessian / self.tokens, self.largest, self.total / self.tokens, self.tokens)


Visit = Callable[[fx.Node, Statistics], Mapping[str, Tensor]]


@torch.no_grad()
def calibrate(
    program: Program,
    calibration: Calibration,
    inputs: Sequence[fx.Node],
    visit: Visit,
    *,
    memory_limit: int = 2**30,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> None:
    """Run the samples through the program up to the last of `inputs`, visiting each in the order of the graph.

    Args:
        program: a captured program over `input_ids` and `positions` [1, T].
        calibration: the samples.
        inputs: nodes whose values [1, T, K] are to be measured.
        visit: called with the node and its statistics; returns weights that later nodes shall use instead, by name.
        memory_limit: bytes of activations held in memory; more lie in a temporary file.
        on_progress: called with the fraction of the work that is done.
    """
    wanted = set(inputs)
    replaced: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory(prefix="optc-") as folder:
        environments = [_Environment(program, sample, Path(folder)) for sample in calibration.samples]
        budget = _Budget(memory_limit)
        pieces = list(_pieces(program, wanted))
        uses = _last_uses(program, pieces)
        for number, piece in enumerate(pieces):
            collector = _Collector()
            for index, environment in enumerate(environments):
                environment.run(piece, replaced, uses[number], budget)
                collector.add(environment.get(piece[-1]))
                on_progress((number + (index + 1) / len(environments)) / len(pieces))
            replaced |= visit(piece[-1], collector.statistics())
            still_used = {n.target for later in pieces[number + 1 :] for node in later for n in node.all_input_nodes}
            replaced = {name: value for name, value in replaced.items() if name in still_used}


def _pieces(program: Program, wanted: set[fx.Node]) -> Iterator[list[fx.Node]]:
    """Runs of nodes, each ending with one that is wanted."""
    piece: list[fx.Node] = []
    for node in program.graph.nodes:
        if node.op != "get_attr":
            piece.append(node)
        if node in wanted:
            yield piece
            piece = []


def _last_uses(program: Program, pieces: list[list[fx.Node]]) -> list[set[fx.Node]]:
    """For each piece, the values that a later piece needs."""
    needed: set[fx.Node] = set()
    found = []
    for piece in reversed(pieces):
        found.append(set(needed))
        needed -= set(piece)
        needed |= {used for node in piece for used in node.all_input_nodes if used.op != "get_attr"}
    return found[::-1]


class _Budget:
    """Bytes of activations in memory, and the limit."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0


class _Environment:
    """One sample's values."""

    def __init__(self, program: Program, tokens: Tensor, folder: Path) -> None:
        self._module, self._folder = program.module, folder
        given = {"input_ids": tokens[None], "positions": torch.arange(len(tokens))[None]}
        self._given = iter([given[spec.name] for spec in program.inputs])
        self._values: dict[fx.Node, Any] = {}
        self._held: dict[fx.Node, int] = {}

    def get(self, node: fx.Node) -> Any:
        return self._values[node]

    def run(self, piece: list[fx.Node], replaced: Mapping[str, Tensor], keep: set[fx.Node], budget: _Budget) -> None:
        """Run the nodes of a piece; afterwards only the values in `keep`, and the last node's, are held."""
        inside = {used: node for node in piece for used in node.all_input_nodes}
        for node in piece:
            if node.op == "placeholder":
                self._values[node] = next(self._given)
                continue
            weights = {used: str(used.target) for used in node.all_input_nodes if used.op == "get_attr"}
            known = {
                used: replaced[name] if name in replaced else get_weight(self._module, name)
                for used, name in weights.items()
            }
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), {**self._values, **known}.__getitem__)
            self._values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            for used in node.all_input_nodes:
                if inside[used] is node and used not in keep:
                    self._drop(used, budget)
        for node in list(self._values):
            if node not in keep and node is not piece[-1]:
                self._drop(node, budget)
        for node in piece:
            if node in keep:
                self._hold(node, budget)

    def _drop(self, node: fx.Node, budget: _Budget) -> None:
        self._values.pop(node, None)
        budget.used -= self._held.pop(node, 0)

    def _hold(self, node: fx.Node, budget: _Budget) -> None:
        """Account for a value that stays; past the limit, move it into a file."""
        value = self._values.get(node)
        if not isinstance(value, Tensor) or value.numel() == 0:
            return
        size = value.numel() * value.element_size()
        if budget.used + size <= budget.limit:
            self._values[node] = value.clone() if value._base is not None else value
            budget.used += size
            self._held[node] = size
            return
        with tempfile.NamedTemporaryFile(dir=self._folder, suffix=".bin") as file:
            mapped = torch.from_file(file.name, shared=True, size=value.numel(), dtype=value.dtype)
            self._values[node] = mapped.view(value.shape).copy_(value)
