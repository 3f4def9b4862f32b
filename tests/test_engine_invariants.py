"""Anything may happen to an engine, in any order: blocks are accounted for, requests end once, tokens stay the same."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from optc.errors import DeadlineError, ExecutionError, RequestError
from optc.runtime import SamplingParams
from optc.runtime.engine import Engine
from optc.runtime.params import RequestOptions
from optc.runtime.request import Request

from .engine_cases import BLOCK, check, check_empty, run

Completions = list[list[int]]

# Few beginnings, so that prompts overlap within blocks and over them.
PROMPTS = st.builds(
    lambda start, length, end: [*([7, 8, 9, 10, 11] * 10)[start : start + length], *end],
    st.integers(0, 1),
    st.sampled_from([0, 1, 15, 16, 17, 32, 40]),
    st.lists(st.integers(3, 6), min_size=1, max_size=12),
)
PARAMS = st.one_of(
    st.builds(lambda count: SamplingParams(max_tokens=count, ignore_eos=True), st.integers(1, 20)),
    st.builds(
        lambda count, n, seed: SamplingParams(
            max_tokens=count, n=n, seed=seed, temperature=1.5, top_p=0.9, presence_penalty=0.5, ignore_eos=True
        ),
        st.integers(1, 12),
        st.integers(1, 3),
        st.integers(0, 3),
    ),
)


class EngineMachine(RuleBasedStateMachine):
    """Requests come, go, fail and run out of time between and in steps of a small engine."""

    make: Callable[..., Engine]
    expected: Callable[[list[int], SamplingParams], Completions]

    @initialize(
        blocks=st.sampled_from([4, 5, 7, 12, 200]),
        budget=st.sampled_from([1, 3, 17, 512]),
        seqs=st.sampled_from([1, 3, 64]),
        policy=st.sampled_from(["fcfs", "priority", "fair"]),
        prefix_caching=st.booleans(),
        decode_stretch=st.sampled_from([None, 2.0]),
    )
    def start(self, blocks: int, budget: int, seqs: int, **limits: Any) -> None:
        self.engine = type(self).make(blocks, budget, seqs, **limits)
        self.alive: list[Request] = []
        self.ended: list[Request] = []
        self.failing = False

    @rule(
        prompt=PROMPTS,
        params=PARAMS,
        priority=st.integers(0, 2),
        client=st.sampled_from("ab"),
        timeout=st.sampled_from([None, None, None, 1e-6]),
    )
    def add(self, prompt: list[int], params: SamplingParams, priority: int, client: str, timeout: float | None) -> None:
        options = RequestOptions(priority=priority, client=client, timeout=timeout)
        try:
            request = self.engine.add(prompt, params, options)
        except RequestError:
            longest = len(prompt) + params.max_tokens
            assert self.engine.pool.num_blocks * BLOCK < longest or self.engine.config.max_num_seqs < params.n
            return
        self.alive += request.group

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.alive))
        self.engine.abort([request])
        assert request.finish_reason == "abort"
        self.end([request])

    @rule()
    def step(self) -> None:
        time.sleep(2e-6)  # what had a microsecond is late now
        self.end([request for request in self.engine.step() if request.finish_reason])

    @rule()
    def fail(self) -> None:
        """The step program raises once."""
        real = self.engine.executor.run

        def run(inputs: Any) -> Any:
            raise RuntimeError("the device is on fire")

        self.engine.executor.run = run  # type: ignore[method-assign]
        try:
            self.step()
        finally:
            self.engine.executor.run = real  # type: ignore[method-assign]

    def end(self, requests: list[Request]) -> None:
        for request in requests:
            assert request not in self.ended, "a request ends once"
            assert request in self.alive
            self.alive.remove(request)
            self.ended.append(request)
        check(self.engine, self.alive)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        steps = 0
        while self.alive:
            self.step()
            steps += 1
            assert steps < 3000, "no deadlock"
        check_empty(self.engine)
        for request in self.ended:
            self.check_tokens(request)

    def check_tokens(self, request: Request) -> None:
        known = type(self).expected(request.prompt_token_ids, request.params)
        number = request.group.index(request)
        if request.finish_reason == "length":
            assert request.output_token_ids == known[number]
        elif request.finish_reason == "error":
            assert isinstance(request.error, ExecutionError) and "on fire" in str(request.error)
        elif request.finish_reason == "timeout":
            assert isinstance(request.error, DeadlineError) and request.options.timeout
        else:
            assert request.finish_reason == "abort" and request.error is None
        # Whatever ended it, what it gave until then is right.
        assert request.output_token_ids == known[number][: request.num_output_tokens]


@pytest.mark.parametrize("examples", [60, pytest.param(1500, marks=pytest.mark.slow)])
def test_whatever_happens(examples: int, make: Callable[..., Engine]) -> None:
    known: dict[tuple[tuple[int, ...], SamplingParams], Completions] = {}

    def expected(prompt: list[int], params: SamplingParams) -> Completions:
        key = (tuple(prompt), params)
        if key not in known:
            known[key] = [request.output_token_ids for request in run(make(), [(prompt, params)])]
        return known[key]

    class Machine(EngineMachine):
        pass

    Machine.make, Machine.expected = staticmethod(make), staticmethod(expected)  # type: ignore[assignment]
    run_state_machine_as_test(Machine, settings=settings(max_examples=examples, stateful_step_count=30))
