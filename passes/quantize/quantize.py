"""Store the weights of linear layers, experts and embeddings as codes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ...errors import UsageError
from ...runtime.manifest import Quantization, QuantizedLayer
from ...runtime.ops.quantized import FP8_MAX, QuantizedWeight, StoredWeight
from ...runtime.scheme import QuantizationArgs
from ..base import Pass, Result
from ..graph import Program, add_weight, call, get_weight, replacing, value_of
from .calibrate import Calibration, Statistics, calibrate
from .given import GivenWeight, name_schemes
from .gptq import gptq, make_good
from .hqq import hqq
from .recipe import Assignment, Recipe, activation_args, assign
from .roles import Candidate, find_candidates
from .rtn import largest_of_blocks, rtn

optc = torch.ops.optc
_WEIGHTS_AT_ONCE = 2**23


@dataclass(frozen=True, kw_only=True)
class Quantize(Pass):
    """linear(x, weight [N, K], bias)  ->  optc.linear_quantized(x, codes, scale, zero?, group_index?, input_scale?, bias)
    optc.grouped_mm(x, weight [G, N, K] transposed or [G, K, N], offsets)  ->
        optc.grouped_mm_quantized(x, codes, scale, zero?, group_index?, input_scale?, offsets), codes of [G * N, K]
    embedding(weight [V, K], ids)  ->  optc.embedding_quantized(ids, codes, scale, zero?, group_index?)

    The recipe says which weights get which scheme, and how codes are chosen; weights that the checkpoint already has as
    codes keep them, to the bit. A weight that several nodes use is stored once. Records what it did in
    `program.quantization`. Lossy: the new graph must compute what the old one does with the weights that the codes mean;
    how good those are `optc eval` says.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    provides: ClassVar[frozenset[str]] = frozenset({"quantized"})
    changes_weights: ClassVar[bool] = True

    recipe: Recipe
    calibration: Calibration | None = None
    given: Mapping[str, GivenWeight] = field(default_factory=dict, repr=False)
    on_progress: Callable[[float], None] = field(default=lambda fraction: None, repr=False)

    def config(self) -> dict[str, Any]:
        calibration = self.calibration.config() if self.calibration else None
        return {"recipe": self.recipe, "calibration": calibration, "given": sorted(self.given)}

    def apply(self, program: Program) -> Result:
        result = Result()
        candidates, declined = find_candidates(program)
        for node, reason in declined:
            result.decline(node, reason)
        names = {candidate.name: program.sources.get(candidate.name, candidate.name) for candidate in candidates}
        given = {name: self.given[source] for name, source in names.items() if source in self.given}
        scheme_names = name_schemes(given)
        assignments = assign(self.recipe, [c for c in candidates if c.name not in given], names)
        assignments |= {
            name: Assignment(scheme_names[weight.scheme], weight.scheme, "given") for name, weight in given.items()
        }
        chosen = [candidate for candidate in candidates if candidate.name in assignments]
        for candidate in candidates:
            if candidate.name not in assignments:
                result.decline((*candidate.linears, *candidate.embeddings)[0], f"{candidate.role}: full precision")
        work = _Work(program, assignments, given)
        for candidate in chosen:
            check_finite(names[candidate.name], get_weight(program.module, candidate.name))
        if self.calibration is not None:
            work.calibrated(chosen, self.calibration, self.on_progress)
        work.rest(chosen)
        result.meant = _Meant({candidate.name: (candidate, work.stored[candidate.name]) for candidate in chosen})
        layers = tuple(_rewrite(program, candidate, work, names[candidate.name]) for candidate in chosen)
        schemes = {assignment.scheme_name: assignment.scheme for assignment in assignments.values()}
        weights = sum(math.prod(layer.shape) for layer in layers)
        program.quantization = Quantization(
            schemes=dict(sorted(schemes.items())),
            layers=layers,
            kv_cache_scheme=activation_args(self.recipe.kv_cache) if self.recipe.kv_cache else None,
            calibration=self.calibration.record() if self.calibration else None,
            bits_per_weight=sum(layer.bits_per_weight * math.prod(layer.shape) for layer in layers) / max(1, weights),
        )
        result.matches = sum(len(candidate.linears) + len(candidate.embeddings) for candidate in chosen)
        return result


