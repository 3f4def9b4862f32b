"""optc side by side with llama.cpp, OpenVINO GenAI, ONNX Runtime GenAI and transformers on this processor, speed and accuracy.

    python -m venv PEERS       # the peers have an environment of their own
    CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" PEERS/bin/pip install -r benchmarks/requirements-peers.txt
    python benchmarks/cpu.py --shape A --format int4 --peers PEERS

Every engine lives in a process of its own, stays loaded, and works only while it is asked: in each round each engine is
asked once, in an order that changes from round to round, with the machine's memory bandwidth measured before and after;
a measurement beside a low one, as a virtual machine has at times, or beside other programs is made again (bandwidth.py).
A decode figure is the rate of the steps after the prefill. It is held against the roofline: the time in which the bytes
that the step reads (weights, and keys and values) can be read, measured between a few steps and the next few. A peer that
is not installed is left out, and the output says so. ONNX Runtime GenAI has no 16-bit form for processors and stands in
float32 beside bf16, its keys and values always; its 8-bit cache needs calibrated scales and is left out.
Results go into a JSON file, those of earlier calls are kept; the table and the plots are made of all.

Accuracy is the KL divergence of the bundled model in the same format from the checkpoint in float32, by each engine's own
arithmetic. Machines that others use too: `--prepare-only` makes the models, `--keep` then takes the artifacts as they are.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import cpu_report
import numpy as np
from bandwidth import ATTEMPTS, TURNS, Bandwidth, Measured, Steady
from cpu_models import ENGINES, FORMATS, TINY, EngineSpec, MissingError, Models
from cpu_worker import Worker, WorkerError

PAUSE = 0.05  # seconds between two engines: threads of the last one go to sleep
HELD_STEPS = 16  # of a measurement that goes on with the sequences of the last
TURN_STEPS = 4  # between two reads of the memory
KL_WINDOWS, KL_WINDOW = 16, 512


@dataclass(frozen=True)
class Case:
    """One workload: a decode step of `batch` sequences after `context` tokens each, or the prefill of `context` tokens."""

    name: str
    title: str
    context: int
    batch: int = 1
    prefill: bool = False
    kv8: bool = False

    @property
    def holds(self) -> bool:
        """Whether the prefill is so long that rounds go on with the same sequences, which grow by their steps."""
        return not self.prefill and self.batch * self.context > 1024

    def open(self, worker: Worker, *, room: int, seed: int, vocab: int) -> None:
        worker.ask("open", batch=self.batch, context=self.context, room=room, seed=seed, vocab=vocab)

    def ask(self, worker: Worker, *, steps: int, seconds: float, seed: int, vocab: int) -> dict[str, Any]:
        """One measurement."""
        if self.prefill:
            return worker.ask("prefill", tokens=self.context, seed=seed, vocab=vocab)
        if self.holds:
            return worker.ask("decode", batch=self.batch, steps=HELD_STEPS, seconds=3600)
        self.open(worker, room=steps, seed=seed, vocab=vocab)
        found = worker.ask("decode", batch=self.batch, steps=steps, seconds=seconds)
        worker.ask("close")
        return found

    def bytes_read(self, details: dict[str, Any], grown: float) -> float:
        """By a decode step after so many."""
        return float(details["weight_bytes"] + self.batch * (self.context + grown) * details["kv_bytes"])

    def roofline(self, worker: Worker, steady: Steady, *, vocab: int) -> float:
        """The share of the roofline that decode steps reach; sequences that are held go on."""
        if not self.holds:
            self.open(worker, room=TURNS * TURN_STEPS, seed=0, vocab=vocab)

        def steps() -> float:
            found = worker.ask("decode", batch=self.batch, steps=TURN_STEPS, seconds=3600)
            return TURN_STEPS * float(found["step_seconds"])

        size = TURN_STEPS * self.bytes_read(worker.details, TURNS * TURN_STEPS / 2)
        share = steady.share(steps, int(size))
        if not self.holds:
            worker.ask("close")
        return share


CASES = [
    *(Case(f"decode{batch}", f"decode, batch {batch}, context 128", 128, batch) for batch in (1, 4, 16, 64)),
    Case("prefill", "prefill of 512 tokens", 512, prefill=True),
    Case("long", "decode, context 4,096", 4096),
    Case("long-kv8", "decode, context 4,096, 8-bit KV", 4096, kv8=True),
]


@click.command(help=__doc__.split("\n")[0])
@click.option("--shape", type=click.Choice(["A", "tiny"]), default="A", help="367M random Llama, or the bundled model.")
@click.option("--model", type=click.Path(path_type=Path, exists=True), help="A checkpoint (Llama), instead of a shape.")
@click.option("--format", "formats", type=click.Choice(FORMATS), multiple=True, default=["int4"], show_default=True)
@click.option(
    "--case", "names", type=click.Choice([case.name for case in CASES]), multiple=True, help="All by default."
)
@click.option(
    "--engine", "only", multiple=True, help="Part of an engine's name, such as optc or llama; all by default."
)
@click.option("--rounds", default=5, show_default=True)
@click.option("--steps", default=64, show_default=True, help="Decode steps of a measurement, at most.")
@click.option(
    "--seconds", default=1.0, show_default=True, help="Decode steps of a measurement take about so long at most."
)
@click.option(
    "--threads", type=int, default=lambda: len(os.sched_getaffinity(0)), help="Of every engine; all cores by default."
)
@click.option("--peers", type=click.Path(path_type=Path), envvar="OPTC_BENCH_PEERS", help="Environment of the peers.")
@click.option(
    "--work", type=click.Path(path_type=Path), envvar="OPTC_BENCH_WORK", default="build/cpu-bench", show_default=True
)
@click.option("--json", "file", type=click.Path(path_type=Path), help="Results; WORK/results.json by default.")
@click.option("--algorithm", default="rtn", show_default=True, help="Of optc for speed: the codes do not change it.")
@click.option("--keep", is_flag=True, help="Take optc artifacts that are there already.")
@click.option("--prepare-only", is_flag=True, help="Make the models and stop.")
@click.option("--speed/--no-speed", default=True)
@click.option("--accuracy/--no-accuracy", default=True, help="KL divergence on the bundled model.")
def main(
    shape: str,
    model: Path | None,
    formats: tuple[str, ...],
    names: tuple[str, ...],
    only: tuple[str, ...],
    rounds: int,
    steps: int,
    seconds: float,
    threads: int,
    peers: Path | None,
    work: Path,
    file: Path | None,
    algorithm: str,
    keep: bool,
    prepare_only: bool,
    speed: bool,
    accuracy: bool,
) -> None:
    """Measure, and write JSON, Markdown and plots."""
    work.mkdir(parents=True, exist_ok=True)
    models = Models(work, peers, threads=threads, keep=keep)
    results = cpu_report.Results(file or work / "results.json")
    label, checkpoint = (model.name, model) if model else (shape, models.shape_a if shape == "A" else TINY)
    cases = [case for case in CASES if not names or case.name in names]
    bench = Bench(models, checkpoint, label, threads, algorithm, only)
    steady: Steady | None = None
    for kind in formats:
        if prepare_only:
            bench.prepare(kind, cases if speed else [], accuracy)
            continue
        if accuracy:
            results.add_accuracy(kind, bench.accuracy(kind))
        if speed:
            steady = steady or Steady(Bandwidth(work, threads), work / "best-bandwidth")
            for case in cases:
                found = bench.measure(kind, case, steady, rounds=rounds, steps=steps, seconds=seconds)
                if found is not None:
                    results.add_speed(label, kind, case.name, case.title, found)
    if not prepare_only:
        results.write()


def summarize(case: Case, details: dict[str, Any], measured: list[Measured], roofline: float | None) -> dict[str, Any]:
    """Figures of one engine, of the steady rounds if there are any; decode also its bytes a step and the roofline's share."""
    found = [one.value for one in measured if one.steady] or [one.value for one in measured]
    rates = [one["rate"] for one in found]
    step = statistics.median(one["step_seconds"] for one in found)
    inner = [one["model_seconds"] for one in found if one["model_seconds"] is not None]
    summary: dict[str, Any] = {
        "rate": statistics.median(rates),
        "rates": rates,
        "step_seconds": step,
        "model_seconds": statistics.median(inner) if inner else None,
        "rounds": [
            {**one.value, "bandwidths": one.bandwidths, "foreign": one.foreign, "steady": one.steady}
            for one in measured
        ],
        "steady": sum(one.steady for one in measured),
        "details": details,
    }
    if roofline is not None:
        read = case.bytes_read(details, statistics.mean(one["grown"] for one in found))
        summary |= {"bytes": read, "roofline": roofline}
    return summary


