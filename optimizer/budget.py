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
_LEAST = 64
_ROWS = 128  # of logits at a time
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
        for name, value in vars(self).items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise UsageError(f"{name}={value!r}: expected a number")
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

    def excess(self, measured: Measured) -> float:
        """The measured values over their limits: kept if at most 1; 0 without limits."""
        kl = measured.divergence / self.max_kl if self.max_kl is not None else 0.0
        ppl = measured.log_ppl / math.log1p(self.max_ppl_increase) if self.max_ppl_increase is not None else 0.0
        return max(kl, ppl) if math.isfinite(kl + ppl) else math.inf

    def keeps(self, measured: Measured) -> bool:
        return self.excess(measured) <= 1


@dataclass(frozen=True)
class Measured:
    """Mean KL divergence in nats a token, and the increase of the perplexity's logarithm."""

    divergence: float
    log_ppl: float

    @property
    def ppl_increase(self) -> float:
        """As a fraction."""
        return math.expm1(min(self.log_ppl, 100.0))

    def __str__(self) -> str:
        return f"a mean KL divergence of {self.divergence:.3g} nats and {100 * self.ppl_increase:+.3g}% perplexity"


@dataclass(frozen=True)
class _Attempt:
    """A mix that was quantized and measured as a whole."""

    mix: Mix
    recipe: Recipe
    measured: Measured


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
    groups = _groups(program, recipe)
    candidates = {candidate.name: candidate for candidate in find_candidates(program)[0]}
    options = measure_sensitivity(
        program,
        groups,
        limited(samples, program),
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
        attempts.append(_Attempt(mix, chosen, measure_whole(program, quantized(program, chosen, calibration), samples)))
        on_progress(0.5 + 0.5 * len(attempts) / _ROUNDS)
    kept = [attempt for attempt in attempts if budget.keeps(attempt.measured)]
    if kept:
        best = min(kept, key=lambda attempt: attempt.mix.num_bytes)
        return best.recipe, _record(budget, groups, options, len(attempts), best, size)
    nearest = min(attempts, key=lambda attempt: budget.excess(attempt.measured), default=None)
    record = _record(budget, groups, options, len(attempts), nearest, size)
    raise BudgetError(_refusal(record, budget, options, size), details=budget_lines(record))


def _next_mix(mixes: Sequence[Mix], budget: Budget, attempts: Sequence[_Attempt]) -> Mix | None:
    """The mix to try next; none if a good one was found, or there is nothing left to try.

    It lies between the largest that failed and the smallest that kept the budget, and, by the ratio of what was measured
    to what was predicted so far, just keeps it. If none has by the last round, that tries the largest of all.
    """
    if budget.max_kl is None and budget.max_ppl_increase is None:
        return None if attempts or not mixes else mixes[-1]
    failed = [attempt.mix.num_bytes for attempt in attempts if not budget.keeps(attempt.measured)]
    kept = [attempt.mix.num_bytes for attempt in attempts if budget.keeps(attempt.measured)]
    between = [mix for mix in mixes if max(failed, default=-1) < mix.num_bytes < min(kept, default=2**63)]
    if not between or (attempts and _CLOSE_ENOUGH <= budget.excess(attempts[-1].measured) <= 1):
        return None
    if not kept and len(attempts) == _ROUNDS - 1:
        return between[-1]
    ratio = 1.0
    if attempts and (predicted := budget.excess(_predicted(attempts[-1].mix))):
        excess = budget.excess(attempts[-1].measured)
        ratio = excess / predicted / (_AIM if excess > 1 else 1)
    likely = [mix for mix in between if ratio * budget.excess(_predicted(mix)) <= 1]
    return likely[0] if likely else None if kept else between[-1]


def _predicted(mix: Mix) -> Measured:
    """What a mix would be measured at if divergences added up; on text like the model's own, perplexity rises by them."""
    return Measured(mix.divergence, mix.divergence)


def scheme_options(default: str, group: Group, budget: Budget) -> list[str]:
    """The schemes to choose from for a group: those around a preset's, and full precision.

    Three bits only if nothing else is that small: they cost much accuracy, and are no faster.
    """
    width = default.partition("-")[0]
    if width not in ("w4a16", "w4a8g"):
        return [default, KEEP]
    sizes = [f"g{size}" for size in reversed(GROUPS) if group.columns % size == 0] or ["channel"]
    names = [f"{width}-{size}" for size in sizes]
    if budget.bits is not None and budget.bits < find_scheme(names[0]).weights.bits_per_weight:
        names += [f"w3a16-{size}" for size in sizes]
    return [*names, "w8a16" if width == "w4a16" else "w8a8g-channel", KEEP]


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
    return candidate.from_matrix(found.dequantize()), found.pack().num_bytes()


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
def measure_whole(reference: Program, found: Program, samples: Sequence[Tensor]) -> Measured:
    """How far one program is from another on token sequences i64[n], both computed in float32.

    Weights are what is compared, and the activations that linear layers round; no program here has a KV cache.
    """
    divergence, log_ppl, tokens = 0.0, 0.0, 0
    with Walk(reference, samples, [], float32=True) as first, Walk(found, samples, [], float32=True) as second:
        for sample, a, b in zip(samples, first.outputs({}), second.outputs({}), strict=True):
            following = torch.cat([sample[1:], sample[:1]])[
                :, None
            ]  # of the last token none is known; its row is left out
            for start in range(0, len(sample), _ROWS):
                rows = slice(start, start + _ROWS)
                expected, actual = log_probabilities(a[:, rows]), log_probabilities(b[:, rows])
                divergence += float((expected.exp() * (expected - actual)).sum())
                loss = (expected - actual).gather(1, following[rows])[:, 0]
                log_ppl += float(loss[: len(sample) - 1 - start].sum())
            tokens += len(sample)
    return Measured(max(divergence / tokens, 0.0), log_ppl / (tokens - len(samples)))


def limited(samples: Sequence[Tensor], program: Program) -> list[Tensor]:
    """As many of the samples as sensitivities are measured on, cut if the logits of one would take too much memory."""
    vocabulary = int(value_of(program.graph.output_node().args[0][0]).shape[-1])  # type: ignore[index]
    left = max(_LEAST, min(_TOKENS, _LOGITS // vocabulary))
    found: list[Tensor] = []
    for sample in samples:
        if left < 2:
            break
        found.append(sample[:left])
        left -= len(sample)
    return found


def check_budget(original: Program, found: Program, budget: Budget, samples: Sequence[Tensor]) -> BudgetRecord:
    """Measure a quantized program whose schemes the user chose.

    Raises:
        BudgetError: it does not keep the budget.
    """
    measured, bits = measure_whole(original, found, samples), _bits(original, found)
    if not budget.keeps(measured) or (budget.bits is not None and bits > budget.bits):
        wanted = "more" if not budget.keeps(measured) else "fewer"
        raise BudgetError(
            f"the budget ({budget}) is not kept: {measured} at {bits:.3f} bits a weight; choose a scheme of {wanted} bits, or "
            "--int4 for the best mix",
            details=_measured_lines(budget, measured, bits),
        )
    return BudgetRecord(
        max_kl=budget.max_kl,
        max_ppl_increase=budget.max_ppl_increase,
        bits=budget.bits,
        kl=measured.divergence,
        ppl_increase=measured.ppl_increase,
        bits_per_weight=bits,
        rounds=1,
        groups=(),
    )


def _bits(original: Program, found: Program) -> float:
    """Mean bits of the weights of attention and MLP layers, and of all others that are quantized, as they are stored."""
    quantization = found.quantization
    assert quantization is not None
    stored = {layer.name: layer.bits_per_weight for layer in quantization.layers}
    bits, weights = 0.0, 0
    for candidate in find_candidates(original)[0]:
        name, size = original.sources.get(candidate.name, candidate.name), candidate.shape[0] * candidate.shape[1]
        if name in stored or candidate.role in ("attention", "mlp"):
            bits += size * stored.get(name, 8 * get_weight(original.module, candidate.name).element_size())
            weights += size
    return bits / weights


def check_accuracy(budget: Budget, found: AccuracyRecord) -> None:
    """Compare what the artifact was measured at with the budget.

    Raises:
        BudgetError: it does not keep the budget.
    """
    kl, increase = found.figures.kl_mean, found.figures.perplexity_increase
    assert kl is not None and increase is not None
    measured = Measured(kl.value, math.log1p(increase.value))
    if not budget.keeps(measured):
        raise BudgetError(
            f"the budget ({budget}) is not kept on {found.text}: there the artifact has {measured}; nothing was written; ask "
            "for less, or calibrate on text that is more like it",
            details=_measured_lines(budget, measured, None),
        )


def _measured_lines(budget: Budget, measured: Measured, bits: float | None) -> list[str]:
    """What was measured beside its limits, as text."""
    rows = [
        ("mean KL divergence, nats", measured.divergence, budget.max_kl, ".6f"),
        ("perplexity increase", measured.ppl_increase, budget.max_ppl_increase, ".3%"),
        ("bits a weight", bits, budget.bits, ".3f"),
    ]
    lines = [f"{'':<26}{'measured':>12}{'limit':>12}"]
    for name, value, limit, form in rows:
        if value is not None:
            lines.append(f"{name:<26}{value:>12{form}}" + (f"{'-':>12}" if limit is None else f"{limit:>12{form}}"))
    return lines


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
        kl=best.measured.divergence if best else None,
        ppl_increase=best.measured.ppl_increase if best else None,
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
        f"{record.kl:.3g} nats and {100 * record.ppl_increase:+.3g}% perplexity at {record.bits_per_weight:.3f} bits a "
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
