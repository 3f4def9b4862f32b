"""The two ends of a benchmark worker: an engine that stays loaded in a process of its own and answers commands.

A command and its answer are a line of JSON each, over standard input and output; whatever else the engine prints goes to
standard error. Between commands a worker waits in `readline`, so it takes no processor time. Used in optc's environment
and in that of the peers; imports nothing of either.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

WARM_STEPS = 2
LEAST_STEPS = 6


class Engine(Protocol):
    """What every engine does, driven by its own public interface. Token ids are i64."""

    def details(self) -> dict[str, Any]:
        """What runs: `versions`, `weight_bytes` and `kv_bytes` (read a decode step; per token of context), `notes`."""

    def start(self, prompts: np.ndarray, room: int) -> None:
        """Prefill prompts [B, n], with room for so many new tokens each; the first of them is known then."""

    def step(self) -> float | None:
        """One token more for every sequence; the seconds inside the model alone, where they can be told apart."""

    def stop(self) -> None:
        """Drop the sequences."""

    def prefill(self, prompt: np.ndarray) -> None:
        """Run a prompt [n] up to its first new token, and drop it."""

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Logits f32[n, V] of a sequence [n]."""


def serve(engine: Any, commands: Any = None) -> None:
    """Answer commands, which are the methods of `commands`, by default `Commands(engine)`, until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    commands = commands or Commands(engine)

    def answer(found: dict[str, Any]) -> None:
        print(json.dumps(found), file=answers, flush=True)

    answer(engine.details())
    for line in sys.stdin:
        options = json.loads(line)
        try:
            answer(getattr(commands, options.pop("do"))(**options))
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {error}"})


class Commands:
    """What a worker can be asked to do; options and answers are JSON."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._taken = 0

    def open(self, batch: int, context: int, room: int, seed: int, vocab: int) -> dict[str, Any]:
        """Prefill sequences, and take the first steps, which do not count."""
        prompts = np.random.default_rng(seed).integers(2, vocab, (batch, context))
        self._engine.start(prompts, room=room + WARM_STEPS + 2)
        for _ in range(WARM_STEPS):
            self._engine.step()
        self._taken = WARM_STEPS
        return {}

    def decode(self, batch: int, steps: int, seconds: float) -> dict[str, Any]:
        """Time steps of the open sequences, at most `steps` or for about so many seconds.

        Returns:
            `grown`, beside the times: by how many tokens the sequences were longer than the prompt, on average.
        """
        times: list[float] = []
        inner: list[float | None] = []
        begun = time.perf_counter()
        while len(times) < steps and (len(times) < LEAST_STEPS or time.perf_counter() - begun < seconds):
            started = time.perf_counter()
            inner.append(self._engine.step())
            times.append(time.perf_counter() - started)
        grown = self._taken + len(times) / 2
        self._taken += len(times)
        model = [value for value in inner if value is not None]
        return {
            "rate": batch * len(times) / sum(times),
            "step_seconds": sum(times) / len(times),
            "model_seconds": sum(model) / len(model) if model else None,
            "steps": len(times),
            "grown": grown,
        }

    def close(self) -> dict[str, Any]:
        self._engine.stop()
        return {}

    def prefill(self, tokens: int, seed: int, vocab: int) -> dict[str, Any]:
        prompt = np.random.default_rng(seed).integers(2, vocab, tokens)
        started = time.perf_counter()
        self._engine.prefill(prompt)
        seconds = time.perf_counter() - started
        return {"rate": tokens / seconds, "step_seconds": seconds, "model_seconds": None, "steps": 1, "grown": 0}

    def logits(self, tokens: list[int], file: str) -> dict[str, Any]:
        np.save(file, self._engine.logits(np.array(tokens)).astype(np.float32))
        return {}


class WorkerError(Exception):
    """A worker ended, or could not do what it was asked."""


class Worker:
    """The harness's end: starts a worker and waits until its engine is loaded.

    Args:
        name: what to call it.
        command: how to start it.
        threads: processor threads it may use.
        log: file that takes what the engine prints.

    Raises:
        WorkerError: it could not be loaded.
    """

    def __init__(self, name: str, command: list[str], *, threads: int, log: Path) -> None:
        self.name, self._log = name, log
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "BENCH_THREADS": str(threads)}
        environment.pop("OMP_WAIT_POLICY", None)  # each engine's own choice
        with log.open("a") as file:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, env=environment
            )
        self.details = self._answer()

    def ask(self, do: str, **options: Any) -> dict[str, Any]:
        """Have it do something, and wait for the answer.

        Raises:
            WorkerError: it could not.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **options}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise WorkerError(f"{self.name} ended; see {self._log}") from error
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            lines = self._log.read_text().strip().splitlines() if self._log.exists() else []
            raise WorkerError(f"{self.name} ended with {self._process.wait()}: {lines[-1] if lines else 'no message'}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise WorkerError(f"{self.name}: {found['error']}")
        return found
