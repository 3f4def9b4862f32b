"""The accuracy budget: which scheme for which weights, so that a limit on accuracy or size is kept.

Sensitivities are measured one group of weights and one scheme at a time, the mix is chosen as if they added up, and then
the whole mix is quantized and measured. Where the sum was wrong, the choice is corrected by the ratio and made again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BudgetError, UsageError
from ..passes.base import run_passes
from ..passes.graph import Program, get_weight, value_of
from ..passes.quantize.calibrate import Calibration, Statistics, Walk
from ..passes.quantize.mix import Mix, Option, frontier
from ..passes.quantize.quantize import Quantize, round_weight, scale_dtype
from ..passes.quantize.recipe import KEEP, Assignment, Recipe, Rule, assign
from ..passes.quantize.roles import Candidate, find_candidates
from ..passes.quantize.sensitivity import Group, log_probabilities, measure_sensitivity, tied_groups
from ..runtime.manifest import AccuracyRecord, BudgetRecord, SensitivityRecord
from ..runtime.scheme import GROUPS, find_scheme

_ROUNDS = 4
_CLOSE_ENOUGH = 0.8  # of the limit: not worth another round
_AIM = 0.9  # of the limit, after a mix that did not keep it
_TOKENS = 4096
_LOGITS = 2**27  # numbers of reference logits that are kept: half a GB


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What must be kept.

    Attributes:
        max_kl: mean KL divergence to the unquantized model, nats a token.
        max_ppl_increase: of the perplexity, as a fraction.
        bits: mean bits of a quantized weight, scales included.

    Raises:
        UsageError: a limit that no model can keep or every model keeps.
    """

    max_kl: float | None = None
    max_ppl_increase: float | None = None
    bits: float | None = None

    def __post_init__(self) -> None:
        if self.max_kl is not None and not 0 < self.max_kl < math.inf:
            raise UsageError(f"--max-kl {self.max_kl:g}: expected a number above 0")
        if self.max_ppl_increase is not None and not 0 < self.max_ppl_increase < math.inf:
            raise UsageError(f"--max-ppl-increase {100 * self.max_ppl_increase:g}%: expected a percentage above 0")
        if self.bits is not None and not 1 < self.bits <= 16:
            raise UsageError(f"--bits {self.bits:g}: expected a number of bits a weight, above 1 and at most 16")

    def __str__(self) -> str:
        limits = (
            ("--max-kl", self.max_kl, ""),
            ("--max-ppl-increase", None if self.max_ppl_increase is None else 100 * self.max_ppl_increase, "%"),
            ("--bits", self.bits, ""),
        )
        return ", ".join(f"{name} {value:g}{unit}" for name, value, unit in limits if value is not None)

    def excess(self, divergence: float, ppl_increase: float) -> float:
        """The measured values over their limits: kept if at most 1; 0 without limits."""
        kl = divergence / self.max_kl if self.max_kl is not None else 0.0
        ppl = math.log1p(ppl_increase) / math.log1p(self.max_ppl_increase) if self.max_ppl_increase is not None else 0.0
        return max(kl, ppl)


@dataclass(frozen=True)
class _Attempt:
    """A mix that was quantized and measured as a whole."""

    mix: Mix
    recipe: Recipe
    divergence: float
    ppl_increase: float


