"""Log-probabilities of prompts: reported once, whatever happens to the request on its way."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from optc.errors import ExecutionError
from optc.runtime import SamplingParams
from optc.runtime.engine import Engine
from optc.runtime.request import Request

from .engine_cases import check_empty, drain, greedy, run

PROMPT = [random.Random(5).randrange(3, 320) for _ in range(70)]


def values(request: Request) -> list[float]:
    pairs = zip(request.prompt_logprobs, request.prompt_token_ids[1:], strict=True)
    return [entry[token] for entry, token in pairs]


@pytest.fixture
def expected(make: Callable[..., Engine]) -> Any:
    (request,) = run(make(), [(PROMPT, greedy(3, prompt_logprobs=0))])
    return pytest.approx(values(request), abs=1e-5)  # the portable program's sums depend on the chunk


@pytest.mark.parametrize("at", [1, 3, 6])
@pytest.mark.parametrize("n", [1, 2])
def test_preemption(at: int, n: int, make: Callable[..., Engine], expected: Any) -> None:
    """In the prompt and behind it: what was reported is not computed again for that, and is found in the prefix cache."""
    engine = make(budget=16)
    first, *others = engine.add(PROMPT, greedy(8, prompt_logprobs=0, n=n)).group
    for _ in range(at):
        engine.step()
    reported, computed = len(first.prompt_logprobs), first.num_computed
    assert reported == min(16 * at, 69)
    for victim in [first, *others] if len(engine.scheduler.running) == n else [first]:
        engine.scheduler._preempt(victim)
    engine.step()
    assert first.num_computed >= computed // 16 * 16, "found again"
    drain(engine, [first, *others])
    assert values(first) == expected
    for other in others:
        assert values(other) == expected and other.output_token_ids == first.output_token_ids
    assert first.num_preemptions == 1


def test_the_first_completion_is_dropped(make: Callable[..., Engine], expected: Any) -> None:
    """Another one takes over the rest of the prompt, and what was reported."""
    engine = make(budget=16)
    before = engine.counters.prompt_tokens
    first, second, third = engine.add(PROMPT, greedy(8, prompt_logprobs=0, n=3)).group
    engine.step()
    engine.step()
    engine.abort([first])
    drain(engine, [second, third])
    assert values(second) == expected and values(third) == expected
    assert second.admitted == first.admitted and engine.counters.prompt_tokens - before == len(PROMPT)
    check_empty(engine)


def test_many_at_once_keep_to_the_rows_of_a_step(
    make: Callable[..., Engine], expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(budget=100)
    monkeypatch.setattr(engine.scheduler, "max_logits_rows", 20)
    real, rows = engine.executor.run, []

    def run_counted(inputs: Any) -> Any:
        rows.append(len(inputs.logits_indices))
        return real(inputs)

    monkeypatch.setattr(engine.executor, "run", run_counted)
    scored = SamplingParams(max_tokens=0, prompt_logprobs=0)
    requests = run(engine, [(PROMPT, scored), (PROMPT, scored), ([5] * 30, greedy(40)), (PROMPT, scored)])
    assert all(values(requests[number]) == expected for number in (0, 1, 3))
    assert max(rows) <= 21


@pytest.mark.parametrize("n", [1, 2])
def test_values_that_are_no_numbers_end_the_request(
    n: int, make: Callable[..., Engine], alone: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    real = engine.executor.run

    def poisoned(inputs: Any) -> Any:
        logits = real(inputs).clone()
        logits[3] = np.nan  # of the first request's prompt
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(engine.executor, "run", poisoned)
        group = engine.add([5] * 9, greedy(6, prompt_logprobs=0, n=n)).group
        other = engine.add([8] * 20, greedy(6))
        ended = engine.step()
    assert [request for request in ended if request.finish_reason] == group
    assert all(isinstance(member.error, ExecutionError) and not member.output_token_ids for member in group)
    drain(engine, [other])
    assert other.output_token_ids == alone([8] * 20, 6)
