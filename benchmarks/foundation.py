"""Compile time and memory, start-up, and decode / prefill speed beside transformers.

    python benchmarks/foundation.py                  # both models, about ten minutes
    python benchmarks/foundation.py --only tiny

Every figure of a comparison comes from one alternating run: optc, transformers, optc, transformers, ...; the median and
the spread of the rounds are printed. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

TINY = Path(__file__).resolve().parents[1] / "examples/tiny-llama"
ROUNDS = 5

# Peaks are VmHWM, the high-water mark of one program: ru_maxrss would start at the size of the process that forked it.
COMPILE = """
import sys, threading, time, json
from pathlib import Path

def peak_of(status):
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])

peaks = [0]
def watch():
    while True:
        for path in Path("/proc").glob("[0-9]*/status"):
            try:
                status = path.read_text()
                if status.split()[1] in ("cc1plus", "clang", "ld"):
                    peaks.append(peak_of(status))
            except (OSError, IndexError):  # it ended meanwhile
                pass
        time.sleep(0.05)

threading.Thread(target=watch, daemon=True).start()
started = time.perf_counter()
from optc.optimizer.compile import Progress, compile
progress = Progress()
compile(sys.argv[1], sys.argv[2], force=True, progress=progress)
seconds = time.perf_counter() - started
peak = peak_of(Path("/proc/self/status").read_text())
print(json.dumps({"seconds": seconds, "peak": peak, "compiler_peak": max(peaks)}))
"""

START = """
import json, sys, time
started = time.perf_counter()
import torch
torch_seconds = time.perf_counter() - started
from optc.runtime import LLM
llm = LLM(sys.argv[1])
loaded = time.perf_counter() - started
llm.generate([[1, 5, 9]], max_tokens=1)
print(json.dumps({"torch": torch_seconds, "loaded": loaded, "first_token": time.perf_counter() - started}))
"""


MAKE_367M = """
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(
    vocab_size=32000, hidden_size=1024, intermediate_size=3072, num_hidden_layers=24, num_attention_heads=16,
    num_key_value_heads=8, head_dim=64, max_position_embeddings=4096, tie_word_embeddings=False,
)
torch.manual_seed(0)
LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(sys.argv[1])
print("{}")
"""


def make_367m(folder: Path) -> Path:
    """A 24-layer Llama of 367M parameters with random bf16 weights, made in another process: this one stays small."""
    path = folder / "llama-367m"
    run_python(MAKE_367M, str(path))
    return path


def run_python(code: str, *arguments: str) -> dict[str, float]:
    """The JSON that a fresh Python process prints last."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": tempfile.mkdtemp(), "OPTC_CACHE": tempfile.mkdtemp()}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure_compile(source: Path, output: Path) -> dict[str, float]:
    """Seconds and peak memory (its own, and of the largest C++ compiler) of a cold compilation in a fresh process."""
    return run_python(COMPILE, str(source), str(output))


def median_of(rounds: int, *functions: Callable[[], float]) -> list[tuple[float, float, float]]:
    """Median, least and most of each function's figures, the functions taking turns."""
    found: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for values, function in zip(found, functions, strict=True):
            values.append(function())
    return [(statistics.median(values), min(values), max(values)) for values in found]


def measure_speed(source: Path, artifact: Path) -> list[tuple[str, list[tuple[float, float, float]]]]:
    """Tokens/s of decode and prefill for optc and transformers, in turns."""
    import torch
    from transformers import AutoModelForCausalLM

    from optc.runtime import LLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    llm = LLM(artifact)
    vocab = llm.manifest.model.vocab_size
    generator = torch.Generator().manual_seed(0)

    def prompt(length: int) -> list[int]:
        return torch.randint(2, vocab, (length,), generator=generator).tolist()

    def ours(length: int, new: int, batch: int) -> float:
        prompts = [prompt(length) for _ in range(batch)]
        started = time.perf_counter()
        llm.generate(prompts, max_tokens=new, ignore_eos=True)
        return time.perf_counter() - started

    @torch.inference_mode()
    def theirs(length: int, new: int, batch: int) -> float:
        ids = torch.tensor([prompt(length) for _ in range(batch)])
        started = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        return time.perf_counter() - started

    rows = []
    for batch in (1, 8):
        # The decode rate is that of the tokens after the first: a run of 1 is taken off a run of 65.
        rates = [
            lambda run=run, batch=batch: 64 * batch / max(1e-9, run(32, 65, batch) - run(32, 1, batch))
            for run in (ours, theirs)
        ]
        rows.append((f"decode, {batch} sequences", median_of(ROUNDS, *rates)))
    for length in (128, 512):
        rates = [lambda run=run, length=length: length / run(length, 1, 1) for run in (ours, theirs)]
        rows.append((f"prefill, {length} tokens", median_of(ROUNDS, *rates)))
    return rows


@click.command()
@click.option("--only", type=click.Choice(["tiny", "367m"]), help="One of the two models.")
@click.option("--skip-speed", is_flag=True, help="Compile and start-up only.")
def main(only: str | None, skip_speed: bool) -> None:
    """Measure and print."""
    console = Console(width=120)
    import torch

    console.print(f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = {"tiny": TINY, "367m": None}
        for label in [only] if only else sources:
            source = sources[label] or make_367m(folder)
            artifact = folder / f"{label}.optc"
            checkpoint = sum(path.stat().st_size for path in source.glob("*.safetensors"))
            compiled = measure_compile(source, artifact)
            starts = [run_python(START, str(artifact)) for _ in range(ROUNDS)]
            table = Table(
                "figure", "value", title=f"{label}: checkpoint {checkpoint / 1e6:.0f} MB", title_justify="left"
            )
            table.add_row("compile, cold caches", f"{compiled['seconds']:.1f} s")
            table.add_row(
                "peak memory of optc",
                f"{compiled['peak'] / 1e6:.0f} MB = {compiled['peak'] / checkpoint:.2f}x checkpoint",
            )
            table.add_row("peak memory of the C++ compiler", f"{compiled['compiler_peak'] / 1e6:.0f} MB")
            for key, what in (
                ("torch", "import torch"),
                ("loaded", "... artifact loaded"),
                ("first_token", "... first token"),
            ):
                table.add_row(what, f"{statistics.median(s[key] for s in starts):.2f} s")
            console.print(table)
            if not skip_speed:
                table = Table("tokens/s", "optc", "transformers", "ratio", title_justify="left")
                for what, (ours, theirs) in measure_speed(source, artifact):
                    cells = [f"{mid:.0f} ({low:.0f}-{high:.0f})" for mid, low, high in (ours, theirs)]
                    table.add_row(what, *cells, f"{ours[0] / theirs[0]:.2f}x")
                console.print(table)


if __name__ == "__main__":
    main()
