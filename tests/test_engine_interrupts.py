"""A step that breaks off anywhere, by an interrupt or a mistake of ours, loses no request and no block."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from linecache import getline
from types import FrameType
from typing import Any

import pytest

from optc.errors import ExecutionError
from optc.runtime.engine import Engine
from optc.runtime.request import Request

from .engine_cases import check_empty, drain, greedy

# Too many for the pool: some are preempted, and several completions part from each other.
WORK = [
    ([5] * 30, {}),
    ([6] * 20, {"n": 3, "logprobs": 1}),
    ([7] * 40, {"stop": ["e"]}),
    ([5] * 30 + [9], {}),
    ([8], {}),
]
FILES = ("engine.py", "scheduler.py", "kv_cache.py", "block_pool.py", "waiting_queue.py", "admission.py")


@contextmanager
def interrupt_at(line: int) -> Iterator[None]:
    """Raise KeyboardInterrupt at the so-and-so-many-th line that runs of the files that keep the engine's books."""
    left = line

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.endswith(FILES):
            return None
        # Not at `with`, which comes again when its block is left, nor at `try`: Python itself looks for no signals there.
        code = getline(frame.f_code.co_filename, frame.f_lineno).lstrip()
        if event == "line" and not code.startswith(("with ", "try:")):
            left -= 1
            if left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def begin(engine: Engine) -> list[Request]:
    return [member for prompt, options in WORK for member in engine.add(prompt, greedy(5, **options)).group]


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_an_interrupt_anywhere(steps: int, make: Callable[..., Engine]) -> None:
    roomy = make()
    expected = begin(roomy)
    drain(roomy, list(expected))
    tokens = [request.output_token_ids for request in expected]
    line, interrupted = 1, True
    while interrupted:
        engine = make(8, 48, 8)
        requests = begin(engine)
        for _ in range(steps):
            engine.step()
        if steps == 4:
            engine.abort(requests[-1:])
        interrupted = False
        try:
            with interrupt_at(line):
                engine.step()
        except KeyboardInterrupt:
            interrupted = True
        phase = engine._phase
        for _ in range(200):
            engine.step()
            if not engine.has_work():
                break
        check_empty(engine)
        for request, wanted in zip(requests, tokens, strict=True):
            assert request.finish_reason is not None, (line, request.request_id)
            if request.finish_reason == "error":
                assert phase == "commit", "only behind the model"
                assert "interrupted" in str(request.error)
            elif request.finish_reason != "abort":
                assert request.output_token_ids == wanted, (line, request.request_id)
            assert request.output_token_ids == wanted[: request.num_output_tokens]
            if request.params.logprobs is not None and request.finish_reason != "error":
                assert len(request.logprobs) == request.num_output_tokens
        line += 1 + line // 30  # near the start each line, later one in some
    assert line > 100


@pytest.mark.parametrize("steps", [0, 2])
def test_a_mistake_while_a_step_is_put_together(
    steps: int, make: Callable[..., Engine], alone: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever was to run may have been the reason; those behind them go on."""
    engine = make(seqs=2)
    requests = [engine.add([token] * 20, greedy(6)) for token in range(5, 10)]
    for _ in range(steps):
        engine.step()

    def fail(*arguments: Any) -> bool:
        engine.pool.take()  # and it is lost
        raise AssertionError("no such block")

    with monkeypatch.context() as patch:
        patch.setattr(engine.kv, "grow", fail)
        ended = engine.step()
    assert ended == requests[: 3 if steps else 2]
    for request in ended:
        assert isinstance(request.error, ExecutionError) and "no such block" in str(request.error)
    drain(engine, requests[len(ended) :])
    for request in requests[len(ended) :]:
        assert request.output_token_ids == alone(request.prompt_token_ids, 6)