def choose_mix(
    program: Program,
    recipe: Recipe,
    budget: Budget,
    calibration: Calibration | None,
    samples: Sequence[Tensor],
    *,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> tuple[Recipe, BudgetRecord]:
    """The recipe whose rules keep the budget in the fewest bytes, or, for `bits`, diverge least at that size.

    Args:
        program: captured, canonical, transforms done; it is not changed.
        recipe: says which weights are to be quantized; their schemes are chosen here.
        budget: at least one limit.
        calibration: for the codes.
        samples: token sequences i64[n] to measure on; not those of the calibration.
        on_progress: called with the fraction that is done.

    Raises:
        BudgetError: no mix keeps the budget; holds the table of what was measured.
    """
    samples = limited(samples, program)
    groups = _groups(program, recipe)
    candidates = {candidate.name: candidate for candidate in find_candidates(program)[0]}
    options = measure_sensitivity(
        program,
        groups,
        samples,
        lambda group: scheme_options(recipe.default, group, budget),
        lambda name, assignment, statistics: _round(program, candidates[name], assignment, statistics),
        on_progress=lambda fraction: on_progress(0.5 * fraction),
    )
    size = sum(group.size for group in groups)
    # Full precision everywhere keeps any budget, but who asks for quantization does not want that.
    mixes = [mix for mix in frontier(options) if any(option.scheme != KEEP for option in mix.choice)]
    if budget.bits is not None:
        mixes = [mix for mix in mixes if 8 * mix.num_bytes <= budget.bits * size]
    attempts: list[_Attempt] = []
    while len(attempts) < _ROUNDS and (mix := _next_mix(mixes, budget, attempts)):
        chosen = with_rules(recipe, program, groups, mix)
        attempts.append(
            _Attempt(mix, chosen, *measure_whole(program, quantized(program, chosen, calibration), samples))
        )
        on_progress(0.5 + 0.5 * len(attempts) / _ROUNDS)
    kept = [attempt for attempt in attempts if budget.excess(attempt.divergence, attempt.ppl_increase) <= 1]
    if kept:
        best = min(kept, key=lambda attempt: attempt.mix.num_bytes)
        return best.recipe, _record(budget, groups, options, len(attempts), best, size)
    nearest = min(attempts, key=lambda a: budget.excess(a.divergence, a.ppl_increase), default=None)
    record = _record(budget, groups, options, len(attempts), nearest, size)
    raise BudgetError(_refusal(record, budget, options, size), details=budget_lines(record))


def _next_mix(mixes: Sequence[Mix], budget: Budget, attempts: Sequence[_Attempt]) -> Mix | None:
    """The mix to try next; none if the best one was found, or there is nothing left to try."""
    if not mixes:
        return None
    if budget.max_kl is None and budget.max_ppl_increase is None:
        return None if attempts else mixes[-1]
    ratio = 1.0  # of what was measured to what was predicted
    if attempts:
        last = attempts[-1]
        excess = budget.excess(last.divergence, last.ppl_increase)
        if _CLOSE_ENOUGH <= excess <= 1 or last.mix.divergence == 0:
            return None
        ratio = excess / budget.excess(last.mix.divergence, math.expm1(last.mix.divergence))
        ratio /= _AIM if excess > 1 else 1
    tried = {attempt.mix for attempt in attempts}
    failed = [a.mix.num_bytes for a in attempts if budget.excess(a.divergence, a.ppl_increase) > 1]
    predicted = [mix for mix in mixes if ratio * budget.excess(mix.divergence, math.expm1(mix.divergence)) <= 1]
    larger = [mix for mix in predicted or mixes[-1:] if mix.num_bytes > max(failed, default=-1)]
    return larger[0] if larger and larger[0] not in tried else None


def scheme_options(default: str, group: Group, budget: Budget) -> list[str]:
    """The schemes to choose from for a group: those around a preset's, and full precision.

    Three bits only if nothing else is that small: they cost much accuracy, and are no faster.
    """
    if not default.startswith("w4a16"):
        return [default, KEEP]
    sizes = [f"g{size}" for size in reversed(GROUPS) if group.columns % size == 0] or ["channel"]
    names = [f"w4a16-{size}" for size in sizes]
    if budget.bits is not None and budget.bits < find_scheme(names[0]).weights.bits_per_weight:
        names += [f"w3a16-{size}" for size in sizes]
    return [*names, "w8a16", KEEP]


def _groups(program: Program, recipe: Recipe) -> list[Group]:
    candidates, _ = find_candidates(program)
    names = {c.name: program.sources.get(c.name, c.name) for c in candidates}
    assigned = assign(recipe, candidates, names)
    return tied_groups([c for c in candidates if c.name in assigned and c.linears])


def _round(
    program: Program, candidate: Candidate, assignment: Assignment, statistics: Statistics
) -> tuple[Tensor, int]:
    """A weight as its codes mean it, and its bytes; rounded to nearest, which costs little and ranks the same."""
    original = get_weight(program.module, candidate.name).detach()
    weight, args = candidate.as_matrix(original).float(), assignment.scheme.weights
    found = round_weight(weight, assignment, scale_dtype(original.dtype, weight, args), statistics)
    return candidate.from_matrix(found.dequantize().to(original.dtype)), found.pack().num_bytes()


def with_rules(recipe: Recipe, program: Program, groups: Sequence[Group], mix: Mix) -> Recipe:
    """The recipe with a rule for each weight of the mix, before all others."""
    rules = [
        Rule(role=role, name=program.sources.get(weight, weight), scheme=option.scheme)
        for group, option in zip(groups, mix.choice, strict=True)
        for weight, role in zip(group.weights, group.roles, strict=True)
    ]
    return recipe.model_copy(update={"rules": (*rules, *recipe.rules)})


def quantized(program: Program, recipe: Recipe, calibration: Calibration | None) -> Program:
    """A copy of the program, quantized by the recipe."""
    copy = program.copy()
    run_passes(copy, [Quantize(recipe=recipe, calibration=calibration)], facts={"canonical"})
    return copy


@torch.no_grad()
def measure_whole(reference: Program, found: Program, samples: Sequence[Tensor]) -> tuple[float, float]:
    """Mean KL divergence of one program from another in nats a token, and the increase of the perplexity as a fraction."""
    divergence, increase, tokens = 0.0, 0.0, 0
    with Walk(reference, samples, []) as first, Walk(found, samples, []) as second:
        for sample, a, b in zip(samples, first.outputs({}), second.outputs({}), strict=True):
            expected, actual = log_probabilities(a), log_probabilities(b)
            divergence += float((expected.exp() * (expected - actual)).sum())
            following = sample[1:, None]
            increase += float((expected[:-1].gather(1, following) - actual[:-1].gather(1, following)).sum())
            tokens += len(sample)
    return max(divergence / tokens, 0.0), math.expm1(increase / (tokens - len(samples)))


def limited(samples: Sequence[Tensor], program: Program) -> Sequence[Tensor]:
    """As many of the samples as their logits may take memory; at least one."""
    vocabulary = int(value_of(program.graph.output_node().args[0][0]).shape[-1])  # type: ignore[index]
    limit = min(_TOKENS, _LOGITS // vocabulary)
    return samples[: max(1, limit // max(len(samples[0]), 1))]


def check_budget(original: Program, found: Program, budget: Budget, samples: Sequence[Tensor]) -> BudgetRecord:
    """Measure a quantized program whose schemes the user chose.

    Raises:
        BudgetError: it does not keep the budget.
    """
    assert found.quantization is not None
    bits = found.quantization.bits_per_weight
    divergence, increase = measure_whole(original, found, limited(samples, original))
    if budget.excess(divergence, increase) > 1 or (budget.bits is not None and bits > budget.bits):
        raise BudgetError(
            f"the budget ({budget}) is not kept: a mean KL divergence of {divergence:.5f} nats and {100 * increase:+.2f}% "
            f"perplexity at {bits:.3f} bits a weight; choose a scheme of more bits, or --int4 for the best mix"
        )
    return BudgetRecord(
        max_kl=budget.max_kl,
        max_ppl_increase=budget.max_ppl_increase,
        bits=budget.bits,
        kl=divergence,
        ppl_increase=increase,
        bits_per_weight=bits,
        rounds=1,
        groups=(),
    )


def check_accuracy(budget: Budget, found: AccuracyRecord) -> None:
    """Compare what the artifact was measured at with the budget.

    Raises:
        BudgetError: it does not keep the budget.
    """
    kl, increase = found.figures.kl_mean, found.figures.perplexity_increase
    assert kl is not None and increase is not None
    if budget.excess(kl.value, increase.value) > 1:
        raise BudgetError(
            f"the budget ({budget}) is kept on the calibration data and not on {found.text}: there the artifact has a mean "
            f"KL divergence of {kl.value:.5f} nats and {100 * increase.value:+.2f}% perplexity; nothing was written; ask for "
            "less, or calibrate on text that is more like it"
        )


def _record(
    budget: Budget,
    groups: Sequence[Group],
    options: Sequence[Sequence[Option]],
    rounds: int,
    best: _Attempt | None,
    size: int,
) -> BudgetRecord:
    chosen = best.mix.choice if best else [None] * len(groups)
    return BudgetRecord(
        max_kl=budget.max_kl,
        max_ppl_increase=budget.max_ppl_increase,
        bits=budget.bits,
        kl=best.divergence if best else None,
        ppl_increase=best.ppl_increase if best else None,
        bits_per_weight=8 * best.mix.num_bytes / size if best else None,
        rounds=rounds,
        groups=tuple(
            SensitivityRecord(
                weights=group.weights,
                chosen=option.scheme if option else None,
                kl={o.scheme: o.divergence for o in found},
                bits_per_weight={o.scheme: 8 * o.num_bytes / group.size for o in found},
            )
            for group, found, option in zip(groups, options, chosen, strict=True)
        ),
    )


def _refusal(record: BudgetRecord, budget: Budget, options: Sequence[Sequence[Option]], size: int) -> str:
    if record.kl is None or record.ppl_increase is None:
        smallest = 8 * sum(min(option.num_bytes for option in found) for found in options) / size
        return f"--bits {budget.bits:g}: the smallest mix has {smallest:.3f} bits a weight; ask for at least that"
    return (
        f"the budget ({budget}) cannot be kept: the best mix of {record.rounds} tried has a mean KL divergence of "
        f"{record.kl:.5f} nats and {100 * record.ppl_increase:+.2f}% perplexity at {record.bits_per_weight:.3f} bits a "
        "weight; allow more of either"
    )


def budget_lines(record: BudgetRecord) -> list[str]:
    """The table of what was measured, as text."""
    sizes = {scheme: bits for group in record.groups for scheme, bits in group.bits_per_weight.items()}
    schemes = sorted(sizes, key=sizes.__getitem__)
    lines = ["mean KL divergence (nats) with one group alone in each scheme:"]
    lines.append("  ".join([f"{name:>12}" for name in schemes] + ["chosen        weights"]))
    for group in record.groups:
        cells = [f"{group.kl[name]:12.6f}" if name in group.kl else f"{'-':>12}" for name in schemes]
        lines.append("  ".join([*cells, f"{group.chosen or '-':<12}  {', '.join(group.weights)}"]))
    return lines