class _Meant(Mapping[str, Tensor]):
    """The weights as their codes mean them, f32 in the layout of the float program; each is computed when it is asked for."""

    def __init__(self, stored: Mapping[str, tuple[Candidate, StoredWeight]]) -> None:
        self.stored = stored

    def __getitem__(self, name: str) -> Tensor:
        candidate, stored = self.stored[name]
        return candidate.from_matrix(stored.dequantize())

    def __contains__(self, name: object) -> bool:
        return name in self.stored

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


class _Work:
    """The codes chosen so far."""

    def __init__(
        self, program: Program, assignments: Mapping[str, Assignment], given: Mapping[str, GivenWeight]
    ) -> None:
        self.program, self.assignments = program, dict(assignments)
        self.stored: dict[str, StoredWeight] = {name: weight.stored for name, weight in given.items()}
        self.input_scales: dict[str, Tensor] = {
            name: weight.input_scale for name, weight in given.items() if weight.input_scale is not None
        }
        self.errors: dict[str, float | None] = dict.fromkeys(given)

    def calibrated(
        self, chosen: list[Candidate], calibration: Calibration, on_progress: Callable[[float], None]
    ) -> None:
        """Choose the codes of linear layers one input after the other, each with those before it quantized.

        Those of a weight that has several inputs are chosen at the last, for all of them together; until then the samples
        see it as it is.
        """
        waiting = {candidate.name: 0 for candidate in chosen if candidate.name not in self.stored}
        by_input: dict[fx.Node, list[Candidate]] = {}
        for candidate in chosen:
            if candidate.name in waiting:
                inputs = dict.fromkeys(linear.all_input_nodes[0] for linear in candidate.linears)
                waiting[candidate.name] = len(inputs)
                for x in inputs:
                    by_input.setdefault(x, []).append(candidate)
        seen: dict[str, Statistics] = {}

        def visit(x: fx.Node, statistics: Statistics) -> dict[str, Tensor]:
            replaced = {}
            for candidate in by_input[x]:
                name = candidate.name
                before = seen.pop(name, None)
                found = statistics if before is None else before.together_with(statistics)
                waiting[name] -= 1
                if waiting[name]:
                    seen[name] = found
                else:
                    replaced[name] = self.choose(candidate, found)
            return replaced

        # Not of experts: their rows are sorted, and the quantized model may send a token to others than the original does.
        with_original = [
            x
            for x, found in by_input.items()
            if any(self.assignments[c.name].rounding == "gptq" and c.experts is None for c in found)
        ]
        calibrate(
            self.program, calibration, list(by_input), visit, with_original=with_original, on_progress=on_progress
        )

    def rest(self, chosen: list[Candidate]) -> None:
        for candidate in chosen:
            if candidate.name not in self.stored:
                self.choose(candidate, None)

    def choose(self, candidate: Candidate, statistics: Statistics | None) -> Tensor:
        """Choose the codes of a weight; gives the weight as they mean it, in its dtype and as it lies in the program.

        All experts of a layer are rounded on the inputs of all of them: one that the data hardly reaches would else be
        rounded on next to nothing.
        """
        name = candidate.name
        if statistics is None and self.assignments[name].rounding == "gptq":
            self.assignments[name] = replace(self.assignments[name], rounding="rtn")  # what is done is what is recorded
        assignment, original = self.assignments[name], get_weight(self.program.module, name).detach()
        weight = candidate.as_matrix(original).float()
        quantized = round_weight(
            weight, assignment, scale_dtype(original.dtype, weight, assignment.scheme.weights), statistics
        )
        dequantized = quantized.dequantize()
        self.stored[name] = quantized.pack()
        norm = weight.square().mean().sqrt().item()
        self.errors[name] = (dequantized - weight).square().mean().sqrt().item() / norm if norm else 0.0
        activation = assignment.scheme.activation
        if activation.endswith("static") and candidate.linears:
            assert statistics is not None
            largest = 127.0 if activation.startswith("int8") else FP8_MAX
            self.input_scales[name] = (statistics.largest.max() / largest).clamp_min(1e-12).reshape(1)
        return candidate.from_matrix(dequantized.to(original.dtype))


