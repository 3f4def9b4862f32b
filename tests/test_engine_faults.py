"""What goes wrong ends the requests that it concerns, with the reason; everybody else gets the tokens they always get."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from optc.errors import ClosedError, DeadlineError, ExecutionError, OverloadedError, RequestError
from optc.runtime import LLM, SamplingParams, StructuredOutput
from optc.runtime.engine import Engine
from optc.runtime.params import RequestOptions
from optc.runtime.request import Request

from .engine_cases import check, check_empty, drain, greedy, run

PROMPTS = [[5, 6, 7], [8] * 20, list(range(30, 50))]


@pytest.mark.parametrize("at", [0, 1, 5])
def test_a_step_that_raises_ends_its_requests_alone(
    at: int, make: Callable[..., Engine], alone: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(seqs=2)
    requests = [engine.add(prompt, greedy(12)) for prompt in PROMPTS]
    for _ in range(at):
        engine.step()
    with monkeypatch.context() as patch:

        def fail(inputs: Any) -> Any:
            raise MemoryError("no memory")

        patch.setattr(engine.executor, "run", fail)
        ended = engine.step()
    assert ended == requests[:2]
    for request in ended:
        assert request.finish_reason == "error" and isinstance(request.error, ExecutionError)
        assert "no memory" in str(request.error)
    check(engine, requests[2:])
    drain(engine, requests[2:])
    assert requests[2].output_token_ids == alone(PROMPTS[2], 12)
    assert run(engine, [(PROMPTS[0], greedy(12))])[0].output_token_ids == alone(PROMPTS[0], 12)


def test_nothing_of_a_failed_step_is_found_later(
    make: Callable[..., Engine], alone: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that wrote half of its keys and raised: its blocks are in no prefix cache."""
    engine = make()
    real = engine.executor.run

    def half(inputs: Any) -> Any:
        real(inputs)
        for cache in engine.executor.caches.values():
            cache.fill_(7.0)
        raise RuntimeError("half way")

    with monkeypatch.context() as patch:
        patch.setattr(engine.executor, "run", half)
        run(engine, [(list(range(100)), greedy(3))])
    (again,) = run(engine, [(list(range(100)), greedy(20))])
    assert again.num_cached == 0 and again.output_token_ids == alone(list(range(100)), 20)


