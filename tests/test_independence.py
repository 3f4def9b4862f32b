"""Tokens of a request do not depend on what an engine does meanwhile: company, chunks, the prefix cache, preemption."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optc.runtime import SamplingParams
from optc.runtime.artifact import open_artifact
from optc.runtime.engine import Engine
from optc.runtime.engine_config import EngineConfig

from .engine_cases import BLOCK_BYTES, VOCAB, drain, greedy, run

COUNT, LENGTH = 64, 16


def prompts() -> list[list[int]]:
    """64 prompts of 1 to 100 tokens; some share beginnings."""
    numbers = random.Random(4)
    shared = [numbers.randrange(VOCAB) for _ in range(60)]
    found = []
    for number in range(COUNT):
        own = [numbers.randrange(VOCAB) for _ in range(numbers.randint(1, 40))]
        found.append(shared[: numbers.choice([0, 16, 37, 60])] + own if number % 2 else own)
    return found


def params(kind: str) -> list[SamplingParams]:
    if kind == "greedy":
        return [greedy(LENGTH)] * COUNT
    sampled: dict[str, Any] = {"max_tokens": LENGTH, "temperature": 1.3, "ignore_eos": True}
    filters: list[dict[str, Any]] = [{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.1}, {"repetition_penalty": 1.2}]
    return [SamplingParams(seed=number, **sampled, **filters[number % 5]) for number in range(COUNT)]


@pytest.fixture(scope="module", params=["portable", "native"])
def make_engine(request: pytest.FixtureRequest, native_artifact: Path) -> Callable[..., Engine]:
    opened = open_artifact(native_artifact)

    def make(blocks: int = 900, **limits: Any) -> Engine:
        config = EngineConfig(kv_cache_memory=blocks * BLOCK_BYTES, **limits)
        return Engine(opened, config, native=request.param == "native")

    return make


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_alone_and_among_63_others(kind: str, make_engine: Callable[..., Engine]) -> None:
    work = list(zip(prompts(), params(kind), strict=True))
    single = make_engine(prefix_caching=False)
    alone = [run(single, [item])[0].output_token_ids for item in work]

    def together(**limits: Any) -> list[list[int]]:
        return [request.output_token_ids for request in run(make_engine(**limits), work)]

    assert together() == alone
    assert together(prefix_caching=False) == alone
    assert together(max_num_batched_tokens=16) == alone
    assert together(decode_stretch=2.0) == alone
    assert together(blocks=30) == alone, "preempted again and again"
    assert together(blocks=30, max_num_batched_tokens=16, prefix_caching=False) == alone
    again = make_engine()
    for _ in range(2):  # the second time all prompts are in the cache
        assert [request.output_token_ids for request in run(again, work)] == alone
    assert again.stats().prefix_hit_rate > 0.5


def test_forced_preemption_at_random_points(make_engine: Callable[..., Engine]) -> None:
    work = list(zip(prompts(), params("greedy"), strict=True))[:24]
    alone = [request.output_token_ids for request in run(make_engine(), work)]
    numbers = random.Random(0)
    for prefix_caching in (True, False):
        engine = make_engine(prefix_caching=prefix_caching, max_num_batched_tokens=64)
        requests = [engine.add(*item) for item in work]
        while engine.has_work():
            engine.step()
            if engine.scheduler.running and numbers.random() < 0.7:
                engine.scheduler._preempt(numbers.choice(engine.scheduler.running))
        assert engine.stats().preemptions > 10
        assert [request.output_token_ids for request in requests] == alone


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_completions_of_one_prompt_are_those_of_single_requests(
    temperature: float, make_engine: Callable[..., Engine]
) -> None:
    """`n` completions share the prompt's blocks and copy the last before they part; each is what it would be alone."""
    engine = make_engine()
    prompt = list(range(40, 77))
    many = SamplingParams(n=8, max_tokens=20, temperature=temperature, seed=3, ignore_eos=True)
    group = run(engine, [(prompt, many)])
    assert engine.stats().block_copies == 7 and engine.stats().prompt_tokens == len(prompt)
    for member in group:
        single = SamplingParams(max_tokens=20, temperature=temperature, seed=member.seed, ignore_eos=True)
        (alone,) = run(make_engine(prefix_caching=False), [(prompt, single)])
        assert member.output_token_ids == alone.output_token_ids
    assert len({tuple(member.output_token_ids) for member in group}) == (8 if temperature else 1)


def test_a_copied_beginning_of_a_block_is_right(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    first, second = [*range(30), 100, 101], [*range(30), 200, 201, 202]
    run(engine, [(first, greedy(4))])
    (found,) = run(engine, [(second, greedy(12))])
    assert found.num_cached == 30 and engine.stats().block_copies == 1
    (alone,) = run(make_engine(prefix_caching=False), [(second, greedy(12))])
    assert found.output_token_ids == alone.output_token_ids


def test_logprobs_of_prompts_do_not_depend_on_chunks(make_engine: Callable[..., Engine]) -> None:
    work = [(prompt, greedy(3, prompt_logprobs=2, logprobs=1)) for prompt in prompts()[:12]]
    whole = run(make_engine(), work)
    for limits in ({"max_num_batched_tokens": 7}, {"blocks": 14}):
        engine = make_engine(**limits)
        requests = [engine.add(*item) for item in work]
        drain(engine, list(requests))
        for a, b in zip(whole, requests, strict=True):
            assert len(b.prompt_logprobs) == len(b.prompt_token_ids) - 1
            for one, other in zip(a.prompt_logprobs + a.logprobs, b.prompt_logprobs + b.logprobs, strict=True):
                assert one == pytest.approx(other, abs=1e-4)
