"""Quantized optc artifacts beside other tools' results, at equal true bits per weight: one model, one text, one protocol.

The other tools need versions of torch and transformers that optc does not, so each runs in an environment of its own
(`quantization_peers.py`, which also says what it checks) and leaves the weights that its codes mean; this script measures
them. A tool that was not run is left out, and the table says so. WORK is any folder:

    python benchmarks/quantization.py samples WORK/samples.safetensors
    python -m venv WORK/llm-compressor
    WORK/llm-compressor/bin/pip install "torch<2.14" llmcompressor==0.14.0.1 gguf==0.19.0
    python -m venv WORK/gptqmodel
    WORK/gptqmodel/bin/pip install torch gptqmodel==7.7.0
    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36 -d WORK && tar xzf WORK/llama_cpp_python-*.tar.gz -C WORK
    cmake -S WORK/llama_cpp_python-0.3.36/vendor/llama.cpp -B WORK/ggml -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON \\
        -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
    cmake --build WORK/ggml --target ggml-base

    peers() { "$1" benchmarks/quantization_peers.py "$2" --model examples/tiny-llama --samples WORK/samples.safetensors \\
        --out WORK/peers "${@:3}"; }
    peers WORK/llm-compressor/bin/python llm-compressor
    peers WORK/gptqmodel/bin/python gptqmodel
    peers WORK/llm-compressor/bin/python gguf --ggml WORK/ggml/bin/libggml-base.so
    python benchmarks/quantization.py table --peers WORK/peers --json WORK/results.json

Weights only, of the linear layers in the blocks; embedding and head stay in full precision for everybody. The reference
is the checkpoint in float32, KL divergences are of float32 logits, and optc is measured through its artifacts (portable
program, float32). The activations of INT8 and FP8 count in the second table, whose artifacts are bfloat16, as they ship.
Rows that the JSON file has already are not measured again.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import safetensors.torch
import tokenizers
import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from torch import Tensor

import optc
from optc.optimizer.accuracy import Logits, compare, summarize
from optc.optimizer.calibration import load_calibration
from optc.optimizer.checkpoint import Checkpoint, load_checkpoint
from optc.optimizer.evaluate import Windows, make_windows
from optc.runtime.artifact import open_artifact
from optc.runtime.scorer import Scorer

TINY = Path(__file__).resolve().parents[1] / "examples/tiny-llama"
PEERS = ("llm-compressor", "gptqmodel", "gguf")
WINDOW = 1024

# Scheme, algorithm; the least first that a scheme has.
WEIGHTS = [
    *(("w4a16-g128", algorithm) for algorithm in ("rtn-minmax", "rtn", "awq+rtn", "gptq", "awq+gptq")),
    *(("w4a16-g64-asym", algorithm) for algorithm in ("rtn", "hqq", "gptq")),
    *(("w4a16-g32", algorithm) for algorithm in ("rtn", "gptq")),
    *(("w3a16-g128", algorithm) for algorithm in ("rtn-minmax", "rtn", "awq+rtn", "gptq")),
    *(("w3a16-g64-asym", algorithm) for algorithm in ("rtn", "hqq", "gptq")),
    ("w3a16-g32", "gptq"),
    *(("w8a16", algorithm) for algorithm in ("rtn", "gptq")),
    *(("w8a16-g32", algorithm) for algorithm in ("rtn", "gptq")),
]
BUDGETS = [4.5]  # bits a weight that the compiler may mix schemes for
# What the presets mean: name, options of `compile`, and by how much perplexity may rise at most.
PRESETS: list[tuple[str, dict[str, Any], float | None]] = [
    ("bfloat16, not quantized", {}, None),
    ("--int8", {"quantize": "int8"}, 0.003),
    ("--fp8 --target h100", {"quantize": "fp8", "target": "h100"}, 0.01),
    ("--int4", {"quantize": "int4"}, 0.03),
]


@dataclass(frozen=True)
class Harness:
    """The text and the reference that everything is measured against."""

    model: Path
    calibration: Path
    checkpoint: Checkpoint
    windows: Windows
    reference: list[Tensor]

    @classmethod
    def load(cls, model: Path, text: Path, calibration: Path) -> Harness:
        checkpoint = load_checkpoint(str(model), dtype="float32")
        assert checkpoint.tokenizer is not None
        tokenizer = tokenizers.Tokenizer.from_str(checkpoint.tokenizer.json)
        windows = make_windows(
            tokenizer, text.read_text(encoding="utf-8"), text.name, limit=checkpoint.max_model_len, window=WINDOW
        )
        forward = transformers_logits(checkpoint)
        return cls(model, calibration, checkpoint, windows, [forward(tokens) for tokens in windows.tokens])

    def measure(self, logits: Logits) -> dict[str, Any]:
        """Figures, and the sum of KL divergences and the count of tokens of each window, for paired differences."""
        pairs = zip(self.windows.tokens, self.reference, strict=True)
        found = [compare(tokens, logits(tokens), expected, skip=self.windows.skip) for tokens, expected in pairs]
        kl = [window.kl for window in found if window.kl is not None]
        return {
            "figures": summarize(found).model_dump(mode="json"),
            "kl_sums": [float(window.sum()) for window in kl],
            "counts": [len(window) for window in kl],
        }

    def of_weights(self, file: Path) -> dict[str, Any]:
        """The checkpoint with the weights of a safetensors file in place of its own, in float32."""
        weights = safetensors.torch.load_file(file)
        model = self.checkpoint.model
        kept = {name: value.clone() for name, value in model.state_dict().items()}
        linears = [f"{name}.weight" for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
        assert set(weights) == set(linears) - {"lm_head.weight"}, "not the linear layers of the blocks"
        model.load_state_dict(kept | weights)
        try:
            return self.measure(transformers_logits(self.checkpoint))
        finally:
            model.load_state_dict(kept)

    def of_artifact(self, options: dict[str, Any]) -> dict[str, Any]:
        """What `compile` makes of the model with these options, by its portable program."""
        with tempfile.TemporaryDirectory() as folder:
            path = optc.compile(
                self.model,
                Path(folder) / "a.optc",
                backend="eager",
                calibration=self.calibration,
                verify=False,
                **options,
            )
            artifact = open_artifact(path)
            quantization = artifact.manifest.quantization
            bits = quantization.bits_per_weight if quantization else None
            measured = self.measure(Scorer(artifact, native=False, max_length=WINDOW))
        return {"bits_per_weight": bits} | measured


def transformers_logits(checkpoint: Checkpoint) -> Logits:
    @torch.inference_mode()
    def logits(tokens: Tensor) -> Tensor:
        found: Tensor = checkpoint.model(input_ids=tokens[None], use_cache=False).logits[0]
        return found.float()

    return logits


@click.group(help=__doc__.split("\n")[0])
def main() -> None:
    torch.set_grad_enabled(False)


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--model", type=click.Path(path_type=Path), default=TINY)
@click.option("--calibration", type=click.Path(path_type=Path), default=TINY / "calibration.txt")
def samples(file: Path, model: Path, calibration: Path) -> None:
    """Write the sequences that optc calibrates on, for the other tools."""
    checkpoint = load_checkpoint(str(model))
    assert checkpoint.tokenizer is not None
    drawn, _ = load_calibration(calibration, checkpoint.tokenizer)
    file.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({"samples": torch.stack(drawn.samples)}, file)


@main.command()
@click.option("--model", type=click.Path(path_type=Path), default=TINY)
@click.option("--text", type=click.Path(path_type=Path), default=TINY / "heldout.txt")
@click.option("--calibration", type=click.Path(path_type=Path), default=TINY / "calibration.txt")
@click.option("--peers", type=click.Path(path_type=Path), help="Folder that quantization_peers.py wrote to.")
@click.option("--json", "file", type=click.Path(path_type=Path), required=True, help="Results, read and written.")
def table(model: Path, text: Path, calibration: Path, peers: Path | None, file: Path) -> None:
    """Measure everything and print the tables."""
    harness = Harness.load(model, text, calibration)
    results: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}

    def measured(key: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if key not in results:
            results[key] = work()
            file.write_text(json.dumps(results, indent=1))
            kl = results[key]["figures"]["kl_mean"]
            click.echo(f"{key}: KL {kl['value']:.5f} +- {kl['standard_error']:.5f}")
        return results[key]

    others = {}
    for record_file in sorted(peers.glob("*.json")) if peers else []:
        record = json.loads(record_file.read_text())
        weights = record_file.with_suffix(".safetensors")
        key = f"{record['tool']}: {record['name']}"
        others[key] = record | measured(key, partial(harness.of_weights, weights))
    chosen: dict[str, dict[str, Any]] = {
        f"{scheme} {algorithm}": {"quantize": scheme, "algorithm": algorithm} for scheme, algorithm in WEIGHTS
    }
    chosen |= {f"--bits {bits:g}": {"bits": bits} for bits in BUDGETS}
    ours = {}
    for name, options in chosen.items():
        key = f"optc: {name}"
        ours[key] = measured(key, partial(harness.of_artifact, options | {"dtype": "float32"}))
    presets = {}
    for name, options, _ in PRESETS:
        presets[name] = measured(f"preset: {name}", partial(harness.of_artifact, options))
    console = Console(width=200)
    console.print(weights_table(ours, others))
    for tool in PEERS:
        if not any(record["tool"] == tool for record in others.values()):
            console.print(f"{tool}: not run, so not in the table")
    console.print(presets_table(presets))


def weights_table(ours: dict[str, dict[str, Any]], others: dict[str, dict[str, Any]]) -> Table:
    """By size; beside each of optc's rows the best peer of that size or less, and the paired difference to it."""
    titles = ("bits a weight", "", "KL, mean", "p99", "p99.9", "same top", "perplexity", "less the best peer no larger")
    found = Table(*titles, box=MARKDOWN)
    rows = sorted((ours | others).items(), key=lambda row: (round(row[1]["bits_per_weight"], 2), kl_of(row[1])))
    for key, row in rows:
        figures = row["figures"]
        rise = figures["perplexity_increase"]["value"]
        compared = ""
        if key in ours:
            smaller = {k: v for k, v in others.items() if v["bits_per_weight"] <= row["bits_per_weight"] + 1e-3}
            if smaller:
                best = min(smaller, key=lambda k: kl_of(smaller[k]))
                compared = f"{difference(row, smaller[best])} {best}"
        found.add_row(
            f"{row['bits_per_weight']:.3f}",
            key,
            f"{kl_of(row):.6f} ± {figures['kl_mean']['standard_error']:.6f}",
            f"{figures['kl_p99']['value']:.4f}",
            f"{figures['kl_p999']['value']:.3f}",
            f"{figures['same_top']['value']:.2%}",
            f"{figures['perplexity']['value']:.3f} ({rise:+.2%})",
            compared,
        )
    return found


