"""The tables of an artifact: what was quantized, how, and how well it does."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

import optc
from optc.cli import main
from optc.runtime.artifact import read_manifest
from optc.runtime.manifest import (
    Accuracy,
    AccuracyRecord,
    BudgetRecord,
    CalibrationRecord,
    Estimate,
    Manifest,
    Quantization,
    QuantizedLayer,
    identity_of,
)
from optc.runtime.report import report_html, report_tables
from optc.runtime.scheme import QuantizationArgs, find_scheme


def shown(manifest: Manifest, *, layers: bool = False, width: int = 80) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    for table in report_tables(manifest, layers=layers):
        console.print(table)
    return console.export_text()


@pytest.fixture(scope="module")
def quantized(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("quantized") / "int4.optc"
    return optc.compile(checkpoint, output, backend="eager", quantize="w4a16-g32", algorithm="rtn", kv_cache="int8")


def layer(name: str, role: str, scheme: str, bits: float, error: float | None) -> QuantizedLayer:
    return QuantizedLayer.model_validate(
        {
            "name": name, "role": role, "shape": (64, 64), "transposed": False, "scheme": scheme, "algorithm": "gptq",
            "constants": {}, "bits_per_weight": bits, "error": error,
        }
    )  # fmt: skip


@pytest.fixture
def mixed(artifact: Path) -> Manifest:
    """The manifest of an artifact as if its layers had got schemes of their own."""
    layers = [layer(f"model.layers.{n}.mlp.up_proj.weight", "mlp", "w4a16-g128", 4.125, 0.1) for n in (0, 1, 2, 5)]
    layers += [layer(f"model.layers.{n}.mlp.up_proj.weight", "mlp", "w8a16", 8.062, 0.005 * n) for n in (3, 4)]
    layers += [layer("lm_head.weight", "lm_head", "w8a16", 8.031, None)]
    budget = BudgetRecord(
        max_kl=0.01,
        max_ppl_increase=0.02,
        bits=None,
        kl=0.008,
        ppl_increase=0.0121,
        bits_per_weight=5.0,
        rounds=2,
        groups=(),
    )
    quantization = Quantization(
        schemes={name: find_scheme(name) for name in ("w4a16-g128", "w8a16")},
        layers=tuple(layers),
        kv_cache_scheme=QuantizationArgs(type="float", strategy="token", dynamic=True),
        calibration=CalibrationRecord(source="books.txt", sha256="", num_samples=128, sequence_length=512, seed=3),
        budget=budget,
        bits_per_weight=5.123,
    )
    return read_manifest(artifact).model_copy(update={"quantization": quantization})


def accuracy(error: float | None) -> AccuracyRecord:
    one = Estimate(value=0.0123456, standard_error=error)
    figures = Accuracy(
        windows=7, tokens=7161, perplexity=one, reference_perplexity=one, perplexity_delta=one, perplexity_increase=one,
        kl_mean=one, kl_p99=one, kl_p999=one, same_top=one,
    )  # fmt: skip
    return AccuracyRecord(
        text="held[out].txt",
        text_sha256="",
        window=1024,
        prefix=(1,),
        reference="my/model",
        native=True,
        figures=figures,
    )


def test_a_row_for_each_role_and_scheme_says_which_layers(mixed: Manifest) -> None:
    rows = [line.split("│")[1:-1] for line in shown(mixed).splitlines() if "gptq" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["mlp", "0-2, 5", "4", "w4a16-g128", "gptq", "4.125", "0.1000"],
        ["mlp", "3-4", "2", "w8a16", "gptq", "8.062", "0.0150-0.0200"],
        ["lm_head", "-", "1", "w8a16", "gptq", "8.031", "-"],
    ]


def test_the_summary_has_bits_kv_cache_calibration_and_budget(mixed: Manifest) -> None:
    text = shown(mixed, width=160)
    for words in (
        "7 matrices, 5.123 bits a weight, scales and zero points included",
        "FP8 E4M3, a scale a token",
        "books.txt, 128 x 512 tokens, seed 3",
        "at most KL 0.01, perplexity +2 %; measured: KL 0.00800, perplexity +1.210 %",
    ):
        assert words in text


def test_every_weight_is_listed_on_request_and_in_the_page(mixed: Manifest, quantized: Path) -> None:
    assert "model.layers.5.mlp.up_proj " not in shown(mixed)
    assert "model.layers.5.mlp.up_proj " in shown(mixed, layers=True)
    assert "model.layers.5.mlp.up_proj " in report_html(mixed)
    listed = CliRunner().invoke(main, ["inspect", str(quantized), "--layers"])
    assert listed.exit_code == 0, listed.output
    manifest = json.loads(CliRunner().invoke(main, ["inspect", str(quantized), "--json"]).stdout)
    names = [found["name"].removesuffix(".weight") for found in manifest["quantization"]["layers"]]
    assert len(names) == 14
    for name in names:
        assert any(name in line and "w4a16-g32" in line for line in listed.stdout.splitlines())
    assert "INT8, a scale a token" in listed.stdout


def test_accuracy_is_shown_with_errors_and_protocol(mixed: Manifest) -> None:
    text = shown(mixed.model_copy(update={"accuracy": accuracy(0.001)}), width=200)
    assert "Accuracy against my/model on held[out].txt" in text
    assert "7,161 tokens in 7 windows of 1024" in text and "native code" in text
    (row,) = (line.split("│")[1:-1] for line in text.splitlines() if "increase in %" in line)
    assert [cell.strip() for cell in row] == ["perplexity, increase in %", "+1.235", "0.100"]
    single = shown(mixed.model_copy(update={"accuracy": accuracy(None)}))
    (row,) = (line.split("│")[1:-1] for line in single.splitlines() if "KL divergence, mean" in line)
    assert row[2].strip() == "-"


def test_measurements_and_notes_are_no_part_of_the_identity(mixed: Manifest) -> None:
    noted = mixed.model.model_copy(update={"notes": ("a remark",)})
    assert identity_of(mixed.model_copy(update={"accuracy": accuracy(0.1), "model": noted})) == identity_of(mixed)
    assert identity_of(mixed.model_copy(update={"block_size": 7})) != identity_of(mixed)