def test_logits_that_are_no_numbers_end_one_request(
    make: Callable[..., Engine], alone: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    requests = [engine.add(prompt, greedy(12)) for prompt in PROMPTS]
    engine.step()
    real = engine.executor.run

    def poisoned(inputs: Any) -> Any:
        logits = real(inputs).clone()
        logits[1] = float("nan")
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(engine.executor, "run", poisoned)
        engine.step()
    assert [request.finish_reason for request in requests] == [None, "error", None]
    assert isinstance(requests[1].error, ExecutionError) and "not finite" in str(requests[1].error)
    assert requests[1].output_token_ids == alone(PROMPTS[1], 1), "what it had is kept"
    check(engine, [requests[0], requests[2]])
    drain(engine, [requests[0], requests[2]])
    for number in (0, 2):
        assert requests[number].output_token_ids == alone(PROMPTS[number], 12)


def test_an_interrupted_step_is_due_again(
    make: Callable[..., Engine], alone: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    request = engine.add(PROMPTS[1], greedy(8))
    for number in range(8):
        with monkeypatch.context() as patch:

            def interrupted(inputs: Any) -> Any:
                raise KeyboardInterrupt

            patch.setattr(engine.executor, "run", interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.step()
        engine.step()
        assert request.num_output_tokens == number + 1
    assert request.output_token_ids == alone(PROMPTS[1], 8)


def test_results_say_what_went_wrong(artifact: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(artifact) as llm:
        real = llm.engine.executor.run

        def poisoned(inputs: Any) -> Any:
            logits = real(inputs).clone()
            if len(inputs.seq_lens) == 2 or streaming:
                logits[0] = float("inf")
            return logits

        streaming = False
        monkeypatch.setattr(llm.engine.executor, "run", poisoned)
        bad, good = llm.generate([[5], [6]], max_tokens=8, ignore_eos=True)
        assert bad.finish_reason == "error" and "not finite" in (bad.error or "") and bad.token_ids == []
        assert good.error is None and len(good.token_ids) == 8
        streaming = True
        with pytest.raises(ExecutionError, match="not finite"):
            list(llm.stream([5], max_tokens=3))
        check_empty(llm.engine)


def test_a_grammar_without_a_way_on(make: Callable[..., Engine]) -> None:
    """The grammar wants a token that the request may not have."""
    engine = make()
    params = SamplingParams(structured=StructuredOutput(regex="[0-9]"), allowed_token_ids=[200])
    (stuck,) = run(engine, [([5], params)])
    assert stuck.finish_reason == "error" and isinstance(stuck.error, RequestError)
    assert "no token is left" in str(stuck.error)


@pytest.mark.parametrize("where", ["waiting", "running"])
def test_deadlines(where: str, make: Callable[..., Engine], alone: Callable[..., list[int]]) -> None:
    engine = make(seqs=1)
    holder = engine.add([9], greedy(20))
    engine.step()
    options = RequestOptions(queue_timeout=1e-4) if where == "waiting" else RequestOptions(timeout=1e-4)
    if where == "running":
        engine.abort([holder])
    late = engine.add([5, 6], greedy(200), options)
    while late.finish_reason is None:
        assert late in engine.step() or late.finish_reason is None
    assert late.finish_reason == "timeout" and isinstance(late.error, DeadlineError) and "0.0001 s" in str(late.error)
    if where == "waiting":
        drain(engine, [holder])
        assert holder.output_token_ids == alone([9], 20)
    check_empty(engine)


def test_a_running_request_does_not_mind_the_queues_deadline(make: Callable[..., Engine]) -> None:
    engine = make()
    request = engine.add([5], greedy(30), RequestOptions(queue_timeout=5.0))
    engine.step()
    request.arrived -= 100
    drain(engine, [request])
    assert request.finish_reason == "length"


def test_queue_limits(make: Callable[..., Engine]) -> None:
    engine = make(seqs=1, max_queued_requests=3, max_queued_tokens=50)
    first = engine.add([5] * 10, greedy(5))
    engine.step()  # it runs, so it is in the queue no longer
    waiting = [engine.add([5] * 10, greedy(5)) for _ in range(3)]
    with pytest.raises(OverloadedError, match="3 requests wait, 1 more would exceed 3"):
        engine.add([5], greedy(5))
    engine.abort(waiting[:1])
    with pytest.raises(OverloadedError, match="20 tokens wait, 40 more would exceed 50"):
        engine.add([5] * 40, greedy(5))
    more = engine.add([5] * 30, greedy(5, n=1))
    drain(engine, [first, *waiting[1:], more])
    alone_in_the_queue = engine.add([5] * 90, greedy(5))  # larger than the limit, but nobody waits
    drain(engine, [alone_in_the_queue])


def test_completions_count_in_the_queue(make: Callable[..., Engine]) -> None:
    engine = make(seqs=4, max_queued_requests=3)
    group = engine.add([5] * 20, greedy(5, n=4)).group  # more than may wait, but nobody does
    engine.abort(group[:1])  # the next one computes the prompt
    check(engine, group[1:])
    with pytest.raises(OverloadedError):
        engine.add([5], greedy(5))
    drain(engine, group[1:])
    with pytest.raises(RequestError, match=r"n=5.*max_num_seqs"):
        engine.add([5], greedy(5, n=5))


def test_a_closed_engine_takes_nothing(artifact: Any) -> None:
    llm = LLM(artifact)
    request = llm.engine.add([5], greedy(5))
    llm.engine.step()
    llm.close()
    assert request.finish_reason == "abort"
    check_empty(llm.engine)
    with pytest.raises(ClosedError):
        llm.engine.add([5], greedy(5))
    llm.close()


def test_a_grammar_that_grows_too_complex_ends_its_request_alone(
    make: Callable[..., Engine], alone: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    victim = engine.add(PROMPTS[0], greedy(8))
    complex_one = engine.add([5], SamplingParams(structured=StructuredOutput(regex="[a-z]+")))
    assert complex_one.constraints is not None and complex_one.constraints.matcher is not None

    def refuse(vocab_size: int) -> Any:
        raise RequestError("structured output: too complex")

    monkeypatch.setattr(complex_one.constraints.matcher, "allowed", refuse)
    drain(engine, [victim, complex_one])
    assert complex_one.finish_reason == "error" and "too complex" in str(complex_one.error)
    assert victim.output_token_ids == alone(PROMPTS[0], 8)


def test_an_interrupt_behind_the_model_ends_the_steps_requests(
    make: Callable[..., Engine], alone: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    requests = [engine.add(prompt, greedy(8)) for prompt in PROMPTS[:2]]
    engine.step()

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_accept", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    assert [request.finish_reason for request in requests] == ["error", "error"]
    check_empty(engine)
    assert run(engine, [(PROMPTS[0], greedy(8))])[0].output_token_ids == alone(PROMPTS[0], 8)


@pytest.mark.parametrize("name", ["cache_salt", "client"])
def test_names_that_are_no_unicode(name: str) -> None:
    with pytest.raises(RequestError, match="Unicode"):
        RequestOptions(**{name: "\ud800"})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the engine's clock forward."""
    real, ahead = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: real() + ahead[0])

    def forward(seconds: float) -> None:
        ahead[0] += seconds

    return forward


def test_deadlines_are_looked_at_when_one_is_due(
    make: Callable[..., Engine], clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(seqs=1)
    looked: list[int] = []
    real = Request.late_for

    def late_for(self: Request, now: float) -> str | None:
        looked.append(self.request_id)
        return real(self, now)

    monkeypatch.setattr(Request, "late_for", late_for)
    patient = engine.add([5], greedy(30), RequestOptions(timeout=1000.0))
    hasty = engine.add([6], greedy(30), RequestOptions(queue_timeout=100.0, timeout=2000.0))
    for _ in range(5):
        engine.step()
    assert looked == []
    clock(101)
    engine.step()
    assert looked == [patient.request_id, hasty.request_id] and hasty.finish_reason == "timeout"
    drain(engine, [patient])
    assert len(looked) == 2 and patient.finish_reason == "length"


@pytest.mark.parametrize("steps", [0, 1, 9])
def test_deadlines_of_several_completions(
    steps: int, make: Callable[..., Engine], clock: Callable[[float], None]
) -> None:
    """They are begun with their prompt, and end with it."""
    engine = make(budget=16)
    options = RequestOptions(queue_timeout=50.0, timeout=100.0)
    group = engine.add([5] * 60, greedy(40, n=3), options).group
    for _ in range(steps):
        engine.step()
    clock(51)
    ended = [request for request in engine.step() if request.finish_reason]
    assert ended == (group if steps == 0 else [])
    clock(50)
    ended += [request for request in engine.step() if request.finish_reason]
    assert ended == group and all(isinstance(request.error, DeadlineError) for request in group)
    check_empty(engine)


def test_one_that_is_dropped_the_moment_it_comes(make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread adds and drops it right behind the look into the inbox."""
    engine = make()
    looks: list[None] = []
    real = engine._take_in

    def take_in() -> None:
        looks.append(None)
        if len(looks) > 1:
            real()

    with engine._lock:
        group = engine.add([5, 6], greedy(5, n=2)).group
        engine.abort(group)
    monkeypatch.setattr(engine, "_take_in", take_in)
    assert engine.step() == group and [request.finish_reason for request in group] == ["abort", "abort"]
    check_empty(engine)


def test_all_that_ended_in_a_step_that_raised_are_told(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    first, second = engine.add([5], greedy(1)), engine.add([6], greedy(8))
    real = engine._accept

    def accept(request: Request, choice: Any) -> None:
        if request is second:
            raise RuntimeError("a mistake")
        real(request, choice)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_accept", accept)
        assert engine.step() == [first, second]
    assert [first.finish_reason, second.finish_reason] == ["length", "error"]
    check_empty(engine)


def test_an_unfinished_character_can_be_what_stops(make: Callable[..., Engine]) -> None:
    """The last token ends no character; what stands for it is a stop text, so the reason is not the length."""
    engine = make()
    assert engine.tokenizer is not None
    byte = engine.tokenizer._tokenizer.token_to_id(
        "\u00e6"
    )  # byte-level BPE's name of the byte 0xE6, which begins three
    (request,) = run(engine, [([5], greedy(1, allowed_token_ids=[byte], stop=["\ufffd"]))])
    assert request.output_token_ids == [byte] and request.finish_reason == "stop"
    (request,) = run(engine, [([5], greedy(1, allowed_token_ids=[byte], stop=["x"]))])
    assert request.finish_reason == "length"


def test_what_is_computed_again_is_not_served_again(make: Callable[..., Engine]) -> None:
    engine = make(policy="fair", prefix_caching=False)
    before = engine.counters.prompt_tokens
    mine, other = (engine.add([token] * 40, greedy(6), RequestOptions(client=str(token))) for token in (5, 6))
    engine.step()
    engine.scheduler._preempt(mine)
    engine.pool.forget_all()
    engine.step()
    assert mine.num_preemptions == 1 and len(set(engine.queue._served.values())) == 1
    drain(engine, [mine, other])
    assert engine.counters.prompt_tokens - before == 80
