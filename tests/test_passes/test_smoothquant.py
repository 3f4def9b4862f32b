"""SmoothQuant: its formula, that it changes nothing before rounding, and that rounding then hurts less."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from optc.optimizer.capture import capture
from optc.optimizer.checkpoint import load_checkpoint
from optc.passes.base import run_passes
from optc.passes.canonicalize import Canonicalize
from optc.passes.graph import Program, get_weight, set_weight
from optc.passes.quantize.calibrate import Calibration
from optc.passes.quantize.fold import find_sites
from optc.passes.quantize.quantize import Quantize
from optc.passes.quantize.recipe import Recipe, Rule
from optc.passes.quantize.smoothquant import SmoothQuant
from optc.passes.verify import Probe

from ..families import MAX_LEN, VOCAB_SIZE, save_model

NORM = "model.layers.0.input_layernorm.weight"


def make_program(name: str, folder: Path) -> Program:
    """A small model in which a few channels behind the norms are much larger than the rest."""
    checkpoint = load_checkpoint(str(save_model(name, folder)))
    program, _ = capture(checkpoint.model, checkpoint.max_model_len)
    run_passes(program, [Canonicalize()])
    for weight in program.weights():
        if "layers" in weight and "layernorm" in weight and weight.endswith("weight"):
            value = get_weight(program.module, weight).detach().clone()
            value[::16] *= 30
            set_weight(program, weight, value, layout="plain")
    return program


def make_calibration() -> Calibration:
    generator = torch.Generator().manual_seed(0)
    return Calibration(
        tuple(torch.randint(0, VOCAB_SIZE, (24,), generator=generator) for _ in range(4)), source="random", seed=0
    )


def logits(program: Program) -> Tensor:
    tokens = torch.arange(40)[None] * 3 % VOCAB_SIZE
    return program.module(tokens, torch.arange(40)[None])[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt_neox"])
def test_nothing_changes_before_rounding(name: str, tmp_path: Path) -> None:
    program = make_program(name, tmp_path / name)
    recipe = Recipe(default="w8a8", rounding="rtn", transforms=("smoothquant",))
    transform = SmoothQuant(recipe=recipe, calibration=make_calibration())
    probe = Probe.random(VOCAB_SIZE, MAX_LEN)
    (record,) = run_passes(program, [transform], facts={"canonical"}, probe=probe)
    assert record.matches == 4
    assert record.max_error is not None and record.max_error < 1e-4


def test_the_factors_are_those_of_the_paper(tmp_path: Path) -> None:
    program = make_program("llama", tmp_path / "llama")
    calibration = make_calibration()
    site = next(site for site in find_sites(program)[0] if site.producer.weights[0][0] == NORM)
    seen = torch.zeros(64)
    for sample in calibration.samples:
        values: list[Tensor] = []
        copy = program.copy()
        copy.graph.output_node().args = ((next(n for n in copy.graph.nodes if n.name == site.input.name),),)
        copy.module.recompile()
        values.append(copy.module(sample[None], torch.arange(len(sample))[None])[0])
        seen = torch.maximum(seen, values[0].detach().abs().amax(dim=(0, 1)))
    before = {name: get_weight(program.module, name).detach().clone() for name in (*site.names, NORM)}
    columns = torch.cat([before[name].abs() for name in site.names]).amax(dim=0)
    expected = seen**0.7 / columns**0.3
    recipe = Recipe(default="w8a8", rounding="rtn")
    run_passes(program, [SmoothQuant(recipe=recipe, calibration=calibration, alpha=0.7)], facts={"canonical"})
    found = before[NORM] / get_weight(program.module, NORM)
    torch.testing.assert_close(found / found[0], expected / expected[0], rtol=1e-4, atol=0)
    for name in site.names:
        torch.testing.assert_close(get_weight(program.module, name), before[name] * found, rtol=1e-4, atol=1e-6)


def test_outliers_hurt_less(tmp_path: Path) -> None:
    program = make_program("llama", tmp_path / "llama")
    recipe, calibration = Recipe(default="w8a8", rounding="rtn"), make_calibration()
    expected = logits(program)
    errors = []
    for passes in ([], [SmoothQuant(recipe=recipe, calibration=calibration)]):
        copy = program.copy()
        run_passes(copy, [*passes, Quantize(recipe=recipe)], facts={"canonical"})
        errors.append((logits(copy) - expected).square().mean().sqrt().item())
    assert errors[1] < 0.9 * errors[0]


def test_only_layers_whose_activations_are_rounded(tmp_path: Path) -> None:
    program = make_program("llama", tmp_path / "llama")
    recipe = Recipe(default="w4a16-g32", rounding="rtn", rules=(Rule(role="attention", scheme="w4a8-g32"),))
    before = {name: value.clone() for name, value in program.weights().items()}
    (record,) = run_passes(program, [SmoothQuant(recipe=recipe, calibration=make_calibration())], facts={"canonical"})
    assert record.matches == 2  # norm -> q, k, v in each of two layers
    assert any("which is no norm" in reason for reason in record.declined)
    changed = {name for name, value in program.weights().items() if not torch.equal(value, before[name])}
    assert all("self_attn" in name or "input_layernorm" in name for name in changed)
    assert len(changed) == 8
