"""The compiler's commands: compile, targets, passes, eval, lm-eval."""

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
from rich.table import Column, Table

from ..errors import UsageError

if TYPE_CHECKING:
    from ..runtime.manifest import PassRecord

_COLUMNS = (
    SpinnerColumn(),
    TextColumn("{task.description:<22}"),
    BarColumn(bar_width=24),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)


class Percentage(click.ParamType[float]):
    """`2%` or `2` as 0.02."""

    name = "percentage"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return float(str(value).removesuffix("%")) / 100
        except ValueError:
            self.fail(f"{value!r}: expected a percentage, such as 2%", param, ctx)


@click.command("compile", short_help="Compile a checkpoint into an artifact.")
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Artifact folder to write.  [default: NAME.optc]")
@click.option("--target", default="native", show_default=True, help="Hardware to compile for; see `optc targets`.")
@click.option("--backend", type=click.Choice(["inductor", "eager"]), default="inductor", show_default=True,
              help="Native code, or the portable program alone.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True,
              help="Of the weights; auto is as stored.")  # fmt: skip
@click.option("--adapter", type=click.Path(path_type=Path), help="PEFT LoRA adapter to merge.")
@click.option("--int8", is_flag=True, help="Quantize to INT8; the target decides the scheme.")
@click.option("--int4", is_flag=True, help="Quantize to INT4; the target decides the scheme.")
@click.option("--fp8", is_flag=True, help="Quantize to FP8; the target decides the scheme.")
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
@click.option("--max-kl", type=float, metavar="X",
              help="Budget: mean KL divergence to the unquantized model, nats a token.")  # fmt: skip
@click.option("--max-ppl-increase", type=Percentage(), metavar="P%", help="Budget: increase of the perplexity.")
@click.option("--bits", type=float, metavar="B", help="Budget: the best mix of schemes at B bits a weight, as 4.5.")
@click.option("--eval", "evaluate", type=click.Path(path_type=Path), metavar="FILE",
              help="Text to measure the artifact on, against MODEL in float32; see `optc eval`.")  # fmt: skip
