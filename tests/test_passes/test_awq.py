"""AWQ: the factors it finds, that they change nothing before rounding, and that rounding then hurts less."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from torch import Tensor

import optc
from optc.errors import UsageError
from optc.optimizer.capture import capture
from optc.optimizer.checkpoint import load_checkpoint
from optc.passes.base import Pass, run_passes
from optc.passes.canonicalize import Canonicalize
from optc.passes.graph import Program, get_weight
from optc.passes.quantize.awq import AWQ, _output_energy, _proposals, awq_factors
from optc.passes.quantize.calibrate import Calibration, Statistics
from optc.passes.quantize.fold import find_sites
from optc.passes.quantize.quantize import Quantize
from optc.passes.quantize.recipe import Assignment, Recipe, Rounding
from optc.passes.quantize.rtn import rtn
from optc.passes.quantize.smoothquant import SmoothQuant
from optc.passes.verify import Probe, run_float32
from optc.runtime.scheme import find_scheme

from ..families import MAX_LEN, VOCAB_SIZE, save_model

_ROUNDINGS: tuple[Rounding, ...] = ("rtn", "hqq")
BUNDLED = Path(optc.__file__).parent / "examples/tiny-llama"


def make_program(name: str, folder: Path) -> Program:
    checkpoint = load_checkpoint(str(save_model(name, folder)))
    program, _ = capture(checkpoint.model, checkpoint.max_model_len)
    run_passes(program, [Canonicalize()])
    return program


def make_calibration() -> Calibration:
    generator = torch.Generator().manual_seed(0)
    return Calibration(
        tuple(torch.randint(0, VOCAB_SIZE, (24,), generator=generator) for _ in range(4)), source="random", seed=0
    )


@pytest.mark.parametrize(("name", "sites", "declined"), [("llama", 8, 0), ("gpt2", 6, 2), ("olmo2", 4, 10)])
def test_nothing_changes_before_rounding(name: str, sites: int, declined: int, tmp_path: Path) -> None:
    program = make_program(name, tmp_path / name)
    recipe = Recipe(default="w4a16-g32", rounding="rtn", transforms=("awq",))
    probe = Probe.random(VOCAB_SIZE, MAX_LEN)
    (record,) = run_passes(
        program, [AWQ(recipe=recipe, calibration=make_calibration())], facts={"canonical"}, probe=probe
    )
    assert record.name == "awq"
    assert (record.matches, len(record.declined)) == (sites, declined)
    assert record.max_error is not None and record.max_error < 1e-4
    layout = "folded-transposed" if name == "gpt2" else "folded"
    assert layout in program.layouts.values()


def test_fp8_gains_nothing_and_is_left_alone(tmp_path: Path) -> None:
    program = make_program("llama", tmp_path / "llama")
    recipe = Recipe(default="fp8-weight", transforms=("awq",))
    (record,) = run_passes(program, [AWQ(recipe=recipe, calibration=make_calibration())], facts={"canonical"})
    assert record.matches == 0
    assert "folded" not in program.layouts.values()


def test_the_factors_give_the_least_output_error_of_all_that_are_tried(canonical: Program) -> None:
    """On real inputs with some large channels, against the layer's output computed as it is."""
    site = next(s for s in find_sites(canonical)[0] if "v_proj" in s.producer.weights[0][0])
    (name,) = site.names
    weight = get_weight(canonical.module, name).detach()
    torch.manual_seed(0)
    x = torch.randn(500, weight.shape[1]) * torch.exp(1.5 * torch.randn(weight.shape[1]))
    statistics = Statistics(x.t() @ x / len(x), x.abs().amax(dim=0), x.abs().mean(dim=0), len(x))
    scheme = find_scheme("w3a16-channel")
    found = awq_factors(site, {name: weight}, {name: Assignment("w3a16-channel", scheme, "rtn")}, statistics)

    def error(factors: Tensor) -> float:
        columns = factors[site.index]
        importance = statistics.hessian.diagonal() / columns.square()
        scaled = weight * columns
        grid = (1.0, 0.9, 0.8, 0.7, 0.6)
        rounded = rtn(scaled, scheme.weights, torch.float16, importance=importance, grid=grid).dequantize()
        return ((x / columns) @ rounded.t() - x @ weight.t()).square().sum(dim=1).mean().item()

    tried = [error(factors) for factors in _proposals(site, {name: weight}, statistics)]
    assert error(found) <= min(tried) * 1.001
    assert error(found) < 0.97 * error(torch.ones_like(found))


