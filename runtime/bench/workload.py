"""What a benchmark asks of an engine: made up, or read from a file; the same for the same seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import UsageError


@dataclass(frozen=True)
class Task:
    """A prompt and how many tokens to generate for it."""

    prompt: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Lengths:
    """A range of token counts, drawn from uniformly. Written `128` or `16-200`."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Read it.

        Raises:
            UsageError: not a range of positive numbers.
        """
        first, _, last = text.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or not 1 <= int(first) <= int(last or first):
            raise UsageError(f"length {text!r}: expected a number or a range such as 16-200")
        return cls(int(first), int(last or first))

    def draw(self, numbers: random.Random) -> int:
        return numbers.randint(self.least, self.most)


def synthetic(count: int, inputs: Lengths, outputs: Lengths, *, vocab_size: int, seed: int) -> list[Task]:
    """Prompts of random tokens, which share nothing."""
    numbers = random.Random(seed)
    return [
        Task(_random_tokens(inputs.draw(numbers), vocab_size, numbers), outputs.draw(numbers)) for _ in range(count)
    ]


def prefix_repetition(
    count: int,
    inputs: Lengths,
    outputs: Lengths,
    *,
    prefixes: int,
    prefix_length: int,
    vocab_size: int,
    seed: int,
) -> list[Task]:
    """Prompts that begin with one of a few prefixes, as few-shot and chat prompts do; `inputs` is what follows it."""
    numbers = random.Random(seed)
    shared = [_random_tokens(prefix_length, vocab_size, numbers) for _ in range(prefixes)]
    tasks = []
    for number in range(count):
        own = _random_tokens(inputs.draw(numbers), vocab_size, numbers)
        tasks.append(Task(shared[number % prefixes] + own, outputs.draw(numbers)))
    return tasks


def from_file(path: Path, count: int, outputs: Lengths, *, encode: Callable[[str], list[int]], seed: int) -> list[Task]:
    """Prompts of a file, over and over until there are enough.

    Of a `.jsonl` file each line is an object with `prompt`, a text or token ids, and perhaps `max_tokens`; of any other
    file each line that is not empty is a prompt.

    Raises:
        UsageError: the file cannot be read so; says which line.
    """
    numbers = random.Random(seed)
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text") from error
    if not lines:
        raise UsageError(f"{path}: holds no prompts")
    read = _read_json if path.suffix == ".jsonl" else lambda line: (line, None)
    known: list[tuple[list[int], int | None]] = []
    for number, line in enumerate(lines[:count]):
        try:
            prompt, max_tokens = read(line)
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f'{path}: line {number + 1}: expected {{"prompt": ..., "max_tokens": ...}}: {error}'
            ) from error
        known.append((encode(prompt) if isinstance(prompt, str) else list(prompt), max_tokens))
    return [
        Task(prompt, max_tokens or outputs.draw(numbers))
        for prompt, max_tokens in (known[number % len(known)] for number in range(count))
    ]


def _read_json(line: str) -> tuple[str | Sequence[int], int | None]:
    record = json.loads(line)
    prompt, max_tokens = record["prompt"], record.get("max_tokens")
    if not isinstance(prompt, str | list) or not prompt:
        raise ValueError("prompt is neither a text nor a list of token ids")
    if max_tokens is not None and (not isinstance(max_tokens, int) or max_tokens < 1):
        raise ValueError(f"max_tokens {max_tokens!r}")
    return prompt, max_tokens


def _random_tokens(count: int, vocab_size: int, numbers: random.Random) -> list[int]:
    return [numbers.randrange(vocab_size) for _ in range(count)]


def arrival_times(count: int, *, rate: float | None, burstiness: float, seed: int) -> list[float]:
    """Seconds at which requests arrive: gaps from a gamma distribution of mean 1 / rate.

    `burstiness` is its shape: 1 is a Poisson process, less comes in bursts, more is steadier. Without a rate all come at
    once.
    """
    if rate is None:
        return [0.0] * count
    numbers, now, times = random.Random(seed), 0.0, []
    for _ in range(count):
        times.append(now)
        now += numbers.gammavariate(burstiness, 1 / (rate * burstiness))
    return times