@click.option(
    "--block-size", type=click.IntRange(1, 1024), default=8, show_default=True, help="Tokens a KV-cache block holds."
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
    int8: bool,
    int4: bool,
    fp8: bool,
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
      optc compile ./my-llama --int4 --calibration texts/ --eval heldout.txt
      optc compile ./my-llama --bits 4.5
      optc compile ./my-llama --int4 --max-ppl-increase 1%
      optc compile ./my-llama --target cpu-avx2 --dtype bfloat16 --dump graphs/
    """
    output = output or Path(f"{Path(model).resolve().name if Path(model).exists() else Path(model).name}.optc")
    presets = [name for name, given in (("int8", int8), ("int4", int4), ("fp8", fp8)) if given]
    asked = [*presets, *(given for given in (scheme, recipe) if given is not None)]
    if len(asked) > 1:
        raise UsageError("choose one of --int8, --int4, --fp8, --scheme and --recipe")
    options["quantize"] = asked[0] if asked else None
    if dump := options["dump"]:
        dump.mkdir(parents=True, exist_ok=True)  # fails now, not after the model is loaded
    console = Console(stderr=True, quiet=quiet or as_json)
    with Progress(*_COLUMNS, console=console) as bars, console.capture() if console.quiet else _nothing():
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

        def on_warning(warning: str) -> None:
            if not quiet:
                click.echo(f"warning: {warning}", err=True)

        reports = Reports(show=show, on_fraction=on_fraction, on_pass=on_pass, on_warning=on_warning)
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


@click.command("targets", short_help="List the hardware that can be compiled for, and the quantization schemes.")
@click.option("--schemes", is_flag=True, help="List the schemes of --scheme and of recipes instead.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def targets_command(schemes: bool, as_json: bool) -> None:
    """List the targets of `optc compile --target`, and the scheme that --int8, --int4 and --fp8 mean for each.

    \b
    Examples:
      optc targets
      optc targets --schemes
      optc targets --json
    """
    if schemes:
        _list_schemes(as_json=as_json)
        return
    from dataclasses import asdict

    from .quantization import PRESETS, preset_schemes
    from .targets import TARGETS, find_target

    found = [find_target("native"), *TARGETS.values()]
    if as_json:
        click.echo(json.dumps([{**asdict(target), "presets": preset_schemes(target)} for target in found], indent=1))
        return
    hardware = Table("target", "architecture", "memory", "bandwidth", "fast arithmetic (peak TFLOP/s)", "native code")
    presets = Table(
        "target", *(f"--{preset}" for preset in PRESETS), title="What the presets mean", title_justify="left"
    )
    for target in found:
        memory = f"{target.memory_gib} GiB" if target.memory_gib else "-"
        bandwidth = f"{target.bandwidth_gbs} GB/s" if target.bandwidth_gbs else "-"
        rates = ", ".join(f"{dtype} {rate:g}" for dtype, rate in target.tflops.items()) or "-"
        native = "made here" if target.can_build_here() else "pending"
        hardware.add_row(target.name, target.architecture, memory, bandwidth, rates, native)
        presets.add_row(target.name, *(scheme or "-" for scheme in preset_schemes(target).values()))
    Console().print(hardware, presets)


def _list_schemes(*, as_json: bool) -> None:
    from ..runtime.scheme import find_scheme, scheme_names

    found = {name: find_scheme(name) for name in scheme_names()}
    if as_json:
        records = [
            {"name": name, "bits_per_weight": scheme.weights.bits_per_weight, **scheme.model_dump(mode="json")}
            for name, scheme in found.items()
        ]
        click.echo(json.dumps(records, indent=1))
        return
    table = Table(
        Column("scheme", no_wrap=True), "weights", "one scale for", "zero points", "activations", "bits a weight"
    )
    for name, scheme in found.items():
        weights = scheme.weights
        kind = f"INT{weights.num_bits}" if weights.type == "int" else "FP8 E4M3"
        shared = {"tensor": "the weight", "channel": "a row", "group": f"{weights.group_size} of a row"}
        scale = shared.get(weights.strategy) or "128 x 128"
        zero = "no" if weights.symmetric else "yes"
        activations = "as they are" if scheme.activation == "none" else scheme.activation
        table.add_row(name, kind, scale, zero, activations, f"{weights.bits_per_weight:g}")
    Console().print(table)


@click.command("export", short_help="Write an artifact's model as a checkpoint for other tools.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--format", type=click.Choice(["compressed-tensors"]), default="compressed-tensors", show_default=True,
              help="How quantized weights are stored.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Checkpoint folder to write.")
def export_command(artifact: Path, format: str, output: Path) -> None:
    """Write the quantized model of ARTIFACT as a checkpoint that transformers and vLLM load, codes and scales to the bit.

    \b
    Examples:
      optc export my.optc -o my-w4a16
      optc export my.optc --format compressed-tensors -o my-w4a16
    """
    from .export import export

    for remark in export(artifact, output, format=format):
        click.echo(f"note: {remark}", err=True)
    click.echo(f"wrote {output}")


@click.command("passes", short_help="List the passes in the order they run.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def passes_command(as_json: bool) -> None:
    """List the passes in the order they run, each with its rewrite.

    \b
    Example:
      optc passes
    """
    from ..passes.quantize.calibrate import Calibration
    from ..passes.quantize.recipe import Recipe
    from .config import CompileConfig
    from .pipeline import float_passes, quantize_passes, step_passes
    from .targets import find_target

    recipe = Recipe(default="w4a16-g128", transforms=("smoothquant", "awq"), kv_cache="int8")
    config = CompileConfig(source="", output=Path(), target=find_target("native"), recipe=recipe)
    # The transforms take the data that they will run on.
    shared = [*float_passes(config, Calibration((), source="", seed=0)), *quantize_passes(config)]
    rows = [("both", item) for item in shared] + [("step", item) for item in step_passes(config)]
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


@click.command("eval", short_help="Measure an artifact on a text.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--text", type=click.Path(path_type=Path), required=True, metavar="FILE", help="UTF-8 text to predict.")
@click.option("--against", metavar="MODEL",
              help="Compare with this checkpoint (folder or hub id), run in float32, or with another artifact.")  # fmt: skip
@click.option(
    "--window", type=click.IntRange(2), help="Tokens of a window.  [default: the context length, at most 1024]"
)
@click.option("--max-windows", type=click.IntRange(1), help="Take only the first so many.  [default: all]")
@click.option("--no-native", is_flag=True, help="Load no native code: only data, run by known ops.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def eval_command(
    artifact: Path,
    text: Path,
    against: str | None,
    window: int | None,
    max_windows: int | None,
    no_native: bool,
    as_json: bool,
) -> None:
    """Measure how well ARTIFACT predicts a text, and how far it is from the model that it was made of.

    The text is cut into windows that do not overlap. Each begins with the token that the tokenizer puts before a text,
    such as BOS; all others are predicted, by the artifact's own step program. With --against: the KL divergence of the
    next-token distributions in nats, how often both find the same token most likely, and the change of the perplexity.

    \b
    Examples:
      optc eval my.optc --text heldout.txt
      optc eval my.optc --text heldout.txt --against ./my-llama
      optc eval int4.optc --text heldout.txt --against int8.optc --json
    """
    console = Console(stderr=True, quiet=as_json)
    with Progress(*_COLUMNS, console=console, transient=True) as bars:
        from ..runtime.report import accuracy_table
        from .evaluate import evaluate

        task = bars.add_task("evaluate", total=1)
        record = evaluate(
            artifact,
            text,
            against=against,
            window=window,
            max_windows=max_windows,
            native=not no_native,
            on_fraction=lambda fraction: bars.update(task, completed=fraction),
        )
    if as_json:
        click.echo(json.dumps({"artifact": str(artifact), **record.model_dump(mode="json")}, indent=1))
    else:
        Console().print(accuracy_table(record))


@click.command(
    "lm-eval",
    short_help="Run lm-eval's tasks on an artifact.",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="...")
def lm_eval_command(arguments: tuple[str, ...]) -> None:
    """Run the command line of lm-eval (EleutherAI's harness) with the model `optc` added to those it has.

    Arguments of the model: path, native (True), max_length (the context length). --batch_size is how many sequences share
    a step. Needs pip install "optc[eval]".

    \b
    Examples:
      optc lm-eval run --model optc --model_args path=my.optc --tasks hellaswag --batch_size 16
      optc lm-eval ls tasks
    """
    try:
        from .lm_eval import main
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise UsageError('lm-eval is not installed: pip install "optc[eval]"') from error
    main(list(arguments))