def test_the_error_from_the_hessian_is_that_of_the_outputs() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(200, 12), torch.randn(7, 12)
    expected = (x @ weight.t()).square().sum(dim=1).mean().item()
    assert _output_energy(weight, x.t() @ x / 200) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("transform", [AWQ, SmoothQuant])
def test_inputs_and_weights_that_are_no_numbers_are_named(transform: Any, tmp_path: Path) -> None:
    recipe = Recipe(default="w8a8", rounding="rtn")
    for weight, factor, message in (
        ("input_layernorm", 1e30, r"the inputs of model\.layers\.0\.self_attn\.q_proj\.weight, .* too large to square"),
        ("self_attn.q_proj", float("nan"), r"model\.layers\.0\.self_attn\.q_proj\.weight holds NaN"),
    ):
        program = make_program("llama", tmp_path / weight)
        (name,) = (n for n, source in program.sources.items() if source == f"model.layers.0.{weight}.weight")
        with torch.no_grad():
            get_weight(program.module, name).mul_(factor)
        with pytest.raises(UsageError, match=message):
            run_passes(program, [transform(recipe=recipe, calibration=make_calibration())], facts={"canonical"})


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "of_hqq"), [(3, 0.95), (4, 1.0)])
def test_the_bundled_model_is_nearer_to_itself_with_awq_and_with_hqq(bits: int, of_hqq: float) -> None:
    """KL divergence on held-out text, less than that of rounding to nearest in the same scheme."""
    checkpoint = load_checkpoint(str(BUNDLED))
    assert checkpoint.tokenizer is not None
    program, _ = capture(checkpoint.model, checkpoint.max_model_len)
    run_passes(program, [Canonicalize()])
    tokenizer = tokenizers.Tokenizer.from_str(checkpoint.tokenizer.json)
    windows, samples = (
        tokenizer.encode((BUNDLED / f"{file}.txt").read_text()).ids for file in ("heldout", "calibration")
    )
    calibration = Calibration(tuple(torch.tensor(samples[i : i + 256]) for i in range(0, 24 * 512, 512)), "text", 0)
    runs = [[torch.tensor(windows[i : i + 256])[None], torch.arange(256)[None]] for i in range(0, 6 * 512, 512)]
    recipe = Recipe(default=f"w{bits}a16-g128", rounding="rtn")
    plain = Quantize(recipe=recipe)
    measured = replace(plain, calibration=calibration)
    awq = AWQ(recipe=recipe, calibration=calibration)

    def divergence(passes: list[Pass]) -> float:
        copy = program.copy()
        run_passes(copy, passes, facts={"canonical"})
        pairs = zip(reference, run_float32(copy.module, runs), strict=True)
        return sum(torch.nn.functional.kl_div(b.log_softmax(-1), a, log_target=True).item() for a, b in pairs)

    with torch.no_grad():
        reference = [rows.log_softmax(-1) for rows in run_float32(program.module, runs)]
        assert divergence([awq, measured]) < divergence([plain])
        scheme = f"w{bits}a16-g32-asym"
        nearest, hqq = (Quantize(recipe=Recipe(default=scheme, rounding=rounding)) for rounding in _ROUNDINGS)
        assert divergence([hqq]) < of_hqq * divergence([nearest])
