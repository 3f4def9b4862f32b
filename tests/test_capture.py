"""From a checkpoint to a graph: RoPE kinds, masks, attention layers, weights, plain modules, LoRA adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.masking_utils import create_causal_mask, sliding_window_causal_mask_function
from transformers.models.llama import modeling_llama
from transformers.pytorch_utils import Conv1D

import optc
from optc.errors import CheckpointError, UnsupportedModelError, UsageError
from optc.optimizer.adapter import merge_adapter
from optc.optimizer.capture import capture, rehearse
from optc.optimizer.checkpoint import load_checkpoint
from optc.optimizer.intercept import IMPLEMENTATION, MaskSpec, Recorder, _mask_function
from optc.runtime import LLM

from .families import MAX_LEN, VOCAB_SIZE, load_reference, make_config, randomize, save_model

EXACT = 1e-4


def _ids(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def _log_probabilities(model: nn.Module, ids: list[int]) -> Tensor:
    """Of each token after the first, as `LLM.score` gives them."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids)[1:, None])[:, 0]


def _assert_scores(llm: LLM, reference: nn.Module, ids: list[int]) -> None:
    assert llm.score(ids) == pytest.approx(_log_probabilities(reference, ids).tolist(), abs=EXACT)


def _compile(checkpoint: Path, **options: Any) -> LLM:
    output = checkpoint.with_name(f"{checkpoint.name}.{options.get('max_model_len')}.optc")
    return LLM(optc.compile(checkpoint, output, backend="eager", **options), kv_cache_memory=2**22)


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
    llm, reference = _compile(checkpoint), load_reference(checkpoint)
    for length in (2, ORIGINAL - 1, ORIGINAL + 1, MAX_LEN):
        _assert_scores(llm, reference, _ids(length))
    (result,) = llm.generate([_ids(20)], max_tokens=40, temperature=0, ignore_eos=True, logprobs=0)
    found = [logprobs[token] for token, logprobs in zip(result.token_ids, result.logprobs or [], strict=True)]
    expected = _log_probabilities(reference, _ids(20) + result.token_ids)[19:]
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

    short = _compile(checkpoint, max_model_len=ORIGINAL)
    _assert_scores(short, reference, _ids(ORIGINAL))
    _assert_scores(short, reference, _ids(5))

    long = _compile(checkpoint, max_model_len=MAX_LEN)
    _assert_scores(long, reference, _ids(MAX_LEN))
    _assert_scores(long, reference, _ids(ORIGINAL + 1))
    # transformers would take the short factors here; a sequence that grows must not change its mind about its past
    always_long = {**LONGROPE, "short_factor": LONGROPE["long_factor"]}
    forced = load_reference(save_model(name, tmp_path / "forced", **_scaled(always_long, **changes)))
    _assert_scores(long, forced, _ids(5))
    assert "longrope RoPE fixed for --max-model-len 128" in " ".join(long.manifest.model.notes)


def test_longrope_with_magnitudes_of_its_own(tmp_path: Path) -> None:
    """Phi-3.5-MoE multiplies its rotations by one of two constants, by the length of the data."""
    options = _scaled({**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.3})
    checkpoint = save_model("phimoe", tmp_path / "model", **options)
    reference = load_reference(checkpoint)
    _assert_scores(_compile(checkpoint, max_model_len=ORIGINAL), reference, _ids(ORIGINAL))
    _assert_scores(_compile(checkpoint, max_model_len=MAX_LEN), reference, _ids(ORIGINAL + 1))


def test_dynamic_rope_is_decided_by_max_model_len(tmp_path: Path) -> None:
    """Frequencies for the largest length, at every length; more than the config's positions are allowed."""
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    checkpoint = save_model("llama", tmp_path / "model", **_scaled(scaling, max_position_embeddings=ORIGINAL))
    llm, reference = _compile(checkpoint, max_model_len=100), load_reference(checkpoint)
    _assert_scores(llm, reference, _ids(100))
    _log_probabilities(reference, _ids(100))  # transformers keeps the frequencies of the longest sequence it saw
    _assert_scores(llm, reference, _ids(ORIGINAL + 1))
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
    expected = _log_probabilities(model, _ids(9))
    capture(model, MAX_LEN)
    assert before == (nn.functional.scaled_dot_product_attention, torch.max, model.config._attn_implementation)
    assert torch.equal(_log_probabilities(model, _ids(9)), expected)
    assert AttentionInterface._global_mapping[IMPLEMENTATION]
    assert isinstance(
        create_causal_mask(LlamaConfig(_attn_implementation="eager"), torch.zeros(1, 3, 4), None, None), Tensor
    )


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    for name, tied, stored in (("tied", True, 1), ("untied", False, 2)):
        checkpoint = save_model("llama", tmp_path / name, tie_word_embeddings=tied)
        constants = _compile(checkpoint).manifest.constants
        assert sum(record.shape == (VOCAB_SIZE, 64) for record in constants.values()) == stored


