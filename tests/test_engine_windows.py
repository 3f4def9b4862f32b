"""A model whose layers all have a sliding window: blocks behind it are given back, and nobody sees the difference."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig

import optc
from optc.errors import RequestError
from optc.runtime.artifact import open_artifact
from optc.runtime.engine import Engine
from optc.runtime.engine_config import EngineConfig

from .engine_cases import drain, greedy, run

WINDOW, BLOCK = 24, 8


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistral")
    config = MistralConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        sliding_window=WINDOW,
        initializer_range=0.15,
        eos_token_id=1,
    )
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")
    return optc.compile(folder / "model", folder / "model.optc", block_size=BLOCK)


@pytest.fixture(scope="module", params=[False, True], ids=["portable", "native"])
def make_windowed(request: pytest.FixtureRequest, windowed: Path) -> Callable[..., Engine]:
    opened = open_artifact(windowed)
    per_block = opened.manifest.memory.kv_bytes_per_token * BLOCK

    def make(blocks: int, budget: int = 512) -> Engine:
        config = EngineConfig(kv_cache_memory=blocks * per_block, max_num_batched_tokens=budget)
        return Engine(opened, config, native=request.param)

    return make


def test_tokens_are_transformers(windowed: Path, make_windowed: Callable[..., Engine]) -> None:
    prompt = [random.Random(0).randrange(3, 320) for _ in range(70)]
    model = AutoModelForCausalLM.from_pretrained(windowed.parent / "model", dtype=torch.float32)
    with torch.no_grad():
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False, eos_token_id=None)
    engine = make_windowed(9, 16)
    assert engine.kv.window == WINDOW
    (request,) = run(engine, [(prompt, greedy(60))])
    assert request.output_token_ids == expected[0, 70:].tolist()


def test_a_sequence_holds_what_its_window_needs(make_windowed: Callable[..., Engine]) -> None:
    engine = make_windowed(9, 16)
    request = engine.add([7] * 100, greedy(100))
    most = 0
    while request.finish_reason is None:
        engine.step()
        most = max(most, engine.pool.num_blocks - engine.pool.num_free)
    assert most <= engine.kv.most_blocks(200, 16) <= 9 < engine.pool.blocks_for(200)
    with pytest.raises(RequestError, match="KV cache"):
        make_windowed(3, 16).add([7] * 100, greedy(100))


def test_many_in_little_memory(make_windowed: Callable[..., Engine]) -> None:
    """Blocks that were given back serve others at once, and are never read again by those who had them."""
    numbers = random.Random(3)
    prompts = [[numbers.randrange(3, 320) for _ in range(numbers.randint(1, 90))] for _ in range(10)]
    work = [(prompt, greedy(40)) for prompt in prompts]
    alone = [run(make_windowed(200), [item])[0].output_token_ids for item in work[:4]]
    engine = make_windowed(14, 32)
    requests = [engine.add(*item) for item in work]
    drain(engine, list(requests))
    assert [request.output_token_ids for request in requests[:4]] == alone
    roomy = run(make_windowed(200), work)
    assert [r.output_token_ids for r in requests] == [r.output_token_ids for r in roomy]


def test_a_cached_prefix_as_long_as_the_pool(make_windowed: Callable[..., Engine]) -> None:
    engine = make_windowed(9, 16)
    (first,) = run(engine, [([7] * 70, greedy(3))])
    (again,) = run(engine, [([7] * 70 + [9] * 30, greedy(20))])
    (alone,) = run(make_windowed(100, 16), [([7] * 70 + [9] * 30, greedy(20))])
    assert again.output_token_ids == alone.output_token_ids and first.finish_reason == "length"