class Bench:
    """Runs cases over the engines of a format.

    Args:
        models: makes their models.
        checkpoint, label: the model, and what to call it.
        threads: of every engine.
        algorithm: by which optc chooses codes where only speed counts.
        only: parts of engines' names; none is all.
    """

    def __init__(
        self, models: Models, checkpoint: Path, label: str, threads: int, algorithm: str, only: tuple[str, ...]
    ) -> None:
        self._models, self._checkpoint, self._label = models, checkpoint, label
        self._threads, self._algorithm, self._only = threads, algorithm, only
        config = json.loads((checkpoint / "config.json").read_text())
        self._vocab, self._positions = config["vocab_size"], config["max_position_embeddings"]
        self._workers: dict[tuple[str, str, bool], Worker] = {}

    def prepare(self, kind: str, cases: list[Case], accuracy: bool) -> None:
        """Make the models of a format."""
        for spec, kv8 in {(spec, self._kv8(spec, case)) for case in cases for spec in self._specs(kind, case)}:
            self._command(spec, kv8)
        for spec, algorithm in self._accuracy_specs(kind) if accuracy else ():
            with self._or_left_out(spec):
                self._models.command(spec, TINY, algorithm=algorithm)

    def measure(
        self, kind: str, case: Case, steady: Steady, *, rounds: int, steps: int, seconds: float
    ) -> dict[str, Any] | None:
        """The case by every engine in turns: lists of figures, one of each round."""
        room = (
            HELD_STEPS * (1 + ATTEMPTS * rounds) + TURNS * TURN_STEPS if case.holds else max(steps, TURNS * TURN_STEPS)
        )
        if not case.prefill and case.context + room + 4 > self._positions:
            click.echo(f"{kind} {case.title}: more than the {self._positions} positions of the model, left out")
            return None
        workers = self._start(kind, case)
        options: dict[str, Any] = {"steps": steps, "seconds": seconds, "vocab": self._vocab}
        for name in list(workers):
            try:  # compiles and touches everything first
                if case.holds:
                    case.open(workers[name], room=room, seed=0, vocab=self._vocab)
                case.ask(workers[name], **options | {"steps": 4}, seed=0)
            except WorkerError as error:
                click.echo(f"{name}: {error}")
                del workers[name]
        figures: dict[str, list[Measured]] = {name: [] for name in workers}
        for number in range(rounds):
            order = list(workers)
            shift = number % max(1, len(order))
            for name in order[shift:] + order[:shift]:
                time.sleep(PAUSE)
                figures[name].append(steady.measure(partial(case.ask, workers[name], **options, seed=1 + number)))
        shares: dict[str, float | None] = {
            name: None if case.prefill else case.roofline(worker, steady, vocab=self._vocab)
            for name, worker in workers.items()
        }
        for worker in workers.values() if case.holds else ():
            worker.ask("close")
        seen = [value for found in figures.values() for one in found if one.steady for value in one.bandwidths]
        bandwidth = statistics.median(seen) if seen else steady.best
        engines = {name: summarize(case, workers[name].details, found, shares[name]) for name, found in figures.items()}
        cpu_report.print_case(kind, case.title, engines, bandwidth)
        return {"threads": self._threads, "bandwidth": bandwidth, "engines": engines}

    def accuracy(self, kind: str) -> dict[str, Any]:
        """KL divergence and more of the bundled model by each engine, over the same windows of tokens."""
        import tokenizers
        import torch

        from optc.optimizer import accuracy as measures
        from optc.optimizer.evaluate import make_windows

        tokenizer = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
        text = (TINY / "heldout.txt").read_text(encoding="utf-8")
        windows = make_windows(tokenizer, text, "heldout.txt", limit=1024, window=KL_WINDOW, max_windows=KL_WINDOWS)
        found = {}
        with tempfile.TemporaryDirectory() as name:
            file = Path(name) / "logits.npy"

            def logits(title: str, command: list[str]) -> list[torch.Tensor]:
                worker = Worker(title, command, threads=self._threads, log=self._models.work / "workers.log")
                try:
                    got = []
                    for tokens in windows.tokens:
                        worker.ask("logits", tokens=tokens.tolist(), file=str(file))
                        got.append(torch.from_numpy(np.load(file)))
                    return got
                finally:
                    worker.close()

            reference = logits("reference", self._models.reference(TINY))
            for spec, algorithm in self._accuracy_specs(kind):
                title = f"{spec.name} {algorithm}" if algorithm else spec.name
                with self._or_left_out(spec):
                    command = self._models.command(spec, TINY, algorithm=algorithm)
                    pairs = zip(windows.tokens, logits(title, command), reference, strict=True)
                    compared = [
                        measures.compare(tokens, got, expected, skip=windows.skip) for tokens, got, expected in pairs
                    ]
                    found[title] = measures.summarize(compared).model_dump(mode="json")
                    cpu_report.print_accuracy(kind, title, found[title])
        return found

    def _accuracy_specs(self, kind: str) -> Iterator[tuple[EngineSpec, str | None]]:
        """Engines, optc by its preset's own algorithm and, like the peers, without calibration data."""
        for spec in ENGINES[kind]:
            if self._wanted(spec) and spec.kind != "compiled":
                yield spec, None
                if spec.kind == "optc" and kind != "bf16":
                    yield spec, "rtn"

    def _start(self, kind: str, case: Case) -> dict[str, Worker]:
        """A loaded worker for each engine of a format that has the case; those of other formats end."""
        for key in [key for key in self._workers if key[0] != kind]:
            self._workers.pop(key).close()
        found = {}
        for spec in self._specs(kind, case):
            kv8 = self._kv8(spec, case)
            key = (kind, spec.name, kv8)
            if key not in self._workers:
                command = self._command(spec, kv8)
                if command is None:
                    continue
                log = self._models.work / "workers.log"
                with self._or_left_out(spec):
                    self._workers[key] = Worker(spec.name, command, threads=self._threads, log=log)
            if key in self._workers:
                found[spec.name] = self._workers[key]
        return found

    def _specs(self, kind: str, case: Case) -> list[EngineSpec]:
        return [spec for spec in ENGINES[kind] if self._wanted(spec) and (not case.kv8 or spec.kv8 != "no")]

    def _wanted(self, spec: EngineSpec) -> bool:
        return not self._only or any(part in spec.name for part in self._only)

    @staticmethod
    def _kv8(spec: EngineSpec, case: Case) -> bool:
        """Whether the case needs the engine with an option for 8-bit keys and values."""
        return case.kv8 and spec.kv8 == "option"

    def _command(self, spec: EngineSpec, kv8: bool) -> list[str] | None:
        with self._or_left_out(spec):
            algorithm = self._algorithm if spec.kind == "optc" and spec.weights != "bf16" else None
            return self._models.command(spec, self._checkpoint, kv8=kv8, algorithm=algorithm)
        return None

    @contextmanager
    def _or_left_out(self, spec: EngineSpec) -> Iterator[None]:
        """An engine that is not there is named and left out."""
        try:
            yield
        except (MissingError, WorkerError) as error:
            click.echo(f"{spec.name}: left out: {error}")


if __name__ == "__main__":
    main()
