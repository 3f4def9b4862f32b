"""`LLM`: what a Python program gets."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optc.errors import ClosedError, OptcError, OverloadedError, RequestError
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
        (lambda llm: llm.generate("a", max_tokens=0), "max_tokens"),
        (lambda llm: llm.generate("a", n=65), "n=65"),
        (lambda llm: llm.generate("a", stop=["a"] * 17), "stop"),
        (lambda llm: llm.generate("a", bad_words=[""]), "bad_words"),
        (lambda llm: llm.generate("a", logit_bias={"x": 1}), "logit_bias"),
        (lambda llm: llm.generate("a", priority=1.5), "priority"),
        (lambda llm: llm.stream("a", n=2), "n=2"),
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


def test_several_completions(llm: LLM) -> None:
    (result,) = llm.generate("The quick", n=3, temperature=1.0, seed=4, max_tokens=10, ignore_eos=True, logprobs=0)
    assert len(result.completions) == 3 and len({tuple(each.token_ids) for each in result.completions}) == 3
    first = result.completions[0]
    assert (result.text, result.token_ids, result.logprobs) == (first.text, first.token_ids, first.logprobs)
    (single,) = llm.generate("The quick", temperature=1.0, seed=4, max_tokens=10, ignore_eos=True)
    assert single.token_ids == first.token_ids, "the first is what a single one would be"
    greedy = llm.generate("The quick", n=2, max_tokens=5)[0].completions
    assert greedy[0] == greedy[1], "without a temperature all are the same"


def test_prompts_with_log_probabilities(llm: LLM) -> None:
    ids = llm.encode("Grüße aus München")
    (result,) = llm.generate([ids], max_tokens=0, prompt_logprobs=3)
    assert result.token_ids == [] and result.finish_reason == "length" and result.prompt_logprobs is not None
    own = [entry[token] for entry, token in zip(result.prompt_logprobs, ids[1:], strict=True)]
    assert own == pytest.approx(llm.score([ids])[0], abs=1e-6)
    for entry in result.prompt_logprobs:
        best = sorted(entry.values(), reverse=True)[:3]
        assert 3 <= len(entry) <= 4 and sum(map(math.exp, best)) <= 1 + 1e-6
    both = llm.score(["Hello there", ids])
    assert [len(each) for each in both] == [len(llm.encode("Hello there")) - 1, len(ids) - 1]


def test_echo(llm: LLM) -> None:
    (plain,) = llm.generate("The quick", max_tokens=8)
    (echoed,) = llm.generate("The quick", max_tokens=8, echo=True)
    assert plain.text is not None and echoed.text == "The quick" + plain.text
    assert echoed.token_ids == plain.token_ids
    assert "".join(llm.stream("The quick", max_tokens=8, echo=True)) == echoed.text


def test_stop_strings(llm: LLM) -> None:
    (free,) = llm.generate("The quick", max_tokens=30, ignore_eos=True)
    assert free.text is not None
    stop = free.text[5:8]
    at = free.text.index(stop)
    (stopped,) = llm.generate("The quick", max_tokens=30, ignore_eos=True, stop=stop)
    assert (stopped.text, stopped.finish_reason) == (free.text[:at], "stop")
    assert free.token_ids[: len(stopped.token_ids)] == stopped.token_ids
    (kept,) = llm.generate("The quick", max_tokens=30, ignore_eos=True, stop=[stop], include_stop=True)
    assert kept.text == free.text[:at] + stop
    assert "".join(llm.stream("The quick", max_tokens=30, ignore_eos=True, stop=stop)) == free.text[:at]
    (longer,) = llm.generate("The quick", max_tokens=30, ignore_eos=True, stop=stop, min_tokens=30)
    assert longer.token_ids == free.token_ids


def test_metrics_of_a_request(llm: LLM) -> None:
    (result,) = llm.generate("The quick", max_tokens=8, ignore_eos=True)
    metrics = result.completions[0].metrics
    assert metrics.queued is not None and metrics.first_token is not None and metrics.finished is not None
    assert 0 <= metrics.queued <= metrics.first_token <= metrics.finished
    llm.generate("The quick brown fox jumps over it", max_tokens=8, ignore_eos=True)
    (again,) = llm.generate("The quick brown fox jumps over it", max_tokens=8, ignore_eos=True)
    assert again.completions[0].metrics.num_cached_tokens == 16, "what is in a full block"


def test_progress_on_a_terminal_only(llm: LLM, capfd: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a", "b"], max_tokens=2)
    assert capfd.readouterr().err == ""
    llm.generate(["a", "b"], max_tokens=2, progress=True)
    assert llm.generate(["a", "b"], max_tokens=2, progress=False)


def test_a_with_block_closes(artifact: Path) -> None:
    with LLM(artifact) as llm:
        assert llm.generate("a", max_tokens=1)[0].token_ids
        assert llm.stats().finished == {"length": 1}
    with pytest.raises(ClosedError, match="closed"):
        llm.generate("a")


def test_a_queue_that_is_too_short_for_all_takes_none(artifact: Path) -> None:
    with LLM(artifact, max_queued_requests=2) as llm:
        with pytest.raises(OverloadedError):
            llm.generate(["a", "b", "c"], max_tokens=2)
        check_empty(llm.engine)
        assert len(llm.generate(["a", "b"], max_tokens=2)) == 2
