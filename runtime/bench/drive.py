"""Running a workload: one batch over and over, all at once, or as it arrives."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any

from ...errors import OptcError, UsageError
from ..async_engine import AsyncEngine
from ..llm import LLM
from ..params import SamplingParams
from ..stats import EngineStats
from .figures import Served, distribution, rates, summarize
from .workload import Task


def latency(llm: LLM, tasks: Sequence[Task], *, rounds: int, warmup: int) -> dict[str, Any]:
    """Time a batch of requests that start together, `rounds` times."""
    engine = llm.engine
    times: list[float] = []
    firsts: list[float] = []
    steps: list[float] = []
    generated = 0
    for number in range(warmup + rounds):
        engine.reset_prefix_cache()
        requests = [engine.add(task.prompt, _params(task)) for task in tasks]
        started = time.perf_counter()
        first: float | None = None
        gaps: list[float] = []
        begun = 0
        before = started
        while any(request.finish_reason is None for request in requests):
            engine.step()
            now = time.perf_counter()
            if first is not None:
                gaps.append(now - before)
            elif all(request.num_output_tokens for request in requests):
                first, begun = now, sum(request.num_output_tokens for request in requests)
            before = now
        if number >= warmup:
            times.append(before - started)
            firsts.append((first or before) - started)
            steps += gaps
            generated += sum(request.num_output_tokens for request in requests) - begun
        for request in requests:
            _check(request.error)
    found = {
        "batch": len(tasks),
        "rounds": rounds,
        "e2e_ms": distribution(times),
        "ttft_ms": distribution(firsts),
    }
    if steps:
        found |= {
            "step_ms": distribution(steps),
            "output_tokens_per_second": generated / sum(steps),
        }
    return found | engine_figures(None, llm.stats())


def throughput(llm: LLM, tasks: Sequence[Task], *, on_request: Callable[[], None]) -> dict[str, Any]:
    """All requests at once, as fast as they go."""
    engine, before = llm.engine, llm.stats()
    wastes: list[float] = []
    started = time.perf_counter()
    requests = [engine.add(task.prompt, _params(task)) for task in tasks]
    for request in requests:
        while request.finish_reason is None:
            engine.step()
            wasted, slots = engine.kv.num_wasted_slots(engine.scheduler.running)
            if slots:
                wastes.append(wasted / slots)
        _check(request.error)
        on_request()
    seconds = time.perf_counter() - started
    prompts = sum(len(request.prompt_token_ids) for request in requests)
    generated = sum(request.num_output_tokens for request in requests)
    return {
        "requests": len(tasks),
        **rates(len(tasks), prompts, generated, seconds),
        "kv_waste": statistics.fmean(wastes) if wastes else 0.0,
        **engine_figures(before, llm.stats()),
    }


async def serve(
    engine: AsyncEngine,
    tasks: Sequence[Task],
    arrivals: Sequence[float],
    *,
    concurrency: int | None,
    slo: dict[str, float],
    on_request: Callable[[], None],
) -> tuple[dict[str, Any], list[Served]]:
    """Send requests as they arrive, at most `concurrency` at a time, and read their streams."""
    before = await asyncio.to_thread(engine.stats)
    places = asyncio.Semaphore(concurrency or len(tasks))
    started = time.perf_counter()

    async def send(task: Task, arrival: float) -> Served:
        await asyncio.sleep(max(0.0, started + arrival - time.perf_counter()))
        async with places:
            served = Served(len(task.prompt), time.perf_counter())
            try:
                async with aclosing(engine.generate(task.prompt, _params(task))) as outputs:
                    async for output in outputs:
                        if output.token_ids:
                            served.arrivals.append((time.perf_counter(), len(output.token_ids)))
                        served.error = output.error
            except OptcError as error:
                served.error = str(error)
            on_request()
            return served

    served = await asyncio.gather(*(send(*pair) for pair in zip(tasks, arrivals, strict=True)))
    figures = summarize(served, time.perf_counter() - started, slo)
    return figures | engine_figures(before, await asyncio.to_thread(engine.stats)), served


def engine_figures(before: EngineStats | None, after: EngineStats) -> dict[str, Any]:
    """What the engine did in between: the share of its steps outside the step program, the prefix cache's hits."""

    def since(name: str) -> float:
        return float(getattr(after, name)) - (float(getattr(before, name)) if before else 0.0)

    step, queried = since("step_seconds"), since("prefix_queried_tokens")
    return {
        "engine_overhead": 1 - since("model_seconds") / step if step else 0.0,
        "prefix_hit_rate": since("prefix_hit_tokens") / queried if queried else 0.0,
        "preemptions": int(since("preemptions")),
        "steps": int(since("steps")),
    }


def check_fit(tasks: Sequence[Task], max_model_len: int) -> None:
    """Refuse a workload that the model cannot take.

    Raises:
        UsageError: a prompt and its completion are longer than the context.
    """
    longest = max(len(task.prompt) + task.max_tokens for task in tasks)
    if longest > max_model_len:
        raise UsageError(f"the longest request has {longest} tokens; the context length is {max_model_len}")


def _params(task: Task) -> SamplingParams:
    return SamplingParams(max_tokens=task.max_tokens, ignore_eos=True)


def _check(error: OptcError | None) -> None:
    if error is not None:
        raise error
