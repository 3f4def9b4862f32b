"""The compiler's commands: compile, targets, passes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ..errors import UsageError

if TYPE_CHECKING:
    from ..runtime.manifest import PassRecord


@click.command("compile", short_help="Compile a checkpoint into an artifact.")
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Artifact folder to write.  [default: NAME.optc]")
@click.option("--target", default="native", show_default=True, help="Hardware to compile for; see `optc targets`.")
@click.option("--backend", type=click.Choice(["inductor", "eager"]), default="inductor", show_default=True,
              help="Native code, or the portable program alone.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True,
              help="Of the weights; auto is as stored.")  # fmt: skip
@click.option("--adapter", type=click.Path(path_type=Path), help="PEFT LoRA adapter to merge.")
@click.option("--int8", "preset", flag_value="int8", help="Quantize to INT8; the target decides the scheme.")
@click.option("--int4", "preset", flag_value="int4", help="Quantize to INT4; the target decides the scheme.")
@click.option("--fp8", "preset", flag_value="fp8", help="Quantize to FP8; the target decides the scheme.")
@click.option(
    "--scheme", metavar="NAME", help="Quantize to this scheme, such as w4a16-g128; see `optc targets --schemes`."
)
@click.option("--recipe", type=click.Path(path_type=Path), help="YAML file that says what to quantize, and how.")
@click.option("--algorithm", metavar="NAME", help="How codes are chosen: rtn, rtn-minmax, hqq, gptq, awq+gptq, ...")
@click.option("--kv-cache", type=click.Choice(["int8", "fp8"]), help="Store keys and values in 8 bits.")
@click.option("--calibration", type=click.Path(path_type=Path), metavar="FILE|DIR",
              help="Text to calibrate on: txt, jsonl or parquet.  [default: calibration.* in the checkpoint]")  # fmt: skip
@click.option(
    "--calibration-samples", type=click.IntRange(1), default=128, show_default=True, help="Sequences to draw."
)
@click.option("--calibration-length", type=click.IntRange(2), default=512, show_default=True, help="Tokens of each.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draw.")
@click.option(
    "--block-size", type=click.IntRange(1, 1024), default=32, show_default=True, help="Tokens a KV-cache block holds."
)
@click.option(
    "--max-model-len", type=click.IntRange(2), help="Most tokens of a sequence.  [default: the model's limit]"
)
@click.option("--force", is_flag=True, help="Replace an artifact at the output path.")
@click.option(
    "--dump", type=click.Path(path_type=Path), metavar="DIR", help="Write the graph before and after every pass."
)
@click.option("--no-verify", is_flag=True, help="Skip the numeric check after every pass.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on standard output.")
def compile_command(
    model: str,
    output: Path | None,
    preset: str | None,
    scheme: str | None,
    recipe: Path | None,
    quiet: bool,
    as_json: bool,
    no_verify: bool,
    **options: Any,
) -> None:
    """Compile MODEL, a local folder in Hugging Face format or a hub id, into an artifact.

    \b
    Examples:
      optc compile ./my-llama
      optc compile ./my-llama --adapter ./my-lora -o tuned.optc
      optc compile Qwen/Qwen3-8B --target h100 --fp8 -o qwen3.optc
      optc compile ./my-llama --target cpu-avx2 --dtype bfloat16 --dump graphs/
    """
    output = output or Path(f"{Path(model).resolve().name if Path(model).exists() else Path(model).name}.optc")
    asked = [given for given in (preset, scheme, recipe) if given is not None]
    if len(asked) > 1:
        raise UsageError("choose one of --int8, --int4, --fp8, --scheme and --recipe")
    options["quantize"] = asked[0] if asked else None
    if dump := options["dump"]:
        dump.mkdir(parents=True, exist_ok=True)  # fails now, not after the model is loaded
    console = Console(stderr=True, quiet=quiet or as_json)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars, console.capture() if console.quiet else _nothing():
        from .compile import Progress as Reports
        from .compile import compile as compile_model

        running: list[TaskID] = []

        @contextmanager
        def show(stage: str) -> Iterator[None]:
            running.append(bars.add_task(stage, total=None))
            yield
            bars.update(running.pop(), total=1, completed=1)

        def on_fraction(fraction: float) -> None:
            bars.update(running[-1], total=1, completed=fraction)

        def on_pass(record: PassRecord) -> None:
            error = "" if record.max_error is None else f", max error {record.max_error:.1e}"
            bars.console.print(f"  {record.name}: {record.matches} rewrites, {len(record.declined)} declined{error}")

        reports = Reports(show=show, on_fraction=on_fraction, on_pass=on_pass)
        compile_model(model, output, verify=not no_verify, progress=reports, **options)
    _report(output, quiet=quiet, as_json=as_json)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _report(output: Path, *, quiet: bool, as_json: bool) -> None:
    from ..runtime.artifact import read_manifest
    from ..runtime.report import report_tables

    manifest = read_manifest(output)
    if as_json:
        click.echo(json.dumps({"artifact": str(output), **manifest.model_dump(mode="json")}, indent=1))
    elif not quiet:
        console = Console()
        for table in report_tables(manifest):
            console.print(table)
        click.echo(f'\nwrote {output}; try: optc run {output} -p "..."')


@click.command("targets", short_help="List the hardware that can be compiled for.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def targets_command(as_json: bool) -> None:
    """List the targets of `optc compile --target`.

    \b
    Examples:
      optc targets
      optc targets --json
    """
    from dataclasses import asdict

    from .targets import TARGETS, find_target

    found = [find_target("native"), *TARGETS.values()]
    if as_json:
        click.echo(json.dumps([asdict(target) for target in found], indent=1))
        return
    table = Table("target", "architecture", "memory", "bandwidth", "fast arithmetic (peak TFLOP/s)", "native code")
    for target in found:
        memory = f"{target.memory_gib} GiB" if target.memory_gib else "-"
        bandwidth = f"{target.bandwidth_gbs} GB/s" if target.bandwidth_gbs else "-"
        rates = ", ".join(f"{dtype} {rate:g}" for dtype, rate in target.tflops.items()) or "-"
        native = "made here" if target.can_build_here() else "pending"
        table.add_row(target.name, target.architecture, memory, bandwidth, rates, native)
    Console().print(table)


@click.command("passes", short_help="List the passes in the order they run.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def passes_command(as_json: bool) -> None:
    """List the passes in the order they run, each with its rewrite.

    \b
    Example:
      optc passes
    """
    from ..passes.quantize.recipe import Recipe
    from .config import CompileConfig
    from .pipeline import shared_passes, step_passes
    from .targets import find_target

    recipe = Recipe(default="w4a16-g128", transforms=("smoothquant", "awq"), kv_cache="int8")
    config = CompileConfig(source="", output=Path(), target=find_target("native"), recipe=recipe)
    rows = [("both", item) for item in shared_passes(config)] + [("step", item) for item in step_passes(config)]
    documented = [(name, item.name, cleandoc(type(item).__doc__ or "")) for name, item in rows]
    if as_json:
        click.echo(
            json.dumps([dict(zip(("program", "name", "rewrite"), row, strict=True)) for row in documented], indent=1)
        )
        return
    table = Table("program", "pass", "rewrite", show_lines=True)
    for row in documented:
        table.add_row(*row)
    Console().print(table)
