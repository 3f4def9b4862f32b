"""Sequential calibration: what flows into each linear layer, with everything before it already quantized.

The graph is cut at the inputs of the layers. Each piece runs for all samples before the next starts, so a layer is
quantized on what the quantized layers before it give, as in "true sequential" GPTQ, and every node runs once per sample.
Only values that a later piece needs are kept, past a limit in files.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ...errors import UsageError
from ...runtime.manifest import CalibrationRecord
from ..graph import Program
from .environment import Environment, MemoryBudget, is_linear, is_of_weights, weight_behind
from .gptq import Factors, factor

aten, optc = torch.ops.aten, torch.ops.optc


MEMORY_LIMIT = 2**28
"""Bytes of activations that calibration holds in memory; more lie in files."""


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

    def config(self) -> dict[str, Any]:
        """What decides codes: all of the record but the name of the source."""
        return self.record().model_dump(exclude={"source"})


@dataclass(frozen=True)
class Statistics:
    """What was seen of an input x [tokens, K].

    Attributes:
        hessian: mean of x^T x, f32[K, K].
        largest: largest magnitude of each column, f32[K].
        mean: mean magnitude of each column, f32[K].
        tokens: how many.
        cross: mean of x^T x', f32[K, K], with x' the input of the same tokens in the unquantized model; none if that was
            not asked for.
    """

    hessian: Tensor
    largest: Tensor
    mean: Tensor
    tokens: int
    cross: Tensor | None = None

    @cached_property
    def factors(self) -> Factors:
        """Of the Hessian; made once for all weights that have this input."""
        return factor(self.hessian)

    def together_with(self, other: Statistics) -> Statistics:
        """Of both inputs as one, x below x."""
        tokens = self.tokens + other.tokens

        def mean(a: Tensor, b: Tensor) -> Tensor:
            return (a * self.tokens + b * other.tokens) / tokens

        return Statistics(
            mean(self.hessian, other.hessian),
            torch.maximum(self.largest, other.largest),
            mean(self.mean, other.mean),
            tokens,
            mean(self.cross, other.cross) if self.cross is not None and other.cross is not None else None,
        )


class _Collector:
    def __init__(self) -> None:
        self.tokens = 0
        self.cross: Tensor | None = None

    def add(self, x: Tensor, original: Tensor | None) -> None:
        rows = x.flatten(0, -2).float()
        if not self.tokens:
            self.hessian = rows.new_zeros(rows.shape[1], rows.shape[1])
            self.largest, self.total = rows.new_zeros(rows.shape[1]), rows.new_zeros(rows.shape[1])
        self.tokens += rows.shape[0]
        self.hessian.addmm_(rows.t(), rows)
        self.largest = torch.maximum(self.largest, rows.abs().amax(dim=0))
        self.total += rows.abs().sum(dim=0)
        if original is not None:
            self.cross = torch.zeros_like(self.hessian) if self.cross is None else self.cross
            self.cross.addmm_(rows.t(), original.flatten(0, -2).float())

    def statistics(self) -> Statistics:
        cross = self.cross / self.tokens if self.cross is not None else None
        return Statistics(self.hessian / self.tokens, self.largest, self.total / self.tokens, self.tokens, cross)


Visit = Callable[[fx.Node, Statistics], Mapping[str, Tensor]]


@torch.no_grad()
def calibrate(
    program: Program,
    calibration: Calibration,
    inputs: Sequence[fx.Node],
    visit: Visit,
    *,
    with_original: Collection[fx.Node] = (),
    memory_limit: int = MEMORY_LIMIT,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> None:
    """Run the samples through the program up to the last of `inputs`, visiting each in the order of the graph.

    Args:
        program: a captured program over `input_ids` and `positions` [1, T].
        calibration: the samples.
        inputs: nodes whose values [1, T, K] are to be measured.
        visit: called with the node and its statistics; returns weights that later nodes shall use instead, by name.
        with_original: those of the inputs that are compared with the unquantized model's: `Statistics.cross`.
        memory_limit: bytes of activations held in memory; more lie in a temporary file.
        on_progress: called with the fraction of the work that is done.

    Raises:
        UsageError: an input is not finite, or there is no room for the temporary files.
    """
    samples = calibration.samples
    with Walk(program, samples, inputs, with_original=with_original, memory_limit=memory_limit) as walk:
        for node in walk.run(on_progress):
            walk.replace(visit(node, walk.statistics()))


class Walk:
    """All samples on their way through a program, side by side, stopping at each of `inputs`.

    Args:
        program: a captured program over `input_ids` and `positions` [1, T].
        samples: each i64[n].
        inputs: nodes whose values [1, T, K] are to be measured.
        with_original: those of the inputs that are compared with what they are in the program as it is, whatever
            `replace` says.
        float32: compute in float32, whatever the program's dtype.
        memory_limit: bytes of activations held in memory; more lie in a temporary file.
    """

    def __init__(
        self,
        program: Program,
        samples: Sequence[Tensor],
        inputs: Sequence[fx.Node],
        *,
        with_original: Collection[fx.Node] = (),
        float32: bool = False,
        memory_limit: int = MEMORY_LIMIT,
    ) -> None:
        self._program = program
        self._pieces, self._rest = _pieces(program, set(inputs))
        self._needed = _needed_later(self._pieces, self._rest)
        self._replaced: dict[str, Tensor] = {}
        self._number = -1  # of the piece that ran last
        self._folder = tempfile.TemporaryDirectory(prefix="optc-")
        budget = MemoryBudget(memory_limit, Path(self._folder.name))
        self._environments = [Environment(program, sample, budget, float32) for sample in samples]
        self._compared = set(with_original)
        ends = [number for number, piece in enumerate(self._pieces) if piece[-1] in self._compared]
        self._last_compared = max(ends, default=-1)  # the piece that the original goes to
        self._originals = [Environment(program, sample, budget, float32) for sample in samples if ends]

    def __enter__(self) -> Walk:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def run(self, on_progress: Callable[[float], None] = lambda fraction: None) -> Iterator[fx.Node]:
        """Go from one input to the next; gives each of them when all samples are there."""
        for number, piece in enumerate(self._pieces):
            self._collector = _Collector()
            for index, environment in enumerate(self._environments):
                x = environment.run(piece, self._replaced, self._needed[number])
                original = None
                if number <= self._last_compared:
                    keep = self._needed[number] if number < self._last_compared else set()
                    original = self._originals[index].run(piece, {}, keep)
                self._collector.add(x, original if piece[-1] in self._compared else None)
                on_progress((number + (index + 1) / len(self._environments)) / len(self._pieces))
            self._number = number
            yield piece[-1]

    def statistics(self) -> Statistics:
        """Of the input that `run` gave last.

        Raises:
            UsageError: it is not finite, or not once squared.
        """
        found = self._collector.statistics()
        if not all(torch.isfinite(of).all() for of in (found.hessian, found.cross) if of is not None):
            weights = [weight_behind(user.args[1]) for user in self._pieces[self._number][-1].users if is_linear(user)]
            names = ", ".join(self._program.sources.get(name, name) for name in dict.fromkeys(weights))
            raise UsageError(
                f"the calibration text makes the inputs of {names} NaN, Inf or too large to square: they cannot be "
                "measured; check that the model computes numbers in its dtype, or choose a scheme and an --algorithm "
                "without calibration, such as rtn"
            )
        return found

    def replace(self, weights: Mapping[str, Tensor]) -> None:
        """Let all later nodes use these weights, by name."""
        later = [*self._pieces[self._number + 1 :], self._rest]
        used = {weight.target for piece in later for node in piece for weight in node.all_input_nodes}
        self._replaced = {name: value for name, value in (self._replaced | dict(weights)).items() if name in used}

    def outputs(self, weights: Mapping[str, Tensor], activation: str = "none") -> Iterator[Tensor]:
        """The program's first output for each sample if it went on with these weights; the walk itself stays.

        `activation` says how linear layers round what these weights multiply, as `optc::linear_quantized` names it; none
        of the kinds with a static scale.
        """
        rest = [node for piece in [*self._pieces[self._number + 1 :], self._rest] for node in piece]
        replaced, activations = self._replaced | dict(weights), dict.fromkeys(weights, activation)
        for environment in self._environments:
            yield environment.copy().run(rest, replaced, set(), activations)


def _pieces(program: Program, wanted: set[fx.Node]) -> tuple[list[list[fx.Node]], list[fx.Node]]:
    """Runs of nodes that end with one that is wanted; and the nodes after them, up to the first output.

    What is made of weights alone, such as a view, comes right before its first use, so that it follows `Walk.replace`.
    """
    pieces: list[list[fx.Node]] = []
    piece: list[fx.Node] = []
    waiting = {node for node in program.graph.nodes if is_of_weights(node)} - wanted
    for node in program.graph.nodes:
        if node.op in ("placeholder", "call_function") and node not in waiting:
            first_uses = [used for used in node.all_input_nodes if used in waiting]
            waiting -= set(first_uses)
            piece += [*first_uses, node]
        if node in wanted:
            pieces.append(piece)
            piece = []
    result = program.graph.output_node().args[0][0]  # type: ignore[index]
    return pieces, piece[: piece.index(result) + 1] if result in piece else piece  # type: ignore[arg-type]


def _needed_later(pieces: list[list[fx.Node]], rest: list[fx.Node]) -> list[set[fx.Node]]:
    """For each piece, the values that later nodes need."""
    needed = {used for node in rest for used in node.all_input_nodes if used.op != "get_attr"} - set(rest)
    found = []
    for piece in reversed(pieces):
        found.append(set(needed))
        needed -= set(piece)
        needed |= {used for node in piece for used in node.all_input_nodes if used.op != "get_attr"} - set(piece)
    return found[::-1]