# Plain modules


class Attention(nn.Module):
    def __init__(self, *, is_causal: bool = True) -> None:
        super().__init__()
        self.qkv, self.out, self.is_causal = nn.Linear(64, 192), nn.Linear(64, 64), is_causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, 16)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        return self.out(out.transpose(1, 2).flatten(2))


class Plain(nn.Module):
    """A small GPT that knows nothing of transformers."""

    def __init__(self, attention: Callable[[], nn.Module] = Attention) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB_SIZE, 64), nn.Embedding(MAX_LEN, 64)
        self.layers = nn.ModuleList(attention() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, VOCAB_SIZE)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.positions(positions)
        for layer in self.layers:
            x = x + layer(self.norm(x))
        return self.head(self.norm(x))


EXAMPLE = (torch.zeros(1, 6, dtype=torch.long), torch.arange(6)[None])


def test_a_plain_module(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Plain()
    randomize(module)
    output = optc.compile(module, tmp_path / "a.optc", backend="eager", example_inputs=EXAMPLE, max_model_len=MAX_LEN)
    llm = LLM(output, kv_cache_memory=2**22)
    assert len(llm.manifest.kv_cache) == 2
    prompts = [_ids(9), _ids(3, seed=1), _ids(30, seed=2)]
    for prompt, result in zip(prompts, llm.generate(prompts, max_tokens=20, temperature=0), strict=True):
        ids = list(prompt)
        for _ in range(20):
            with torch.no_grad():
                ids.append(int(module(torch.tensor([ids]), torch.arange(len(ids))[None])[0, -1].argmax()))
        assert result.token_ids == ids[len(prompt) :]


@pytest.mark.parametrize(
    "attention", [lambda: Attention(is_causal=False), lambda: nn.Linear(64, 64)], ids=["bidirectional", "no attention"]
)
def test_a_module_without_causal_attention_is_refused(attention: Callable[[], nn.Module], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"Plain.*scaled_dot_product_attention"):
        optc.compile(Plain(attention), tmp_path / "a.optc", backend="eager", example_inputs=EXAMPLE)
    assert not (tmp_path / "a.optc").exists()


def test_a_module_that_mixes_tokens_elsewhere_is_refused(tmp_path: Path) -> None:
    class Convolving(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv1d(64, 64, 3, padding=2)

        def forward(self, x: Tensor) -> Tensor:
            mixed = self.convolution(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
            return super().forward(mixed)

    with pytest.raises(UnsupportedModelError, match=r"Plain.*conv"):
        optc.compile(Plain(Convolving), tmp_path / "a.optc", backend="eager", example_inputs=EXAMPLE)


def test_a_module_needs_example_inputs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="example_inputs"):
        optc.compile(Plain(), tmp_path / "a.optc", backend="eager")


@pytest.mark.parametrize("length", [-3, 0, 1])
def test_a_module_needs_room_for_two_tokens(length: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"max_model_len {length}: expected at least 2"):
        optc.compile(Plain(), tmp_path / "a.optc", backend="eager", example_inputs=EXAMPLE, max_model_len=length)


@pytest.mark.parametrize("length", [None, MAX_LEN + 1])
def test_a_module_whose_positions_end_before_its_length(length: int | None, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=rf"max_model_len {length or 2048}: Plain fails at position {(length or 2048) - 1}"
    ):
        optc.compile(Plain(), tmp_path / "a.optc", backend="eager", example_inputs=EXAMPLE, max_model_len=length)


def test_a_module_without_parameters(tmp_path: Path) -> None:
    """All weights are buffers, one without dimensions."""

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            self.register_buffer("table", torch.randn(VOCAB_SIZE, 32, generator=generator).bfloat16())
            self.register_buffer("gain", torch.tensor(2.0, dtype=torch.bfloat16))
            self.register_buffer("steps", torch.tensor(3))

        def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
            x = nn.functional.embedding(input_ids, self.table) + positions[..., None] * 0.01
            heads = x.to(self.table.dtype).unflatten(-1, (2, 16)).transpose(1, 2)
            out = nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
            return nn.functional.linear(out.transpose(1, 2).flatten(2) * self.gain, self.table)

    module = Frozen()
    options: dict[str, Any] = {"backend": "eager", "example_inputs": EXAMPLE, "max_model_len": 64}
    first = LLM(optc.compile(module, tmp_path / "a.optc", **options), kv_cache_memory=2**22).manifest.model
    assert (first.dtype, first.parameters) == ("bfloat16", VOCAB_SIZE * 32 + 1)
    module.gain.fill_(3)
    second = LLM(optc.compile(module, tmp_path / "b.optc", **options), kv_cache_memory=2**22).manifest.model
    assert second.source_sha256 != first.source_sha256


# LoRA

LINEAR = ["q_proj", "down_proj"]
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "rank and alpha": ("llama", {"r": 4, "lora_alpha": 16, "target_modules": LINEAR}),
    "rank-stabilised": ("llama", {"r": 4, "lora_alpha": 16, "use_rslora": True, "target_modules": LINEAR}),
    "patterns": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 16,
            "target_modules": LINEAR,
            "rank_pattern": {"down_proj": 8},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 3, "down_proj|up_proj": 20, "q_proj": 7},
        },
    ),
    "Conv1D": ("gpt2", {"r": 4, "lora_alpha": 16, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "tied output layer": ("llama", {"r": 4, "lora_alpha": 16, "target_modules": ["lm_head"]}),
}


def _save_adapter(checkpoint: Path, folder: Path, options: dict[str, Any]) -> peft.PeftModel:
    adapted = peft.get_peft_model(load_reference(checkpoint), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name:
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    adapted.save_pretrained(folder)
    return adapted.eval()


def _by_hand(model: PreTrainedModel, folder: Path, scaling: Callable[[str, int], float]) -> dict[str, Tensor]:
    """W + scaling * B @ A of every adapted layer."""
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    merged = {}
    for name, a in tensors.items():
        if name.endswith("lora_A.weight"):
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            module, b = model.get_submodule(layer), tensors[name.replace("lora_A", "lora_B")]
            delta = scaling(layer, a.shape[0]) * (b @ a)
            merged[layer] = module.weight + (delta.t() if isinstance(module, Conv1D) else delta)
    return merged


def _expected_scaling(options: dict[str, Any]) -> Callable[[str, int], float]:
    def scaling(layer: str, rank: int) -> float:
        alpha = options["lora_alpha"]
        if "alpha_pattern" in options:
            alpha = 20 if layer.endswith("down_proj") else 3 if "layers.0." in layer else 7
        return alpha / (rank**0.5 if options.get("use_rslora") else rank)

    return scaling


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_are_merged(kind: str, tmp_path: Path) -> None:
    """The same weights as merging by hand; the same log-probabilities as peft, unmerged and merged."""
    name, options = ADAPTERS[kind]
    tied = {"tie_word_embeddings": True} if "tied" in kind else {}
    checkpoint, adapter = save_model(name, tmp_path / "model", **tied), tmp_path / "adapter"
    adapted = _save_adapter(checkpoint, adapter, options)
    unmerged = _log_probabilities(adapted, _ids(40))

    model = load_reference(checkpoint)
    expected = _by_hand(model, adapter, _expected_scaling(options))
    merge_adapter(model, adapter)
    assert len(expected) == {"llama": 1 if tied else 4, "gpt2": 6}[name]
    for layer, weight in expected.items():
        torch.testing.assert_close(model.get_submodule(layer).weight.data, weight, atol=1e-6, rtol=1e-5)

    llm = _compile(checkpoint, adapter=adapter)
    assert llm.score(_ids(40)) == pytest.approx(unmerged.tolist(), abs=EXACT)
    assert llm.manifest.model.adapter == str(adapter)
    assert (_log_probabilities(load_reference(checkpoint), _ids(40)) - unmerged).abs().max() > 0.1
    if not tied:  # peft merges an output layer into the embedding it is tied to
        _assert_scores(llm, adapted.merge_and_unload(), _ids(40))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config, tensors: config.update(use_dora=True), "no DoRA"),
        (lambda config, tensors: config.update(peft_type="IA3"), "IA3 adapter"),
        (lambda config, tensors: config.update(bias="all"), "no trained biases"),
        (lambda config, tensors: tensors.clear(), "no LoRA matrices"),
        (lambda config, tensors: tensors.pop(next(iter(tensors))), "only one of lora_A and lora_B"),
        (
            lambda config, tensors: tensors.update({"base_model.model.lm_head.modules": torch.ones(1)}),
            "not a LoRA matrix",
        ),
    ],
    ids=["DoRA", "IA3", "biases", "empty", "half a pair", "something else"],
)
def test_other_adapters_are_refused(
    change: Callable[[dict[str, Any], dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    checkpoint, adapter = save_model("llama", tmp_path / "model"), tmp_path / "adapter"
    _save_adapter(checkpoint, adapter, ADAPTERS["rank and alpha"][1])
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    change(config, tensors)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        merge_adapter(load_reference(checkpoint), adapter)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    checkpoint, adapter = save_model("llama", tmp_path / "model"), tmp_path / "adapter"
    _save_adapter(checkpoint, adapter, ADAPTERS["rank and alpha"][1])
    wider = save_model("llama", tmp_path / "wider", hidden_size=128)
    with pytest.raises(CheckpointError, match=r"adapter for another model: model\.layers\.0\.mlp\.down_proj"):
        merge_adapter(load_reference(wider), adapter)
    with pytest.raises(CheckpointError, match="no such layer"):
        merge_adapter(load_reference(save_model("gpt2", tmp_path / "gpt2")), adapter)
