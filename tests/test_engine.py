"""The engine: whatever arrives in whatever order, blocks are accounted for and tokens do not depend on company."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optc.errors import ExecutionError, OptcError, RequestError, UsageError
from optc.runtime import LLM, SamplingParams
from optc.runtime import engine as engine_module
from optc.runtime.artifact import open_artifact
from optc.runtime.engine import Engine, EngineConfig
from optc.runtime.request import Request

BLOCK, VOCAB, LIMIT = 16, 320, 256
BLOCK_BYTES = 8192  # 2 layers of 2 heads, keys and values of 16 floats, 16 tokens


@pytest.fixture(scope="session")
def make(artifact: Path) -> Callable[..., Engine]:
    """Makes an engine with that many blocks; one is made for each combination and used again."""
    opened = open_artifact(artifact)
    assert opened.manifest.memory.kv_bytes_per_token * BLOCK == BLOCK_BYTES
    made: dict[tuple[int, int, int], Engine] = {}

    def make(blocks: int = 200, budget: int = 512, seqs: int = 64) -> Engine:
        key = (blocks, budget, seqs)
        if key not in made:
            config = EngineConfig(
                max_num_seqs=seqs, max_num_batched_tokens=budget, kv_cache_memory=blocks * BLOCK_BYTES
            )
            made[key] = Engine(opened, config)
        engine = made[key]
        assert not engine.has_work()
        return engine

    return make


@pytest.fixture(scope="session")
def alone(make: Callable[..., Engine]) -> Callable[..., list[int]]:
    """The greedy tokens of a prompt that has an engine to itself."""
    known: dict[tuple[int, ...], list[int]] = {}

    def alone(prompt: list[int], count: int) -> list[int]:
        key = tuple(prompt)
        if len(known.get(key, [])) < count:
            known[key] = run(make(), [(prompt, greedy(max(count, 24)))])[0].output_token_ids
        return known[key][:count]

    return alone


def greedy(count: int, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=count, ignore_eos=True, **options)


def check(engine: Engine, alive: list[Request]) -> None:
    """Each block is free or belongs to one request; only running requests hold any, and exactly what they need."""
    held = [block for request in alive for block in request.blocks]
    assert sorted([*engine.pool._free, *held]) == list(range(engine.pool.num_blocks))
    assert engine.pool.num_free + len(held) == engine.pool.num_blocks
    running, waiting = engine.scheduler.running, list(engine.scheduler.waiting)
    assert len(running) <= engine.scheduler.max_num_seqs
    assert {id(r) for r in running} | {id(r) for r in waiting} == {id(r) for r in alive}
    assert len(running) + len(waiting) == len(alive)
    for request in running:
        assert len(request.blocks) == engine.pool.blocks_for(request.num_computed)
    for request in waiting:
        assert request.blocks == []
        assert request.num_computed == 0
    order = [r.request_id for r in (*running, *waiting)]
    assert order == sorted(order), "first come, first served"


def drain(engine: Engine, alive: list[Request]) -> list[Request]:
    """Step until nothing is left, checking after each step; the requests in the order they finished."""
    finished: list[Request] = []
    while alive:
        done = [request for request in engine.step() if request.finish_reason]
        finished += done
        alive = [request for request in alive if request not in done]
        check(engine, alive)
    assert not engine.has_work()
    assert engine.pool.num_free == engine.pool.num_blocks
    return finished


def run(engine: Engine, prompts: list[tuple[list[int], SamplingParams]]) -> list[Request]:
    requests = [engine.add(prompt, params) for prompt, params in prompts]
    finished = drain(engine, list(requests))
    assert sorted(r.request_id for r in finished) == [r.request_id for r in requests]
    return requests


PROMPTS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40)


@settings(max_examples=40)
@given(
    arrivals=st.lists(st.tuples(PROMPTS, st.integers(1, 24), st.integers(0, 4)), min_size=1, max_size=8),
    blocks=st.sampled_from([4, 5, 7, 200]),
    budget=st.sampled_from([1, 3, 17, 512]),
    seqs=st.sampled_from([1, 2, 64]),
)
def test_random_arrivals(
    arrivals: list[tuple[list[int], int, int]],
    blocks: int,
    budget: int,
    seqs: int,
    make: Callable[..., Engine],
    alone: Callable[..., list[int]],
) -> None:
    """Requests join between steps of an engine with little memory; everyone gets the tokens they would get alone."""
    engine = make(blocks, budget, seqs)
    pending, alive, finished = list(arrivals), [], []
    requests: list[tuple[Request, list[int], int]] = []
    steps = 0
    while pending or alive:
        while pending and (pending[0][2] == 0 or not alive):
            prompt, count, _ = pending.pop(0)
            request = engine.add(prompt, greedy(count))
            requests.append((request, prompt, count))
            alive.append(request)
        if pending:
            prompt, count, delay = pending[0]
            pending[0] = (prompt, count, delay - 1)
        done = [request for request in engine.step() if request.finish_reason]
        finished += done
        alive = [request for request in alive if request not in done]
        check(engine, alive)
        steps += 1
        assert steps < 10_000
    assert engine.pool.num_free == blocks
    assert sorted(r.request_id for r in finished) == [r.request_id for r, _, _ in requests]
    for request, prompt, count in requests:
        assert request.finish_reason == "length"
        assert request.output_token_ids == alone(prompt, count)


def test_preemption_happens_and_changes_nothing(make: Callable[..., Engine], alone: Callable[..., list[int]]) -> None:
    engine = make(6)
    before = engine.scheduler.num_preemptions
    prompts = [[number] * 15 for number in range(5)]
    requests = run(engine, [(prompt, greedy(60)) for prompt in prompts])
    assert engine.scheduler.num_preemptions > before
    for prompt, request in zip(prompts, requests, strict=True):
        assert request.output_token_ids == alone(prompt, 60)


@pytest.mark.parametrize("budget", [1, 2, 7, 16, 33])
def test_chunked_prompts(budget: int, make: Callable[..., Engine], alone: Callable[..., list[int]]) -> None:
    prompts = [list(range(10, 110)), [7], [5, 6] * 40]
    requests = run(make(200, budget), [(prompt, greedy(8)) for prompt in prompts])
    for prompt, request in zip(prompts, requests, strict=True):
        assert request.output_token_ids == alone(prompt, 8)


def test_native_code_and_portable_program_agree(
    native_artifact: Path, alone: Callable[..., list[int]], make: Callable[..., Engine]
) -> None:
    prompts = [[7], list(range(100)), [5, 6] * 20, [300]]
    config = EngineConfig(max_num_batched_tokens=50, kv_cache_memory=12 * BLOCK_BYTES)
    for native in (True, False):
        engine = Engine(open_artifact(native_artifact), config, native=native)
        assert engine.executor.is_native is native
        requests = run(engine, [(prompt, greedy(20)) for prompt in prompts])
        assert [r.output_token_ids for r in requests] == [alone(prompt, 20) for prompt in prompts]


def test_a_step_of_an_idle_engine_is_nothing(make: Callable[..., Engine]) -> None:
    assert make().step() == []


def test_refusals(make: Callable[..., Engine]) -> None:
    engine = make(4)
    cases: list[tuple[list[Any], int, str]] = [
        ([], 1, "empty prompt"),
        ([0] * LIMIT, 1, "context length is 256"),
        ([0] * 1000, 1, "context length is 256"),
        ([VOCAB], 1, f"320.*0 to {VOCAB - 1}"),
        ([5, -1], 1, "-1"),
        ([True], 1, "True"),
        ([1.0], 1, "1.0"),
        (["a"], 1, "'a'"),
        ([None], 1, "None"),
        ([1] * 60, 5, "65 tokens of KV cache, which holds 64"),
        ([1], 64, "65 tokens of KV cache, which holds 64"),
    ]
    for prompt, count, said in cases:
        with pytest.raises(RequestError, match=said):
            engine.add(prompt, greedy(count))
        assert not engine.has_work()
        check(engine, [])
    assert len(run(engine, [([1] * 60, greedy(4))])[0].output_token_ids) == 4


def test_a_request_refused_for_its_memory_would_fit_with_fewer_tokens(make: Callable[..., Engine]) -> None:
    """What is refused and what runs meet exactly: the largest request that is accepted finishes."""
    engine = make(4)
    for length in (1, 17, 48, 63):
        with pytest.raises(RequestError, match="raise kv_cache_memory or lower max_tokens"):
            engine.add([3] * length, greedy(65 - length))
        (request,) = run(engine, [([3] * length, greedy(64 - length))])
        assert request.finish_reason == "length"


def test_the_context_length_ends_a_request(make: Callable[..., Engine]) -> None:
    for length in (LIMIT - 1, LIMIT - 2, LIMIT - 30):
        (request,) = run(make(), [([9] * length, greedy(10_000))])
        assert request.finish_reason == "length"
        assert len(request.output_token_ids) == LIMIT - length


def test_max_tokens(make: Callable[..., Engine]) -> None:
    requests = run(make(), [([3, 4], greedy(count)) for count in (1, 2, 5)])
    assert [len(r.output_token_ids) for r in requests] == [1, 2, 5]


def test_end_tokens_stop(make: Callable[..., Engine], alone: Callable[..., list[int]]) -> None:
    engine = make()
    expected = alone([9, 8, 7], 20)
    engine._end_ids, before = frozenset({expected[5]}), engine._end_ids
    try:
        stopped, went_on = run(engine, [([9, 8, 7], SamplingParams(max_tokens=20)), ([9, 8, 7], greedy(20))])
    finally:
        engine._end_ids = before
    at = expected.index(expected[5]) + 1
    assert (stopped.output_token_ids, stopped.finish_reason) == (expected[:at], "stop")
    assert (went_on.output_token_ids, went_on.finish_reason) == (expected, "length")


def test_the_checkpoints_end_tokens_are_the_engines(make: Callable[..., Engine]) -> None:
    assert make()._end_ids == {1}


@pytest.mark.parametrize("after", [0, 1, 3])
def test_abort_frees_the_blocks(after: int, make: Callable[..., Engine], alone: Callable[..., list[int]]) -> None:
    engine = make(6, 20)
    requests = [engine.add([number] * 20, greedy(20)) for number in range(4)]
    for _ in range(after):
        engine.step()
    engine.abort(requests[:2])
    check(engine, requests[2:])
    engine.abort(requests[:2])  # once more changes nothing
    check(engine, requests[2:])
    drain(engine, requests[2:])
    assert requests[2].output_token_ids == alone([2] * 20, 20)
    engine.abort(requests)  # all have left
    check(engine, [])
    assert requests[0].finish_reason is None


def test_seeded_sampling_does_not_depend_on_company(make: Callable[..., Engine]) -> None:
    hot = {"temperature": 1.5, "top_k": 50, "top_p": 0.9}
    prompts = [
        ([number, 3, 4], SamplingParams(max_tokens=12, seed=number, ignore_eos=True, **hot)) for number in range(6)
    ]  # type: ignore[arg-type]
    single = [run(make(), [item])[0].output_token_ids for item in prompts]
    batched = [r.output_token_ids for r in run(make(), prompts)]
    squeezed = [r.output_token_ids for r in run(make(4, 7), prompts)]
    assert single == batched == squeezed
    assert len({tuple(tokens) for tokens in single}) == 6


def test_without_a_seed_draws_differ(make: Callable[..., Engine]) -> None:
    requests = run(make(), [([3, 4], greedy(12, temperature=2.0))] * 4)
    assert len({tuple(r.output_token_ids) for r in requests}) == 4


def test_logprobs_survive_preemption(make: Callable[..., Engine]) -> None:
    def logprobs(engine: Engine) -> list[list[dict[int, float]]]:
        return [r.logprobs for r in run(engine, [([n] * 15, greedy(30, logprobs=2)) for n in range(4)])]

    for calm, squeezed in zip(logprobs(make()), logprobs(make(6)), strict=True):
        assert len(calm) == len(squeezed) == 30
        for a, b in zip(calm, squeezed, strict=True):
            assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 0},
        {"max_num_seqs": -1},
        {"max_num_batched_tokens": 0},
        {"kv_cache_memory": 0},
        {"kv_cache_memory": -5},
        {"kv_cache_memory": BLOCK_BYTES - 1},
    ],
    ids=str,
)
def test_limits_that_make_no_sense(options: dict[str, int], artifact: Path) -> None:
    (name,) = options
    with pytest.raises((UsageError, RequestError), match=name):
        LLM(artifact, **options)  # type: ignore[arg-type]


def test_default_memory_holds_all_sequences(artifact: Path) -> None:
    engine = LLM(artifact, max_num_seqs=3).engine
    assert engine.pool.num_blocks == 3 * LIMIT // BLOCK


def test_default_memory_leaves_room_for_the_weights(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = open_artifact(artifact).manifest.memory
    blocks = 8 * memory.kv_bytes_per_token * BLOCK
    monkeypatch.setattr(
        engine_module, "_available_memory", lambda: memory.weight_bytes + int(blocks / engine_module.MEMORY_SHARE)
    )
    assert LLM(artifact).engine.pool.num_blocks == 8


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
    assert llm.score([5, 6, 7, *result.token_ids])[2:] == pytest.approx(generated, abs=1e-4)


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
    check(llm.engine, [])


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
    check(llm.engine, [])
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
    assert not llm.engine.has_work() and llm.engine.pool.num_free == llm.engine.pool.num_blocks


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


def test_a_step_that_fails_is_due_again(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(artifact)
    expected = llm.generate([[5, 6, 7]], max_tokens=6)[0].token_ids
    request = llm.engine.add([5, 6, 7], SamplingParams(max_tokens=6))
    llm.engine.step()
    run = llm.engine.executor.run
    monkeypatch.setattr(llm.engine.executor, "run", lambda inputs: torch.full_like(run(inputs), float("nan")))
    with pytest.raises(ExecutionError, match="not finite"):
        llm.engine.step()
    monkeypatch.undo()
    while request.finish_reason is None:
        llm.engine.step()
    assert request.output_token_ids == expected


@pytest.mark.parametrize("prompt", [b"abc", [np.int64(5), 6], 7])
def test_odd_prompts(prompt: Any, artifact: Path) -> None:
    llm = LLM(artifact)
    if isinstance(prompt, list):
        assert llm.generate(prompt, max_tokens=2) == llm.generate([5, 6], max_tokens=2)
    else:
        with pytest.raises(RequestError):
            llm.generate(prompt, max_tokens=2)


def test_a_step_may_hold_more_tokens_than_a_sequence(native_artifact: Path, artifact: Path) -> None:
    """40 prompts of 12 tokens run in one step of 480; a sequence ends at 256."""
    prompts = [[3 + (7 * i + j) % 300 for j in range(12)] for i in range(40)]
    native, portable = LLM(native_artifact), LLM(artifact)
    assert native.manifest.model.max_model_len < 40 * 12
    found = [result.token_ids for result in native.generate(prompts, max_tokens=4)]
    assert found == [result.token_ids for result in portable.generate(prompts, max_tokens=4)]
