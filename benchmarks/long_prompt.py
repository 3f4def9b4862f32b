"""What running requests feel of a long prompt: their inter-token latencies while it is computed.

    python benchmarks/long_prompt.py ARTIFACT --running 8 --prompt 4000 --decode-stretch 3

Requests stream from an `AsyncEngine`; once each has some tokens, a long prompt arrives. Latencies are between two outputs that a
reader gets; those from the arrival to the long prompt's first token count.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from pathlib import Path

import click

from optc import AsyncEngine

SETTLED = 20  # tokens of each running request before the long prompt arrives


@click.command(help=__doc__.split("\n")[0])
@click.argument("artifact", type=click.Path(path_type=Path, exists=True))
@click.option("--running", default=8, show_default=True, help="Requests that run already.")
@click.option("--prompt", default=4000, show_default=True, help="Tokens of the long prompt.")
@click.option("--tokens", default=500, show_default=True, help="Of each running request.")
@click.option("--decode-stretch", default=3.0, show_default=True, help="0 is no limit.")
def main(artifact: Path, running: int, prompt: int, tokens: int, decode_stretch: float) -> None:
    """Measure and print."""
    asyncio.run(measure(artifact, running, prompt, tokens, decode_stretch or None))


async def measure(artifact: Path, running: int, prompt: int, tokens: int, stretch: float | None) -> None:
    numbers = random.Random(0)
    async with AsyncEngine(artifact, decode_stretch=stretch) as engine:
        vocab = engine.llm.manifest.model.vocab_size

        async def stream(length: int, count: int, times: list[float]) -> None:
            ids = [numbers.randrange(vocab) for _ in range(length)]
            async for _ in engine.generate(ids, max_tokens=count, ignore_eos=True):
                times.append(time.perf_counter())

        await asyncio.gather(*(stream(64, 20, []) for _ in range(running)))  # learns what steps cost
        times: list[list[float]] = [[] for _ in range(running)]
        tasks = [asyncio.create_task(stream(128, tokens, each)) for each in times]
        while not all(len(each) > SETTLED for each in times):
            await asyncio.sleep(0.01)
        arrived, first = time.perf_counter(), list[float]()
        long = asyncio.create_task(stream(prompt, 2, first))
        await asyncio.gather(*tasks, long)
    pairs = [pair for each in times for pair in itertools.pairwise(each)]
    report("before", [after - before for before, after in pairs if after < arrived])
    report("meanwhile", [after - before for before, after in pairs if arrived <= after <= first[0]])
    click.echo(f"time to first token of the long prompt: {first[0] - arrived:.1f} s")


def report(name: str, gaps: list[float]) -> None:
    ordered = sorted(gap * 1e3 for gap in gaps)
    median, p99 = statistics.median(ordered), ordered[int(0.99 * (len(ordered) - 1))]
    click.echo(f"{name}: {len(ordered)} latencies, median {median:.1f} ms, p99 {p99:.1f} ms, {p99 / median:.2f}x")


if __name__ == "__main__":
    main()
