"""What each fusion is worth: the step time of a compiled model with all of them, and with one left out at a time.

    python benchmarks/fusions.py compile build/fusions                       # one artifact for each, about half a minute each
    python benchmarks/fusions.py time build/fusions                          # in turns; needs a machine that does nothing else

The model is random, with 12 layers of 1,024 numbers; `--quantize` says how its weights are stored, none for bfloat16.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from pathlib import Path
from unittest import mock

import click
import torch
from rich.console import Console
from rich.table import Table

import optc
from optc.optimizer.pipeline import kernel_passes, step_passes
from optc.runtime.artifact import open_artifact
from optc.runtime.executor import Executor, StepInputs

FUSIONS = ("merge_linears", "fuse_rms_norm", "fuse_silu_mul", "fuse_rope", "fuse_rope_kv_write", "fuse_quantize")
VARIANTS: dict[str, tuple[str, ...]] = {"all": (), **{name: (name,) for name in FUSIONS}, "none": FUSIONS}
BLOCK, CONTEXT = 32, 128


@click.group()
def main() -> None:
    """What each fusion is worth."""


@main.command("compile")
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--quantize", default="int4", help="Scheme or preset of the weights, or none.")
@click.option("--qk-norm", is_flag=True, help="A model with norms on queries and keys (Qwen3) in place of Llama.")
def compile_variants(work: Path, quantize: str, qk_norm: bool) -> None:
    """Compile the model once for each fusion that is left out; what is there already stays."""
    checkpoint = _checkpoint(work, qk_norm)
    for name, without in VARIANTS.items():
        if (work / f"{name}.optc").exists():
            continue
        started = time.perf_counter()
        with (
            mock.patch("optc.optimizer.compile.kernel_passes", partial(kernel_passes, without=without)),
            mock.patch("optc.optimizer.compile.step_passes", partial(step_passes, without=without)),
        ):
            rounding = (
                {} if quantize == "none" else {"quantize": quantize, "algorithm": "rtn-minmax"}
            )  # the fastest one
            optc.compile(checkpoint, work / f"{name}.optc", verify=False, block_size=BLOCK, **rounding)
        click.echo(f"{name}: compiled in {time.perf_counter() - started:.0f} s")


def _checkpoint(work: Path, qk_norm: bool) -> Path:
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

    folder = work / "model"
    if not folder.exists():
        config = (Qwen3Config if qk_norm else LlamaConfig)(
            vocab_size=8192,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=64,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
        )
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def step_inputs(tokens: int) -> StepInputs:
    """One sequence whose last `tokens` are new, after a context where there is one token."""
    length = tokens + (CONTEXT if tokens == 1 else 0)
    positions = torch.arange(length - tokens, length)
    return StepInputs(
        input_ids=torch.randint(0, 8192, (tokens,), generator=torch.Generator().manual_seed(0)),
        positions=positions,
        slot_mapping=positions,
        block_table=torch.arange(-(-length // BLOCK), dtype=torch.int32)[None],
        query_start_loc=torch.tensor([0, tokens], dtype=torch.int32),
        seq_lens=torch.tensor([length], dtype=torch.int32),
        logits_indices=torch.tensor([tokens - 1]),
    )


@main.command("time")
@click.argument("work", type=click.Path(path_type=Path, exists=True))
@click.option("--rounds", default=15, help="Rounds; every artifact has a turn in each.")
@click.option("--threads", default=0, help="Threads; 0 takes one a core.")
def time_variants(work: Path, rounds: int, threads: int) -> None:
    """Step times of all artifacts in `work`, in turns."""
    if threads:
        torch.set_num_threads(threads)
    found = [name for name in VARIANTS if (work / f"{name}.optc").exists()]
    executors = {name: Executor(open_artifact(work / f"{name}.optc"), num_blocks=32) for name in found}
    table = Table("left out", title=f"median step time in ms, {torch.get_num_threads()} threads")
    columns: list[list[str]] = []
    for tokens, repeats in ((1, 20), (512, 1)):
        table.add_column(f"{tokens} tokens", justify="right")
        table.add_column("all but it", justify="right")
        columns += _column(executors, tokens, repeats, rounds)
    for row, name in enumerate(found):
        table.add_row({"all": "nothing", "none": "all"}.get(name, name), *(column[row] for column in columns))
    Console(width=100).print(table)


def _column(executors: dict[str, Executor], tokens: int, repeats: int, rounds: int) -> list[list[str]]:
    inputs = step_inputs(tokens)
    times: dict[str, list[float]] = {name: [] for name in executors}
    for turn in range(rounds + 2):
        for name, executor in executors.items():
            started = time.perf_counter()
            for _ in range(repeats):
                executor.run(inputs)
            if turn >= 2:
                times[name].append((time.perf_counter() - started) / repeats * 1e3)
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = medians["all"]
    return [[f"{value:.3f}" for value in medians.values()], [f"{value / base:.3f}x" for value in medians.values()]]


if __name__ == "__main__":
    main()
