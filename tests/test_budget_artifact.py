"""The accuracy budget from end to end: what the manifest says, and that a budget that is not kept writes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import optc
from optc.passes.quantize.recipe import KEEP
from optc.runtime.artifact import read_manifest
from optc.runtime.manifest import Manifest, identity_of

from .budget_cases import FEW, chosen, with_text
from .test_cli import failed, run


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a text to measure on."""
    return with_text(checkpoint, tmp_path_factory.mktemp("budget"))


@pytest.fixture(scope="module")
def compiled(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By GPTQ, within a budget, from the command line."""
    output = tmp_path_factory.mktemp("mixed") / "mixed.optc"
    result = run("compile", folder, "-o", output, "--backend", "eager", "--max-kl", 0.03, *FEW)
    assert result.exit_code == 0, result.output
    return output


@pytest.fixture(scope="module")
def manifest(compiled: Path) -> Manifest:
    return read_manifest(compiled)


def test_the_manifest_has_the_choice_and_what_was_measured(manifest: Manifest) -> None:
    quantization = manifest.quantization
    assert quantization is not None and quantization.budget is not None
    record = quantization.budget
    assert (record.max_kl, record.max_ppl_increase, record.bits) == (0.03, None, None)
    assert record.kl is not None and 0 < record.kl <= 0.03 and 1 <= record.rounds <= 4
    schemes = {layer.name: layer.scheme for layer in quantization.layers}
    assert len(record.groups) == 8 and len(set(chosen(record))) > 1
    for group in record.groups:
        assert {schemes.get(name, KEEP) for name in group.weights} == {group.chosen}
        assert group.kl[KEEP] == 0 and group.bits_per_weight[KEEP] == 32
        assert group.kl["w4a8g-g32"] > group.kl["w8a8g-channel"] > 0
    assert {layer.algorithm for layer in quantization.layers} <= {"gptq", "rtn"}
    assert "gptq" in {layer.algorithm for layer in quantization.layers}


def test_inspect_shows_the_budget_and_the_choice_of_each_layer(compiled: Path, manifest: Manifest) -> None:
    assert manifest.quantization is not None and manifest.quantization.budget is not None
    summary = " ".join(run("inspect", compiled).stdout.replace("│", " ").split())
    assert f"at most KL 0.03; measured: KL {manifest.quantization.budget.kl:.5f}" in summary
    listed = run("inspect", compiled, "--layers").stdout.splitlines()
    for layer in manifest.quantization.layers:
        assert any(layer.name.removesuffix(".weight") in line and layer.scheme in line for line in listed)


def test_the_identity_is_that_of_the_schemes(manifest: Manifest) -> None:
    quantization = manifest.quantization
    assert quantization is not None and quantization.budget is not None

    def identity(**changed: Any) -> str:
        return identity_of(manifest.model_copy(update={"quantization": quantization.model_copy(update=changed)}))

    measured = quantization.budget.model_copy(update={"kl": 0.5, "rounds": 4, "groups": ()})
    assert identity(budget=measured) == identity(budget=None) == manifest.identity
    first, *others = quantization.layers
    assert identity(layers=(first.model_copy(update={"scheme": "w8a8"}), *others)) != manifest.identity


def test_the_same_seed_gives_the_same_artifact(folder: Path, manifest: Manifest, tmp_path: Path) -> None:
    output = optc.compile(
        folder, tmp_path / "again.optc", backend="eager", max_kl=0.03, calibration_samples=8, calibration_length=64
    )
    assert read_manifest(output).identity == manifest.identity


def test_exit_code_3_with_the_table_and_nothing_written(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.optc"
    result = run("compile", folder, "-o", output, "--backend", "eager", "--max-kl", 1e-12, "-q", *FEW)
    failed(result, 3, "--max-kl 1e-12", "cannot be kept")
    lines = result.stderr.splitlines()
    assert sum("q_proj.weight" in line for line in lines) == 2 and "w4a8g-g32" in result.stderr
    assert not result.stdout and not list(tmp_path.iterdir())


def test_the_artifact_itself_is_held_to_the_budget(folder: Path, tmp_path: Path) -> None:
    """Keys and values in FP8 are no part of the graph that is measured first, and `--eval` sees them."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"number {n * 7919 % 1000} and word {n} of it.\n" for n in range(40)), encoding="utf-8")
    output = tmp_path / "out.optc"
    options = (
        "--backend",
        "eager",
        "--scheme",
        "w8a16",
        "--kv-cache",
        "fp8",
        "--no-verify",
        "-q",
        "--eval",
        text,
        *FEW,
    )
    failed(run("compile", folder, "-o", output, "--max-kl", 0.001, *options), 3, "text.txt", "nothing was written")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
    result = run("compile", folder, "-o", output, "--max-kl", 0.1, *options)
    assert result.exit_code == 0, result.output
    found = read_manifest(output)
    assert found.accuracy is not None and found.quantization is not None and found.quantization.budget is not None
    assert found.accuracy.figures.kl_mean is not None and found.quantization.budget.kl is not None
    assert found.quantization.budget.kl < 0.001 < found.accuracy.figures.kl_mean.value < 0.1
