"""From a checkpoint to a graph: RoPE kinds, masks, attention layers, weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.masking_utils import create_causal_mask, sliding_window_causal_mask_function
from transformers.models.llama import modeling_llama

import optc
from optc.errors import UnsupportedModelError, UsageError
from optc.optimizer.capture import capture, rehearse
from optc.optimizer.checkpoint import load_checkpoint
from optc.optimizer.intercept import IMPLEMENTATION, MaskSpec, Recorder, _mask_function

from .capture_cases import EXACT, assert_scores, compiled, log_probabilities, random_ids
from .families import MAX_LEN, VOCAB_SIZE, load_reference, make_config, randomize, save_model

# RoPE

ORIGINAL = 32
"""Length the scaled models were trained for."""
HALF = 8
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1 + 0.1 * i for i in range(HALF)],
    "long_factor": [2.0 + i for i in range(HALF)],
    "original_max_position_embeddings": ORIGINAL,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
}


def _scaled(scaling: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 1e4, **scaling}, "head_dim": 2 * HALF, **changes}


@pytest.mark.parametrize("kind", SCALINGS)
def test_rope_that_does_not_ask_for_the_length(kind: str, tmp_path: Path) -> None:
    """Right at every length, far beyond the example's; also when decoding one token at a time."""
    checkpoint = save_model("llama", tmp_path / "model", **_scaled(SCALINGS[kind]))
    llm, reference = compiled(checkpoint), load_reference(checkpoint)
    for length in (2, ORIGINAL - 1, ORIGINAL + 1, MAX_LEN):
        assert_scores(llm, reference, random_ids(length))
    (result,) = llm.generate([random_ids(20)], max_tokens=40, temperature=0, ignore_eos=True, logprobs=0)
    found = [logprobs[token] for token, logprobs in zip(result.token_ids, result.logprobs or [], strict=True)]
    expected = log_probabilities(reference, random_ids(20) + result.token_ids)[19:]
    assert found == pytest.approx(expected.tolist(), abs=EXACT)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("phi3", {"original_max_position_embeddings": ORIGINAL}), ("llama", {})],
)
def test_longrope_is_decided_by_max_model_len(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Up to the original length the short factors; beyond it the long factors, at every length."""
    options = _scaled(LONGROPE, **changes)
    checkpoint = save_model(name, tmp_path / "model", **options)
    reference = load_reference(checkpoint)

    short = compiled(checkpoint, max_model_len=ORIGINAL)
    assert_scores(short, reference, random_ids(ORIGINAL))
    assert_scores(short, reference, random_ids(5))

    long = compiled(checkpoint, max_model_len=MAX_LEN)
    assert_scores(long, reference, random_ids(MAX_LEN))
    assert_scores(long, reference, random_ids(ORIGINAL + 1))
    # transformers would take the short factors here; a sequence that grows must not change its mind about its past
    always_long = {**LONGROPE, "short_factor": LONGROPE["long_factor"]}
    forced = load_reference(save_model(name, tmp_path / "forced", **_scaled(always_long, **changes)))
    assert_scores(long, forced, random_ids(5))
    assert "longrope RoPE fixed for --max-model-len 128" in " ".join(long.manifest.model.notes)


def test_longrope_with_magnitudes_of_its_own(tmp_path: Path) -> None:
    """Phi-3.5-MoE multiplies its rotations by one of two constants, by the length of the data."""
    options = _scaled({**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.3})
    checkpoint = save_model("phimoe", tmp_path / "model", **options)
    reference = load_reference(checkpoint)
    assert_scores(compiled(checkpoint, max_model_len=ORIGINAL), reference, random_ids(ORIGINAL))
    assert_scores(compiled(checkpoint, max_model_len=MAX_LEN), reference, random_ids(ORIGINAL + 1))


def test_dynamic_rope_is_decided_by_max_model_len(tmp_path: Path) -> None:
    """Frequencies for the largest length, at every length; more than the config's positions are allowed."""
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    checkpoint = save_model("llama", tmp_path / "model", **_scaled(scaling, max_position_embeddings=ORIGINAL))
    llm, reference = compiled(checkpoint, max_model_len=100), load_reference(checkpoint)
    assert_scores(llm, reference, random_ids(100))
    log_probabilities(reference, random_ids(100))  # transformers keeps the frequencies of the longest sequence it saw
    assert_scores(llm, reference, random_ids(ORIGINAL + 1))
    assert "dynamic RoPE fixed for --max-model-len 100" in " ".join(llm.manifest.model.notes)


def test_a_length_the_positions_cannot_express_is_refused(tmp_path: Path) -> None:
    checkpoint = save_model("llama", tmp_path / "model")
    with pytest.raises(UsageError, match=f"--max-model-len {MAX_LEN + 1}.*{MAX_LEN} tokens"):
        load_checkpoint(str(checkpoint), max_model_len=MAX_LEN + 1)


# Masks


def _describe_mask(visible: Callable[..., Tensor], limit: int = 64, **given: Any) -> MaskSpec:
    return _mask_function(Recorder(limit))(mask_function=visible, **given)


def _causal(batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return kv <= q


def _chunked(batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return (kv <= q) & (kv // 8 == q // 8)


def test_masks_are_recognised_by_what_they_show() -> None:
    assert _describe_mask(_causal) == MaskSpec(0)
    assert _describe_mask(sliding_window_causal_mask_function(8), local_size=8) == MaskSpec(8)
    # a predicate that is causal as far as sequences go, whatever it says of itself
    assert _describe_mask(_causal, local_size=8) == MaskSpec(0)
    assert _describe_mask(_chunked, limit=8, local_size=8).problem == ""


@pytest.mark.parametrize(
    ("visible", "given"),
    [
        (_chunked, {"local_size": 8}),
        (lambda batch, head, q, kv: kv >= 0, {}),
        (lambda batch, head, q, kv: (q - kv).abs() < 8, {"local_size": 8}),
        (lambda batch, head, q, kv: kv < q, {}),
        (lambda batch, head, q, kv: (kv <= q) & (kv > q - 7), {"local_size": 8}),
        (lambda batch, head, q, kv: (kv <= q) | (kv < 4), {}),
    ],
    ids=["chunked", "bidirectional", "bidirectional window", "strictly causal", "another window", "prefix"],
)
def test_other_masks_have_a_problem(visible: Callable[..., Tensor], given: dict[str, Any]) -> None:
    assert "neither causal nor a causal sliding window" in _describe_mask(visible, **given).problem


def test_masks_from_data_have_a_problem() -> None:
    def documents(batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        raise RuntimeError("values of a traced tensor")

    assert _describe_mask(documents).problem == "is built from data"
    hidden = torch.tensor([[True, False, True]])
    assert _describe_mask(_causal, attention_mask=hidden).problem == "hides tokens by their values"
    assert _describe_mask(_causal, attention_mask=torch.ones(1, 3)) == MaskSpec(0)


def test_chunked_attention_is_refused_beyond_its_chunk(tmp_path: Path) -> None:
    """Llama 4; the message names the length up to which it would be causal."""
    checkpoint = save_model(
        "llama4_text", tmp_path / "model", attention_chunk_size=16, intermediate_size_mlp=96, num_local_experts=2,
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=MAX_LEN, pad_token_id=0, attn_temperature_tuning=False,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match=r"Llama4TextAttention \(layer 0\).*--max-model-len 16"):
        optc.compile(checkpoint, tmp_path / "refused.optc", backend="eager")


# Attention layers


def _tiny_llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config("llama", **changes), dtype=torch.float32).eval()
    randomize(model)
    return model.requires_grad_(False)


class _OwnAttention(nn.Module):
    """Attends without asking anyone."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.v_proj, self.o_proj = attention.v_proj, attention.o_proj

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        values = self.v_proj(hidden_states).repeat(1, 1, 2)
        return self.o_proj(values.cumsum(1)), None


@pytest.mark.parametrize("check", [capture, rehearse])
def test_a_layer_that_bypasses_the_interface_is_named(check: Callable[[PreTrainedModel, int], object]) -> None:
    model = _tiny_llama()
    model.model.layers[1].self_attn = _OwnAttention(model.model.layers[1].self_attn)
    if check is rehearse:
        model = model.to("meta")
    with pytest.raises(UnsupportedModelError, match=r"2 attention layers, of which 1 .*model\.layers\.1\.self_attn"):
        check(model, MAX_LEN)


@pytest.mark.parametrize("value", [torch.ones(1), 0.5])
def test_an_argument_that_would_change_attention_is_refused(value: object) -> None:
    model = _tiny_llama()
    attention = model.model.layers[0].self_attn
    original = attention.forward
    attention.forward = lambda *args, **kwargs: original(*args, position_bias=value, **kwargs)
    with pytest.raises(UnsupportedModelError, match=r"LlamaAttention \(layer 0\) passes position_bias"):
        capture(model, MAX_LEN)


def test_attention_that_is_not_causal_is_refused() -> None:
    model = _tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    model.config.is_causal = False
    with pytest.raises(UnsupportedModelError, match=r"LlamaAttention \(layer 0\)"):
        capture(model, MAX_LEN)


def test_tokens_that_meet_outside_attention_are_refused() -> None:
    class Smoothing(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden.cumsum(1)

    model = _tiny_llama()
    model.model.norm = Smoothing()
    with pytest.raises(UnsupportedModelError, match=r"norm combines tokens with aten\.cumsum"):
        capture(model, MAX_LEN)


def test_a_length_taken_from_the_data_is_refused() -> None:
    """Scaling by the longest position of a batch would mix the sequences of a batch."""

    class Scaled(modeling_llama.LlamaRotaryEmbedding):
        def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
            cos, sin = super().forward(x, position_ids)
            length = position_ids.amax() + 1
            return cos * torch.where(length > 4, 1.5, 1.0), sin

    model = _tiny_llama()
    model.model.rotary_emb = Scaled(model.config)
    with pytest.raises(UnsupportedModelError, match=r"rotary_emb looks at all positions together \(aten\.amax\)"):
        capture(model, MAX_LEN)


def test_capture_leaves_transformers_as_it_was() -> None:
    model = _tiny_llama()
    before = (nn.functional.scaled_dot_product_attention, torch.max, model.config._attn_implementation)
    expected = log_probabilities(model, random_ids(9))
    capture(model, MAX_LEN)
    assert before == (nn.functional.scaled_dot_product_attention, torch.max, model.config._attn_implementation)
    assert torch.equal(log_probabilities(model, random_ids(9)), expected)
    assert AttentionInterface._global_mapping[IMPLEMENTATION]
    assert isinstance(
        create_causal_mask(LlamaConfig(_attn_implementation="eager"), torch.zeros(1, 3, 4), None, None), Tensor
    )


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    for name, tied, stored in (("tied", True, 1), ("untied", False, 2)):
        checkpoint = save_model("llama", tmp_path / name, tie_word_embeddings=tied)
        constants = compiled(checkpoint).manifest.constants
        assert sum(record.shape == (VOCAB_SIZE, 64) for record in constants.values()) == stored