def presets_table(presets: dict[str, dict[str, Any]]) -> Table:
    titles = ("preset, as shipped", "bits a weight", "perplexity", "rise ± SE", "bar", "KL, mean", "same top")
    found = Table(*titles, box=MARKDOWN)
    for name, _, bar in PRESETS:
        figures, bits = presets[name]["figures"], presets[name]["bits_per_weight"]
        rise, kl = figures["perplexity_increase"], figures["kl_mean"]
        found.add_row(
            name,
            "" if bits is None else f"{bits:.3f}",
            f"{figures['perplexity']['value']:.3f}",
            f"{rise['value']:+.3%} ± {rise['standard_error']:.3%}",
            "" if bar is None else f"{bar:.1%}: {'kept' if rise['value'] <= bar else 'MISSED'}",
            f"{kl['value']:.6f} ± {kl['standard_error']:.6f}",
            f"{figures['same_top']['value']:.2%}",
        )
    return found


def kl_of(row: dict[str, Any]) -> float:
    return float(row["figures"]["kl_mean"]["value"])


def difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    """KL of `one` less that of `other`, paired by window, with its standard error."""
    counts = np.array(one["counts"], dtype=np.float64)
    sums = np.array(one["kl_sums"]) - np.array(other["kl_sums"])
    mean = sums.sum() / counts.sum()
    windows = len(counts)
    error = math.sqrt(windows / (windows - 1) * float(((sums - mean * counts) ** 2).sum())) / counts.sum()
    return f"{mean:+.6f} ± {error:.6f}"


if __name__ == "__main__":
    main()
