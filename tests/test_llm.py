"""`LLM`: what a Python program gets."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optc.errors import OptcError, RequestError
from optc.runtime import LLM

from .engine_cases import VOCAB, check_empty


@pytest.fixture(scope="session")
def llm(artifact: Path) -> LLM:
    return LLM(artifact)


def test_llm_results(llm: LLM, alone: Callable[..., list[int]]) -> None:
    texts = ["Hello", "Grüße 🎉", "def f(x):"]
    results = llm.generate(texts, max_tokens=12, ignore_eos=True, logprobs=0)
    for text, result in zip(texts, results, strict=True):
        assert llm.tokenizer is not None
        assert result.prompt_token_ids == llm.tokenizer.encode(text)
        assert result.token_ids == alone(result.prompt_token_ids, 12)
        assert result.text == "".join(llm.stream(text, max_tokens=12, ignore_eos=True))
        assert result.logprobs is not None
        assert [set(entry) for entry in result.logprobs] == [{token} for token in result.token_ids]
    assert llm.generate([[5, 6], [7]], max_tokens=3)[1].token_ids == alone([7], 3)
    assert llm.generate([5, 6], max_tokens=3)[0].token_ids == alone([5, 6], 3)


def test_llm_scores_are_the_logprobs_of_generation(llm: LLM) -> None:
    (result,) = llm.generate([[5, 6, 7]], max_tokens=10, ignore_eos=True, logprobs=0)
    assert result.logprobs is not None
    generated = [entry[token] for entry, token in zip(result.logprobs, result.token_ids, strict=True)]
    assert llm.score([5, 6, 7, *result.token_ids])[0][2:] == pytest.approx(generated, abs=1e-4)


def test_chat(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    assert llm.tokenizer is not None
    text = "<s><user>Hi</s>\n<assistant>"
    assert llm.chat_prompt(messages) == llm.tokenizer.encode(text, add_special_tokens=False)
    (one,) = llm.chat(messages, max_tokens=4)
    assert [r.token_ids for r in llm.chat([messages, messages], max_tokens=4)] == [one.token_ids] * 2


def test_seeds_of_one_call_differ_and_repeat(llm: LLM) -> None:
    def generate() -> list[list[int]]:
        results = llm.generate([[5, 6]] * 3, temperature=2.0, seed=1, max_tokens=8, ignore_eos=True)
        return [r.token_ids for r in results]

    first = generate()
    assert first == generate()
    assert len({tuple(tokens) for tokens in first}) == 3


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda llm: llm.generate(""), "empty prompt"),
        (lambda llm: llm.generate([]), "no prompts"),
        (lambda llm: llm.generate([[]]), "empty prompt"),
        (lambda llm: llm.generate(None), "prompts"),
        (lambda llm: llm.generate(5), "prompts"),
        (lambda llm: llm.generate([1.5]), "prompt"),
        (lambda llm: llm.generate([None]), "prompt"),
        (lambda llm: llm.generate([[5], [VOCAB]]), "320"),
        (lambda llm: llm.generate("x" * 1000), "context length"),
        (lambda llm: llm.generate("a\ud800"), "surrogate"),
        (lambda llm: llm.generate("a", max_token=3), "max_token"),
        (lambda llm: llm.generate("a", temperature=-1), "temperature"),
        (lambda llm: llm.stream(""), "empty prompt"),
        (lambda llm: llm.stream([VOCAB]), "320"),
        (lambda llm: llm.chat([]), "messages"),
        (lambda llm: llm.chat({"role": "user", "content": "x"}), "messages"),
        (lambda llm: llm.chat("hello"), "messages"),
        (lambda llm: llm.chat([[]]), "messages"),
        (lambda llm: llm.chat([{"role": "robot", "content": "x"}]), "unknown role"),
        (lambda llm: llm.score([1]), "2 to 256"),
        (lambda llm: llm.score([1] * 300), "2 to 256"),
        (lambda llm: llm.score([1, VOCAB]), "320"),
        (lambda llm: llm.score([1, -1]), "-1"),
    ],
)
def test_wrong_calls(call: Callable[[LLM], object], said: str, llm: LLM) -> None:
    with pytest.raises(OptcError, match=said):
        call(llm)
    assert not llm.engine.has_work()


def test_a_stream_that_is_dropped_frees_its_blocks(llm: LLM) -> None:
    pieces = llm.stream("Hello", max_tokens=100, ignore_eos=True)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    check_empty(llm.engine)


def test_an_interrupted_call_frees_its_blocks(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = llm.engine.executor.run, []

    def interrupted(inputs: Any) -> Any:
        calls.append(inputs)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(inputs)

    monkeypatch.setattr(llm.engine.executor, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["Hello", "you"], max_tokens=50, ignore_eos=True)
    check_empty(llm.engine)
    assert len(llm.generate("Hello", max_tokens=5, ignore_eos=True)[0].token_ids) == 5


def test_streams_and_generate_may_take_turns(artifact: Path) -> None:
    llm = LLM(artifact)
    texts = ["The quick brown", "Où est la"]
    expected = [result.text for result in llm.generate(texts, max_tokens=24)]
    streams = [llm.stream(text, max_tokens=24) for text in texts]
    pieces: list[list[str]] = [[next(stream)] for stream in streams]
    llm.generate("another one", max_tokens=10)
    for parts, rest in itertools.zip_longest(*streams):
        pieces[0].append(parts or "")
        pieces[1].append(rest or "")
    assert ["".join(parts) for parts in pieces] == expected
    check_empty(llm.engine)


def test_a_stream_that_is_never_read_leaves_nothing(artifact: Path) -> None:
    llm = LLM(artifact)
    llm.stream("The quick", max_tokens=4)
    assert not llm.engine.has_work()
    with pytest.raises(RequestError):
        llm.stream("word " * 400)


def test_threads_share_an_engine(artifact: Path) -> None:
    llm = LLM(artifact)
    prompts = [[5, 6, 7 + i] for i in range(6)]
    expected = [llm.generate([prompt], max_tokens=12)[0].token_ids for prompt in prompts]
    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(lambda prompt: llm.generate([prompt], max_tokens=12)[0].token_ids, prompts))
    assert found == expected


@pytest.mark.parametrize("prompt", [b"abc", [np.int64(5), 6], 7])
def test_odd_prompts(prompt: Any, artifact: Path) -> None:
    llm = LLM(artifact)
    if isinstance(prompt, list):
        assert llm.generate(prompt, max_tokens=2) == llm.generate([5, 6], max_tokens=2)
    else:
        with pytest.raises(RequestError):
            llm.generate(prompt, max_tokens=2)
