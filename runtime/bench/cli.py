"""`optc bench ARTIFACT latency|throughput|serve`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ...errors import UsageError
from ..byte_size import BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..manifest import Manifest
    from ..tokenizer import Tokenizer
    from .figures import Served
    from .workload import Task

Command = Callable[..., Any]


@click.group("bench", short_help="Measure the speed of an artifact.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.pass_context
def bench_command(ctx: click.Context, /, artifact: Path) -> None:
    """Measure ARTIFACT: the latency of a batch, the throughput of many requests, or a service.

    \b
    Examples:
      optc bench my.optc latency --input-len 128 --output-len 128
      optc bench my.optc throughput --requests 64 --input-len 16-200 --output-len 32-128
      optc bench my.optc serve --rate 4 --slo ttft:500ms,tpot:50ms --json out.json --plot out.png
    """
    ctx.obj = artifact


def _engine_options(command: Command) -> Command:
    """Options of the engine, which the command gets as `engine`, keyword arguments of `LLM`."""
    options: list[Callable[[Command], Command]] = [
        click.option("--max-num-seqs", type=click.IntRange(1), default=64, show_default=True, help="In a step."),
        click.option(
            "--max-num-batched-tokens", type=click.IntRange(1), default=512, show_default=True, help="In a step."
        ),
        click.option("--kv-cache-memory", type=BYTES, help="Such as 4GiB.  [default: up to a quarter of what is free]"),
        click.option("--no-prefix-caching", is_flag=True, help="Compute every prompt from its beginning."),
        click.option("--no-native", is_flag=True, help="Load no native code: only data, run by known ops."),
    ]

    @wraps(command)
    def gathered(*arguments: Any, no_prefix_caching: bool, no_native: bool, **options: Any) -> Any:
        names = ("max_num_seqs", "max_num_batched_tokens", "kv_cache_memory")
        engine = {name: options.pop(name) for name in names}
        engine |= {"prefix_caching": not no_prefix_caching, "native": not no_native}
        return command(*arguments, engine=engine, **options)

    found: Command = gathered
    for option in reversed(options):
        found = option(found)
    return found


def _workload_options(command: Command) -> Command:
    options: list[Callable[[Command], Command]] = [
        click.option("--input-len", default="128", show_default=True, help="Tokens of a prompt: 128, or 16-200."),
        click.option("--output-len", default="128", show_default=True, help="Tokens to generate: 128, or 32-128."),
        click.option("--seed", default=0, show_default=True, help="Of the workload."),
        click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures here."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _request_options(command: Command) -> Command:
    options: list[Callable[[Command], Command]] = [
        click.option("--requests", type=click.IntRange(1), default=64, show_default=True),
        click.option("--prefixes", type=click.IntRange(1), help="Prompts begin with one of so many prefixes."),
        click.option("--prefix-len", type=click.IntRange(1), default=256, show_default=True, help="Of those prefixes."),
        click.option("--file", type=click.Path(path_type=Path, exists=True), help="Prompts: lines of text, or .jsonl."),
        _workload_options,
    ]
    for option in reversed(options):
        command = option(command)
    return command


@bench_command.command("latency")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Requests that start together.")
@click.option("--rounds", type=click.IntRange(1), default=10, show_default=True)
@click.option("--warmup", type=click.IntRange(0), default=2, show_default=True, help="Rounds that do not count.")
@_workload_options
@click.pass_obj
@_engine_options
def _latency(
    artifact: Path,
    /,
    engine: dict[str, Any],
    batch: int,
    rounds: int,
    warmup: int,
    input_len: str,
    output_len: str,
    seed: int,
    json_file: Path | None,
) -> None:
    """Time a batch that starts together, over and over."""
    from ..llm import LLM
    from . import drive, workload

    lengths = workload.Lengths.parse(input_len), workload.Lengths.parse(output_len)
    with LLM(artifact, **engine) as llm:
        tasks = workload.synthetic(batch, *lengths, vocab_size=llm.manifest.model.vocab_size, seed=seed)
        drive.check_fit(tasks, llm.manifest.model.max_model_len)
        _report("latency", llm.manifest, drive.latency(llm, tasks, rounds=rounds, warmup=warmup), json_file)


@bench_command.command("throughput")
@_request_options
@click.pass_obj
@_engine_options
def _throughput(artifact: Path, /, engine: dict[str, Any], json_file: Path | None, **options: Any) -> None:
    """Run many requests at once, as fast as they go."""
    from ..llm import LLM
    from . import drive

    with LLM(artifact, **engine) as llm:
        tasks = _tasks(llm.manifest, llm.tokenizer, **options)
        with _progress(len(tasks)) as advance:
            figures = drive.throughput(llm, tasks, on_request=advance)
        _report("throughput", llm.manifest, figures, json_file)


@bench_command.command("serve")
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Requests a second.  [default: all at once]")
@click.option(
    "--burstiness",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="1 is a Poisson process, less comes in bursts, more is steadier.",
)
@click.option("--concurrency", type=click.IntRange(1), help="Most requests at a time.")
@click.option("--slo", default="", help="Limits that a good request keeps, such as ttft:500ms,tpot:50ms,e2e:10s.")
@click.option(
    "--decode-stretch",
    type=click.FloatRange(0),
    default=3.0,
    show_default=True,
    help="Longest step with prompts in it, in steps without; 0 is no limit.",
)
@click.option("--plot", type=click.Path(path_type=Path), help="Write distributions of the times here, as PNG.")
@_request_options
@click.pass_obj
@_engine_options
def _serve(
    artifact: Path,
    /,
    engine: dict[str, Any],
    rate: float | None,
    burstiness: float,
    concurrency: int | None,
    slo: str,
    decode_stretch: float,
    plot: Path | None,
    json_file: Path | None,
    seed: int,
    **options: Any,
) -> None:
    """Send requests to an engine in this process as they arrive, and read their streams."""
    from ..async_engine import AsyncEngine
    from . import drive, workload
    from .figures import parse_slo

    wanted = parse_slo(slo) if slo else {}
    if plot is not None:
        _need_matplotlib()

    async def run() -> tuple[Manifest, dict[str, Any], list[Served]]:
        unlimited = {"max_queued_requests": None, "max_queued_tokens": None}
        limits = engine | unlimited | {"decode_stretch": decode_stretch or None}
        async with AsyncEngine(artifact, **limits) as running:
            manifest = running.llm.manifest
            tasks = _tasks(manifest, running.llm.tokenizer, seed=seed, **options)
            times = workload.arrival_times(len(tasks), rate=rate, burstiness=burstiness, seed=seed)
            with _progress(len(tasks)) as advance:
                figures, served = await drive.serve(
                    running, tasks, times, concurrency=concurrency, slo=wanted, on_request=advance
                )
            return manifest, figures, served

    manifest, figures, served = asyncio.run(run())
    _report("serve", manifest, figures, json_file)
    if plot is not None:
        _plot(served, plot)
        click.echo(f"wrote {plot}")


def _tasks(
    manifest: Manifest,
    tokenizer: Tokenizer | None,
    *,
    requests: int,
    prefixes: int | None,
    prefix_len: int,
    file: Path | None,
    input_len: str,
    output_len: str,
    seed: int,
) -> list[Task]:
    from . import drive, workload

    inputs, outputs = workload.Lengths.parse(input_len), workload.Lengths.parse(output_len)
    vocab_size = manifest.model.vocab_size
    if file is not None and prefixes is not None:
        raise UsageError("--file goes with no --prefixes")
    if file is not None:
        if tokenizer is None:
            raise UsageError(f"{file}: the checkpoint of this artifact had no tokenizer")
        tasks = workload.from_file(file, requests, outputs, encode=tokenizer.encode, seed=seed)
    elif prefixes is not None:
        tasks = workload.prefix_repetition(
            requests,
            inputs,
            outputs,
            prefixes=prefixes,
            prefix_length=prefix_len,
            vocab_size=vocab_size,
            seed=seed,
        )
    else:
        tasks = workload.synthetic(requests, inputs, outputs, vocab_size=vocab_size, seed=seed)
    drive.check_fit(tasks, manifest.model.max_model_len)
    return tasks


@contextmanager
def _progress(count: int) -> Iterator[Callable[[], None]]:
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("requests", total=count)
        yield lambda: bar.advance(task)


def _report(mode: str, manifest: Manifest, figures: dict[str, Any], file: Path | None) -> None:
    table = Table(title=f"{mode}: {manifest.model.architecture}, {manifest.target}", title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        parts = (
            [f"{key} {_short(inner)}" for key, inner in value.items()] if isinstance(value, dict) else [_short(value)]
        )
        table.add_row(name, ", ".join(parts))
    Console().print(table)
    if file is not None:
        record = {"mode": mode, "artifact": manifest.identity, "target": manifest.target, **figures}
        file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:,.0f}"


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError('--plot needs matplotlib: pip install "optc[bench]"') from error


def _plot(served: Sequence[Served], file: Path) -> None:
    """Cumulative distributions of the times of requests that were served."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    done = [one for one in served if one.error is None and one.arrivals]
    times = {
        "TTFT": [one.ttft for one in done],
        "ITL": [value for one in done for value in one.itl],
        "E2E": [one.e2e for one in done],
    }
    figure, axes = pyplot.subplots(1, len(times), figsize=(4 * len(times), 3))
    for axis, (name, values) in zip(axes, times.items(), strict=True):
        ordered = sorted(value * 1e3 for value in values)
        axis.plot(ordered, [(number + 1) / len(ordered) for number in range(len(ordered))])
        axis.set(xlabel=f"{name}, ms", ylabel="share of requests" if name != "ITL" else "share of tokens")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
