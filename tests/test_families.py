"""Every family computes what transformers computes: the same logits, the same greedy tokens, however it is batched."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import optc
from optc.runtime import LLM, SamplingParams

from .families import FAMILIES, MAX_LEN, MORE_FAMILIES, VOCAB_SIZE, WINDOW, load_reference, save_model

NEW_TOKENS = 32
TOLERANCE = 1e-4
"""Largest difference of a logit; relative to the largest logit of the model where that is above 1."""

# Of different kinds: GQA; soft caps, windows, scaled norms; MoE with sinks, biases and yarn; then learned positions and
# Conv1D; parallel residual, multi-query; latent attention with K dim != V dim; multipliers; MoE with QK-norm.
NATIVE = ["qwen2", "gemma2", "gpt_oss", "gpt2", "falcon", "cohere", "deepseek_v3", "granite", "qwen3_moe", "phi"]
NATIVE_BY_DEFAULT = 6

LENGTHS = (13, 3, 21, 1, 9)


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in LENGTHS]


@dataclass
class Family:
    """A model and what transformers makes of it: for each prompt, the greedy tokens and the logits they were taken from."""

    name: str
    checkpoint: Path
    artifact: Path
    reference: PreTrainedModel
    prompts: list[list[int]]
    tokens: list[list[int]]
    logits: list[Tensor]


def _family(name: str, folder: Path, **options: Any) -> Family:
    checkpoint = save_model(name, folder / name)
    artifact = optc.compile(checkpoint, folder / f"{name}.optc", block_size=16, **options)
    reference, prompts = load_reference(checkpoint), _prompts()
    tokens = [_greedy(reference, prompt) for prompt in prompts]
    logits = [_forward(reference, p + t)[len(p) - 1 : -1] for p, t in zip(prompts, tokens, strict=True)]
    return Family(name, checkpoint, artifact, reference, prompts, tokens, logits)


@torch.no_grad()
def _greedy(reference: PreTrainedModel, prompt: list[int]) -> list[int]:
    reference.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    found = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
    return found[0, len(prompt) :].tolist()


@torch.no_grad()
def _forward(reference: PreTrainedModel, ids: list[int]) -> Tensor:
    return reference(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return _family(request.param, tmp_path_factory.mktemp("families"), backend="eager")


@pytest.fixture(scope="module")
def artifacts(family: Family, edit_manifest: Callable[..., None]) -> dict[int, Path]:
    """The artifact by block size, which the programs leave open: another one is another number in the manifest."""
    wider = Path(shutil.copytree(family.artifact, family.artifact.with_suffix(".32")))
    edit_manifest(wider, lambda content: content.update(block_size=32))
    return {16: family.artifact, 32: wider}


every_family = pytest.mark.parametrize(
    "family",
    [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_FAMILIES)],
    indirect=True,
    scope="module",
)


@dataclass
class Recording:
    """The tokens of each request and the logits each was taken from."""

    tokens: list[list[int]]
    logits: list[Tensor]


def _run(llm: LLM, prompts: Sequence[list[int]]) -> Recording:
    """Greedy completions through the engine, all at once, with the logits its executor returns."""
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    engine, returned = llm.engine, []
    run = engine.executor.run

    def recording(*args: Any, **kwargs: Any) -> Tensor:
        logits = run(*args, **kwargs)
        returned.append(logits.clone())
        return logits

    engine.executor.run = recording
    requests = [engine.add(prompt, params) for prompt in prompts]
    rows: dict[int, list[Tensor]] = {request.request_id: [] for request in requests}
    while engine.has_work():
        for row, request in enumerate(engine.step()):
            rows[request.request_id].append(returned[-1][row])
    return Recording([r.output_token_ids for r in requests], [torch.stack(rows[r.request_id]) for r in requests])


def _assert_equal(found: Recording, family: Family, count: int) -> None:
    scale = max(1.0, max(logits.abs().max().item() for logits in family.logits))
    for number in range(count):
        assert found.tokens[number] == family.tokens[number], f"{family.name}, prompt {number}"
        error = (found.logits[number] - family.logits[number]).abs().max().item()
        assert error <= TOLERANCE * scale, f"{family.name}, prompt {number}: logits differ by {error:.1e}"


@every_family
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize(
    ("count", "max_num_batched_tokens"), [(1, 512), (5, 512), (5, 7)], ids=["alone", "packed", "chunks of 7"]
)
def test_logits_and_tokens(
    family: Family, artifacts: dict[int, Path], block_size: int, count: int, max_num_batched_tokens: int
) -> None:
    llm = LLM(artifacts[block_size], max_num_batched_tokens=max_num_batched_tokens, kv_cache_memory=2**22)
    assert llm.manifest.block_size == block_size
    _assert_equal(_run(llm, family.prompts[:count]), family, count)


@every_family
def test_scores(family: Family) -> None:
    """The scoring program gives the log-probabilities that transformers gives."""
    ids = family.prompts[2] + family.tokens[2]
    expected = _forward(family.reference, ids).log_softmax(-1)[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]
    assert torch.tensor(LLM(family.artifact).score(ids)[0]) == pytest.approx(expected, abs=TOLERANCE * 5)


@every_family
def test_one_cache_for_each_attention_layer(family: Family) -> None:
    """One cache a layer with its own geometry; windows as the config says."""
    config, caches = family.reference.config, LLM(family.artifact).manifest.kv_cache
    per_layer = 2 if family.name == "diffllama" else 1
    assert len(caches) == config.num_hidden_layers * per_layer
    kinds = getattr(config, "layer_types", None)
    if kinds and "sliding_attention" in kinds:
        assert [cache.window for cache in caches] == [WINDOW if kind == "sliding_attention" else 0 for kind in kinds]


@pytest.mark.parametrize(
    "name",
    [*NATIVE[:NATIVE_BY_DEFAULT], *(pytest.param(n, marks=pytest.mark.slow) for n in NATIVE[NATIVE_BY_DEFAULT:])],
)
def test_native_code(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "optc"):
        family = _family(name, tmp_path, backend="inductor")
        for count, max_num_batched_tokens in ((1, 512), (5, 512), (5, 7)):
            llm = LLM(family.artifact, max_num_batched_tokens=max_num_batched_tokens, kv_cache_memory=2**22)
            assert llm.engine.executor.is_native
            _assert_equal(_run(llm, family.prompts[:count]), family, count)
    assert not [
        record for record in caplog.records if record.name == "optc"
    ]  # it would say that it runs the portable program


def test_the_reference_sees_windows() -> None:
    """Prompts and completions are longer than every window, so a window that is left out shows."""
    assert max(LENGTHS) > 2 * WINDOW
    assert max(LENGTHS) + NEW_TOKENS <= MAX_LEN
