"""The engine: whatever arrives in whatever order, blocks are accounted for and tokens do not depend on company."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optc.errors import RequestError, UsageError
from optc.runtime import LLM, SamplingParams, kv_memory
from optc.runtime.artifact import open_artifact
from optc.runtime.engine import Engine
from optc.runtime.engine_config import EngineConfig
from optc.runtime.request import Request

from .engine_cases import BLOCK, BLOCK_BYTES, LIMIT, VOCAB, check, check_empty, drain, greedy, run

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
    check_empty(engine)
    assert sorted(r.request_id for r in finished) == [r.request_id for r, _, _ in requests]
    for request, prompt, count in requests:
        assert request.finish_reason == "length"
        assert request.output_token_ids == alone(prompt, count)


def test_preemption_happens_and_changes_nothing(make: Callable[..., Engine], alone: Callable[..., list[int]]) -> None:
    engine = make(6)
    before = engine.stats().preemptions
    prompts = [[number] * 15 for number in range(5)]
    requests = run(engine, [(prompt, greedy(60)) for prompt in prompts])
    assert engine.stats().preemptions > before
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


def test_end_tokens_stop(artifact: Path, edit_manifest: Any, editable: Path, alone: Callable[..., list[int]]) -> None:
    expected = alone([9, 8, 7], 20)
    edit_manifest(editable, lambda content: content.update(eos_token_ids=[expected[5]]))
    engine = Engine(open_artifact(editable), EngineConfig(kv_cache_memory=20 * BLOCK_BYTES))
    stopped, went_on = run(engine, [([9, 8, 7], SamplingParams(max_tokens=20)), ([9, 8, 7], greedy(20))])
    at = expected.index(expected[5]) + 1
    assert (stopped.output_token_ids, stopped.finish_reason) == (expected[:at], "stop")
    assert (went_on.output_token_ids, went_on.finish_reason) == (expected, "length")


def test_the_checkpoints_end_tokens_are_the_requests(make: Callable[..., Engine]) -> None:
    engine = make()
    assert engine.add([5], SamplingParams(max_tokens=1)).end_ids == {1}
    assert engine.add([5], SamplingParams(max_tokens=1, stop_token_ids=[7])).end_ids == {1, 7}
    assert engine.add([5], SamplingParams(max_tokens=1, stop_token_ids=[7], ignore_eos=True)).end_ids == {7}
    while engine.has_work():
        engine.step()


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
    assert [request.finish_reason for request in requests] == ["abort", "abort", "length", "length"]


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
        {"max_queued_requests": 0},
        {"max_queued_tokens": 0},
        {"policy": "random"},
        {"decode_stretch": 1.0},
        {"decode_stretch": float("inf")},
        {"kv_cache_memory": 0},
        {"kv_cache_memory": -5},
        {"kv_cache_memory": BLOCK_BYTES - 1},
        {"kv_cache_memory": 10**15},
        {"kv_cache_memory": "8GB"},
        {"max_num_seqs": 2.5},
        {"max_num_batched_tokens": None},
        {"max_queued_tokens": True},
        {"prefix_caching": 1},
        {"decode_stretch": "3"},
    ],
    ids=str,
)
def test_limits_that_make_no_sense(options: dict[str, Any], artifact: Path) -> None:
    (name,) = options
    with pytest.raises((UsageError, RequestError), match=name):
        LLM(artifact, **options)


def test_default_memory_holds_all_sequences(artifact: Path) -> None:
    engine = LLM(artifact, max_num_seqs=3).engine
    assert engine.pool.num_blocks == 3 * LIMIT // BLOCK


def test_default_memory_leaves_room_for_the_weights(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = open_artifact(artifact).manifest.memory
    blocks = 8 * memory.kv_bytes_per_token * BLOCK
    monkeypatch.setattr(
        kv_memory, "available_memory", lambda: memory.weight_bytes + int(blocks / kv_memory.MEMORY_SHARE)
    )
    assert LLM(artifact).engine.pool.num_blocks == 8


def test_a_step_may_hold_more_tokens_than_a_sequence(native_artifact: Path, artifact: Path) -> None:
    """40 prompts of 12 tokens run in one step of 480; a sequence ends at 256."""
    prompts = [[3 + (7 * i + j) % 300 for j in range(12)] for i in range(40)]
    native, portable = LLM(native_artifact), LLM(artifact)
    assert native.manifest.model.max_model_len < 40 * 12
    found = [result.token_ids for result in native.generate(prompts, max_tokens=4)]
    assert found == [result.token_ids for result in portable.generate(prompts, max_tokens=4)]
