"""What restricts a request's tokens: each against its definition, written out token by token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optc.errors import ExecutionError, RequestError
from optc.runtime import SamplingParams
from optc.runtime.engine import Engine
from optc.runtime.logits import Constraints, TokenCounts
from optc.runtime.request import Request
from optc.runtime.sampler import sample

from .engine_cases import VOCAB, check_empty, greedy, run

SIZE = 12


def request(prompt: list[int], completion: list[int], *, ends: frozenset[int] = frozenset(), **options: Any) -> Request:
    params = SamplingParams(**options)
    made = Request(0, prompt, params, 0, [*prompt, *completion], end_ids=ends)
    made.constraints = Constraints(
        params, prompt, end_ids=ends, bad_words=options.pop("words", ()), matcher=None, vocab_size=SIZE
    )
    for token in completion:
        made.constraints.observe(token)
    return made


def reference(logits: list[float], made: Request) -> list[float]:
    """The definitions, one token at a time."""
    params, prompt, completion = made.params, made.prompt_token_ids, made.output_token_ids
    found = []
    for token, given_value in enumerate(logits):
        value = given_value + (params.logit_bias or {}).get(token, 0.0)
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            value = -math.inf
        if token in made.end_ids and len(completion) < params.min_tokens:
            value = -math.inf
        if token in prompt or token in completion:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        count = completion.count(token)
        value -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
        found.append(value)
    return found


TOKENS = st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=8)


@given(
    logits=st.lists(st.floats(-5, 5, width=32), min_size=SIZE, max_size=SIZE),
    prompt=TOKENS,
    completion=st.lists(st.integers(0, SIZE - 1), max_size=90),
    repetition=st.sampled_from([1.0, 1.3, 0.7]),
    presence=st.sampled_from([0.0, 0.5, -1.0]),
    frequency=st.sampled_from([0.0, 0.25, -0.5]),
    allowed=st.one_of(st.none(), st.sets(st.integers(0, SIZE - 1), min_size=2)),
    bias=st.dictionaries(st.integers(0, SIZE - 1), st.floats(-10, 10, width=32), max_size=3),
    least=st.integers(0, 10),
)
def test_masks_biases_and_penalties(
    logits: list[float],
    prompt: list[int],
    completion: list[int],
    repetition: float,
    presence: float,
    frequency: float,
    allowed: set[int] | None,
    bias: dict[int, float],
    least: int,
) -> None:
    made = request(
        prompt,
        completion,
        ends=frozenset({0}),
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        allowed_token_ids=None if allowed is None else sorted(allowed),
        logit_bias=bias,
        min_tokens=least,
    )
    plain = Request(1, [1], SamplingParams(), 0, [1])
    table = torch.tensor([logits, logits], dtype=torch.float32)
    before = table[1].clone()
    sample(table, [made, plain])
    assert table[0].tolist() == pytest.approx(reference(logits, made), rel=1e-5, abs=1e-5)
    assert torch.equal(table[1], before), "others are left alone"


@given(prompt=TOKENS, completion=st.lists(st.integers(0, 500), max_size=300))
def test_token_counts(prompt: list[int], completion: list[int]) -> None:
    counts = TokenCounts(prompt)
    for token in completion:
        counts.add(token)
    found = dict(zip(counts.tokens.tolist(), counts.counts.tolist(), strict=True))
    assert found == {token: completion.count(token) for token in {*prompt, *completion}}


def test_bad_words_end_only_behind_their_beginning() -> None:
    def banned(completion: list[int]) -> set[int]:
        constraints = Constraints(
            SamplingParams(bad_words=["x"]), [7], end_ids=frozenset(), bad_words=[[3], [4, 5], [4, 6, 8]],
            matcher=None, vocab_size=SIZE,
        )  # fmt: skip
        row = np.zeros(SIZE, np.float32)
        constraints.mask(row, [4, *completion], len(completion))
        return set(np.flatnonzero(np.isinf(row)).tolist())

    assert banned([]) == {3}
    assert banned([4]) == {3, 5}
    assert banned([4, 6]) == {3, 8}
    assert banned([6, 4]) == {3, 5}
    assert banned([4, 1]) == {3}


def test_nothing_allowed_is_an_error_of_that_request_alone() -> None:
    made = request([1], [], ends=frozenset({5}), allowed_token_ids=[5], min_tokens=2)
    other = Request(1, [1], SamplingParams(), 0, [1])
    failed, token = sample(torch.randn(2, SIZE), [made, other])
    assert isinstance(failed, RequestError) and "no token is left" in str(failed)
    assert isinstance(token, int)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}, {"logprobs": 2}], ids=str
)
def test_logits_that_are_no_numbers_fail_their_request(value: float, options: dict[str, Any]) -> None:
    logits = torch.randn(3, SIZE)
    logits[1, 4] = value
    requests = [Request(number, [1], SamplingParams(**options), number, [1]) for number in range(3)]
    first, failed, last = sample(logits, requests)
    assert isinstance(first, int) and isinstance(last, int)
    assert isinstance(failed, ExecutionError) and "not finite" in str(failed)
    assert [len(r.logprobs) for r in requests] == ([1, 0, 1] if "logprobs" in options else [0, 0, 0])


def test_an_engine_keeps_them(make: Callable[..., Engine], alone: Callable[..., list[int]]) -> None:
    free = alone([9, 8, 7], 20)
    banned, engine = free[3], make()
    cases = [
        (greedy(12, logit_bias={banned: -100}), lambda ids: banned not in ids),
        (greedy(12, allowed_token_ids=[3, 4, 5]), lambda ids: set(ids) <= {3, 4, 5}),
        (greedy(12, logit_bias={11: 100}), lambda ids: ids == [11] * 12),
        (greedy(12, frequency_penalty=2, presence_penalty=2), lambda ids: len(set(ids)) > 8),
        (SamplingParams(max_tokens=12, logit_bias={1: 100}), lambda ids: ids == [1]),
        (
            SamplingParams(max_tokens=12, logit_bias={1: 100}, min_tokens=5),
            lambda ids: len(ids) == 6 and 1 not in ids[:5],
        ),
        (SamplingParams(max_tokens=12, logit_bias={11: 100}, stop_token_ids=[11]), lambda ids: ids == [11]),
    ]
    requests = run(engine, [([9, 8, 7], params) for params, _ in cases])
    for made, (params, right) in zip(requests, cases, strict=True):
        assert right(made.output_token_ids), params
    assert run(engine, [([9, 8, 7], greedy(20))])[0].output_token_ids == free


def test_bad_words_do_not_come(make: Callable[..., Engine]) -> None:
    engine = make()
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    (plain,) = run(engine, [([9, 8, 7], greedy(30))])
    texts = [tokenizer.decode([token]).strip() for token in plain.output_token_ids]
    word = next(text for text in texts if text.isascii() and text)
    (kept,) = run(engine, [([9, 8, 7], greedy(30, bad_words=[word]))])
    sequences = [tokenizer.encode(form, add_special_tokens=False) for form in (word, f" {word}")]
    ids = kept.output_token_ids
    for words in sequences:
        assert all(ids[at : at + len(words)] != words for at in range(len(ids)))


@pytest.mark.parametrize(
    "options",
    [
        {"logit_bias": {VOCAB: 1.0}},
        {"allowed_token_ids": [VOCAB]},
        {"stop_token_ids": [VOCAB]},
    ],
    ids=str,
)
def test_ids_that_the_model_does_not_have(options: dict[str, Any], make: Callable[..., Engine]) -> None:
    engine = make()
    (name,) = options
    with pytest.raises(RequestError, match=f"{name}.*320"):
        engine.add([5], SamplingParams(**options))
    check_empty(engine)
