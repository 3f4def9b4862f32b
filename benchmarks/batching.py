"""Many requests of mixed lengths: continuous batching beside static batching and OpenVINO GenAI's, in turns.

    python benchmarks/batching.py --peers PEERS      # the environment of the peers, as for cpu.py

Each engine stays loaded in a process of its own. In each round every one completes the same requests, once, in an order
that changes from round to round; figures are medians. Total throughput counts prompt and generated tokens. Static batching
is optc's own engine and kernels, given groups of requests: prompts are padded to the group's longest, and a group decodes
until its longest completion is done. OpenVINO runs with several budgets of tokens a step; the best one counts.

Further figures of optc: the share of slots in used blocks of the KV cache that hold nothing, mean over all steps; the share
of a step outside the step program; and on few-shot prompts the share of the prompt tokens that is found in the prefix
cache, beside the most that whole blocks allow.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import click
from cpu_models import ENGINES, HERE, MissingError, Models
from cpu_worker import Worker

STATIC_BATCHES = (16, 32, 64)
OPENVINO_BUDGETS = (256, 512, 2**31 - 1)


def workload(count: int, seed: int, vocab: int) -> dict[str, Any]:
    """Prompts of 16 to 200 random tokens, completions of 32 to 128."""
    numbers = random.Random(seed)
    lengths = [(numbers.randint(16, 200), numbers.randint(32, 128)) for _ in range(count)]
    prompts = [[numbers.randrange(2, vocab) for _ in range(prompt)] for prompt, _ in lengths]
    return {"prompts": prompts, "counts": [completion for _, completion in lengths]}


def few_shot(count: int, seed: int, vocab: int) -> dict[str, Any]:
    """Questions of 20 to 60 tokens behind one of 4 sets of examples, of 700 to 900 tokens; short answers."""
    numbers = random.Random(seed)

    def tokens(least: int, most: int) -> list[int]:
        return [numbers.randrange(2, vocab) for _ in range(numbers.randint(least, most))]

    examples = [tokens(700, 900) for _ in range(4)]
    return {"prompts": [examples[n % 4] + tokens(20, 60) for n in range(count)], "counts": [8] * count}


@click.command(help=__doc__.split("\n")[0])
@click.option("--requests", default=64, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--threads", type=int, default=lambda: len(os.sched_getaffinity(0)), help="Of every engine.")
@click.option("--peers", type=click.Path(path_type=Path), envvar="OPTC_BENCH_PEERS", help="Environment of the peers.")
@click.option(
    "--work", type=click.Path(path_type=Path), envvar="OPTC_BENCH_WORK", default="build/cpu-bench", show_default=True
)
@click.option("--artifact", type=click.Path(path_type=Path, exists=True), help="Instead of making one of shape A.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the figures here.")
def main(
    requests: int, rounds: int, threads: int, peers: Path | None, work: Path, artifact: Path | None, file: Path | None
) -> None:
    """Measure, print, and write JSON."""
    models = Models(work, peers, threads=threads, keep=False)
    config = json.loads((models.shape_a / "config.json").read_text())
    vocab = config["vocab_size"]
    commands: dict[str, list[str]] = {}
    for spec in ENGINES["int4"]:
        if spec.kind not in ("optc", "openvino"):
            continue
        try:
            given = artifact if spec.kind == "optc" else None
            python, path = (
                (sys.executable, str(given))
                if given
                else _worker(models.command(spec, models.shape_a, algorithm="rtn-minmax"))
            )
        except MissingError as error:
            click.echo(f"{spec.name}: left out: {error}")
            continue
        commands[spec.kind] = [python, str(HERE / "batching_worker.py"), spec.kind, path]
    workers = {
        name: Worker(name, command, threads=threads, log=work / "workers.log") for name, command in commands.items()
    }
    try:
        runs: dict[str, tuple[str, str, dict[str, Any]]] = {"optc": ("optc", "continuous", {})}
        runs |= {f"optc, static {n}": ("optc", "static", {"batch": n}) for n in STATIC_BATCHES}
        if "openvino" in workers:
            runs |= {
                f"OpenVINO, {n if n < 2**31 - 1 else 'unlimited'}": ("openvino", "continuous", {"budget": n})
                for n in OPENVINO_BUDGETS
            }
        found = measure(workers, runs, requests, rounds, vocab)
        shots = workers["optc"].ask("few_shot", **few_shot(requests, 0, vocab))
        report(found, shots, {name: worker.details for name, worker in workers.items()}, file)
    finally:
        for worker in workers.values():
            worker.close()


def _worker(command: list[str]) -> tuple[str, str]:
    """The interpreter and the model of a worker of cpu.py."""
    return command[0], command[-1]


def measure(
    workers: dict[str, Worker], runs: dict[str, tuple[str, str, dict[str, Any]]], requests: int, rounds: int, vocab: int
) -> dict[str, list[dict[str, Any]]]:
    """Figures of each run, one of each round; a first, short round does not count."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    for number in range(-1, rounds):
        load = workload(8 if number < 0 else requests, max(number, 0), vocab)
        total = sum(map(len, load["prompts"])) + sum(load["counts"])
        order = list(runs)
        shift = number % len(order)
        for name in order[shift:] + order[:shift]:
            worker, do, options = runs[name]
            figures = workers[worker].ask(do, **load, **options)
            if number >= 0:
                found[name].append(figures | {"rate": total / figures["seconds"]})
    return found


def report(
    found: dict[str, list[dict[str, Any]]], shots: dict[str, Any], details: dict[str, Any], file: Path | None
) -> None:
    """Print medians, spreads and ratios."""
    rates = {name: [one["rate"] for one in figures] for name, figures in found.items()}
    ours = rates["optc"]
    for name, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(ours, values, strict=True))
        spread = f"{min(values):.0f}-{max(values):.0f}"
        click.echo(f"{name:22} {statistics.median(values):7.0f} tokens/s ({spread}), optc {ratio:.2f}x")
    waste = statistics.median(one["kv_waste"] for one in found["optc"])
    overhead = statistics.median(one["engine_overhead"] for one in found["optc"])
    click.echo(f"KV waste {waste:.2%}; engine overhead {overhead:.2%}")
    share = shots["hit_rate"] / shots["block_maximum"]
    click.echo(f"few-shot: {shots['hit_rate']:.2%} of the prompt tokens found, {share:.2%} of what whole blocks allow")
    if file is not None:
        record = {"runs": found, "few_shot": shots, "details": details}
        file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