def round_weight(
    weight: Tensor, assignment: Assignment, dtype: torch.dtype, statistics: Statistics | None
) -> QuantizedWeight:
    """Weight f32[N, K] as codes, chosen as the assignment says, some rows at a time: the work takes 40 bytes a weight."""
    rows, _ = assignment.scheme.weights.block(*weight.shape)
    at_once = max(1, _WEIGHTS_AT_ONCE // (rows * weight.shape[1])) * rows
    parts = [_round_rows(part, assignment, dtype, statistics) for part in weight.split(at_once)]
    if len(parts) == 1:
        return parts[0]
    zeros = [part.zero for part in parts if part.zero is not None]
    return replace(
        parts[0],
        codes=torch.cat([part.codes for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        zero=torch.cat(zeros) if zeros else None,
    )


def _round_rows(
    weight: Tensor, assignment: Assignment, dtype: torch.dtype, statistics: Statistics | None
) -> QuantizedWeight:
    args = assignment.scheme.weights
    if assignment.rounding == "hqq":
        return hqq(weight, args, dtype)
    if assignment.rounding == "gptq":
        assert statistics is not None
        cross = statistics.cross
        better = weight if cross is None else make_good(weight, statistics.factors, cross)
        return gptq(better, statistics.factors, args, dtype)
    importance = statistics.hessian.diagonal() if statistics is not None else None
    return rtn(weight, args, dtype, mse=assignment.rounding != "rtn-minmax", importance=importance)


def scale_dtype(model_dtype: torch.dtype, weight: Tensor, args: QuantizationArgs) -> torch.dtype:
    """Scales are stored in 16 bits, bfloat16 as the model or else float16; in float32 if any is outside float16's range.

    Below its smallest normal number float16 has fewer and fewer bits, so that rows or groups of small weights would lose
    theirs.
    """
    if model_dtype == torch.bfloat16:
        return torch.bfloat16
    steps = FP8_MAX if args.type == "float" else 2 ** (args.num_bits - 1)
    scales = largest_of_blocks(weight, args) / steps
    limits = torch.finfo(torch.float16)
    fits = (scales == 0) | ((scales >= limits.smallest_normal) & (scales * steps < limits.max))
    return torch.float16 if fits.all() else torch.float32


def check_finite(name: str, weight: Tensor) -> None:
    """Raises UsageError: the weight holds NaN or Inf."""
    if not torch.isfinite(weight).all():
        kind = "NaN" if torch.isnan(weight).any() else "Inf"
        raise UsageError(f"{name} holds {kind}: it cannot be quantized; the checkpoint is damaged, download it again")


def _rewrite(program: Program, candidate: Candidate, work: _Work, source: str) -> QuantizedLayer:
    """Replace every use of the weight; gives its record."""
    name, stored, assignment = candidate.name, work.stored[candidate.name], work.assignments[candidate.name]
    parts = stored.tensors()
    if name in work.input_scales:
        parts["input_scale"] = work.input_scales[name]
    constants = {part: f"{name}_{part}" for part in parts}
    for which, value in parts.items():
        add_weight(program, constants[which], value, source, layout="quantized")
    bits, block = stored.args.num_bits, list(stored.args.block(*stored.shape))
    activation = assignment.scheme.activation

    def part(which: str) -> fx.Node | None:
        return program.graph.get_attr(constants[which]) if which in constants else None

    for node in candidate.linears:
        x, _, last = (*node.args, None)[:3]  # of experts the last are the offsets, of a linear layer it is the bias
        op = optc.linear_quantized if candidate.experts is None else optc.grouped_mm_quantized
        with replacing(program.graph, node) as new:
            names = ("codes", "scale", "zero", "group_index", "input_scale")
            inputs = (x, *(part(which) for which in names), last, bits, block, activation)
            new.append(call(program.graph, op.default, *inputs))
    for node in candidate.embeddings:
        ids, dtype = node.args[1], value_of(node).dtype
        with replacing(program.graph, node) as new:
            inputs = (ids, *(part(which) for which in ("codes", "scale", "zero", "group_index")))
            how = (stored.shape[1], bits, block, dtype)
            new.append(call(program.graph, optc.embedding_quantized.default, *inputs, *how))
    return QuantizedLayer(
        name=source,
        role=candidate.role,
        shape=candidate.shape,
        experts=candidate.experts,
        transposed=candidate.transposed or program.layouts.get(name, "plain").endswith("transposed"),
        scheme=assignment.scheme_name,
        algorithm=assignment.rounding,
        constants=constants,
        bits_per_weight=8 * stored.num_bytes() / math.prod(candidate.shape),
        error=work.errors[name],
    )
