"""What optc cannot compile is refused before work starts, by the name of what is in the way; or it is right."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import optc
from optc.errors import CheckpointError, UnsupportedModelError
from optc.optimizer.checkpoint import load_checkpoint
from optc.runtime import LLM

from .families import VOCAB_SIZE, load_reference, save_model

SMALL: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DENSE = {
    **SMALL,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GPT = {**SMALL, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 8}

# model type -> config, and what the refusal must say: the module (or wrapper) that is in the way, and the way out.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mamba": ({}, r"mamba is a state-space or hybrid model: backbone \(MambaModel\).*layers are all attention"),
    "mamba2": ({}, r"mamba2 is a state-space.*\(Mamba2"),
    "falcon_mamba": ({}, r"falcon_mamba is a state-space.*\(FalconMamba"),
    "rwkv": ({}, r"rwkv is a state-space.*\(RwkvModel\)"),
    "xlstm": ({}, r"xlstm is a state-space.*\(xLSTM"),
    "recurrent_gemma": ({}, r"recurrent_gemma is a state-space.*\(RecurrentGemma"),
    "jamba": ({}, r"jamba is a state-space or hybrid model: model\.layers\.0.*\(JambaMamba"),
    "bamba": ({}, r"bamba is a state-space or hybrid model: model\.layers\.0"),
    "falcon_h1": ({}, r"falcon_h1 is a state-space or hybrid model: model\.layers\.0\.mamba"),
    "nemotron_h": (DENSE, r"nemotron_h is a state-space or hybrid model: .*Mamba2"),
    "qwen3_next": (DENSE, r"qwen3_next is a state-space or hybrid model: .*GatedDeltaNet"),
    "lfm2": (
        {**DENSE, "layer_types": ["conv", "full_attention"]},
        r"lfm2 is a state-space or hybrid model: .*Lfm2ShortConv",
    ),
    "zamba": ({}, r"zamba is a state-space or hybrid model: .*Mamba"),
    "zamba2": ({}, r"zamba2 is a state-space or hybrid model: .*Mamba"),
    "minimax": (DENSE, r"minimax is a state-space or hybrid model: .*MiniMaxLightningAttention"),
    "granitemoehybrid": (
        {**DENSE, "layer_types": ["mamba", "attention"]},
        r"granitemoehybrid is a state-space or hybrid model: .*Mamba",
    ),
    "t5": ({}, r"t5 is an encoder-decoder; optc compiles decoder-only"),
    "bart": ({}, r"bart is an encoder-decoder; optc compiles decoder-only"),
    "whisper": ({}, r"whisper is an encoder-decoder; optc compiles decoder-only"),
    "llava": ({}, r"llava wraps a language model \(llama\) with a vision encoder; save its language model"),
    "qwen2_vl": ({}, r"qwen2_vl wraps a language model \(qwen2_vl_text\) with a vision encoder; save"),
    "gemma3": ({}, r"gemma3 wraps a language model \(gemma3_text\) with a vision encoder; save"),
    "gemma3n": ({}, r"gemma3n wraps a language model \(gemma3n_text\) with a audio and a vision encoder; save"),
    "llama4": ({}, r"llama4 wraps a language model \(llama4_text\) with a vision encoder; save"),
    "fuyu": ({}, r"fuyu wraps a language model \(persimmon\); save"),
    "bloom": (
        {**SMALL, "hidden_size": 64, "n_layer": 2, "n_head": 4},
        r"bloom.*position ids.*BloomAttention.*use a model",
    ),
    "mpt": ({**SMALL, "d_model": 64, "n_layers": 2, "n_heads": 4}, r"mpt uses ALiBi: MptAttention.*use a model"),
    "falcon": (
        {**SMALL, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
        r"falcon uses ALiBi: FalconAttention.*use a model",
    ),
    "gpt_neo": (
        {**SMALL, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        r"\(GPTNeoSelfAttention\).*bypasses.*use a model",
    ),
    "xglm": (
        {**SMALL, "d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4},
        r"\(XGLMAttention\).*bypasses.*use a model",
    ),
    "deepseek_v32": (
        {
            **DENSE,
            "num_key_value_heads": 4,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_topk": 4,
            "qk_rope_head_dim": 8,
        },
        r"\(DeepseekV32Indexer\) computes with the attention mask",
    ),
    "doge": ({**DENSE, "num_key_value_heads": 2}, r"\(DogeAttention\) computes with the attention mask"),
    "bert": (DENSE, r"the attention mask of BertSelfAttention.*neither causal nor a causal sliding window"),
}


def _write_config(model_type: str, folder: Path, config: dict[str, Any]) -> Path:
    CONFIG_MAPPING[model_type](**config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_from_the_config_alone(model_type: str, tmp_path: Path) -> None:
    """There are no weights to load."""
    config, message = REFUSED[model_type]
    folder = _write_config(model_type, tmp_path / "model", config)
    with pytest.raises(UnsupportedModelError, match=message):
        optc.compile(folder, tmp_path / "a.optc", backend="eager")
    assert not (tmp_path / "a.optc").exists()


def test_what_is_supported_asks_for_its_weights(tmp_path: Path) -> None:
    folder = _write_config("llama", tmp_path / "model", {**DENSE, "num_key_value_heads": 2})
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("roberta", r"roberta\) does not number its tokens 0, 1, 2.*RobertaSelfAttention.*use a model"),
        ("xlm-roberta", r"xlm-roberta\) does not number its tokens.*use a model"),
        ("dbrx", r"\(DbrxExperts\) failed under torch\.export"),
        ("openai-gpt", r"2 attention layers, of which 0 went through.*transformer\.h\.0\.attn"),
        ("jetmoe", r"router has shapes that depend on the values of data"),
    ],
)
def test_refused_once_the_weights_are_there(name: str, message: str, tmp_path: Path) -> None:
    """What only values can show: position numbers, and control flow that depends on data."""
    options: dict[str, dict[str, Any]] = {
        "roberta": {**DENSE, "is_decoder": True},
        "xlm-roberta": {**DENSE, "is_decoder": True},
        "openai-gpt": {name: value for name, value in GPT.items() if name != "rotary_dim"},
        "dbrx": {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 128,
            "vocab_size": VOCAB_SIZE,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
        },
        "jetmoe": {
            **DENSE,
            "num_key_value_heads": 2,
            "kv_channels": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    }
    checkpoint = save_model(name, tmp_path / "model", **options[name])
    with pytest.raises(UnsupportedModelError, match=message):
        optc.compile(checkpoint, tmp_path / "a.optc", backend="eager")
    assert not (tmp_path / "a.optc").exists()


@pytest.mark.parametrize("new_architecture", [False, True])
def test_falcon_without_alibi_is_right(new_architecture: bool, tmp_path: Path) -> None:
    """Its modelling file calls scaled_dot_product_attention itself, where optc finds it."""
    options = {"new_decoder_architecture": new_architecture, "num_kv_heads": 2, "alibi": False}
    checkpoint = save_model("falcon", tmp_path / "model", **options)
    llm = LLM(optc.compile(checkpoint, tmp_path / "a.optc", backend="eager"), kv_cache_memory=2**22)
    ids = torch.arange(5, 45)
    with torch.no_grad():
        logits = load_reference(checkpoint)(input_ids=ids[None]).logits[0]
    expected = logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    assert llm.score(ids.tolist())[0] == pytest.approx(expected.tolist(), abs=1e-4)
    assert "scaled_dot_product_attention" in " ".join(llm.manifest.model.notes)


def test_the_text_model_of_a_wrapper_is_right(tmp_path: Path) -> None:
    """The way out that the refusal of a wrapper names."""
    text = {**DENSE, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
    }
    config = CONFIG_MAPPING["gemma3"](
        text_config=text, vision_config={**vision, "patch_size": 14}, mm_tokens_per_image=4
    )
    torch.manual_seed(0)
    wrapper = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    wrapper.save_pretrained(tmp_path / "wrapper")
    with pytest.raises(UnsupportedModelError, match="gemma3 wraps"):
        optc.compile(tmp_path / "wrapper", tmp_path / "a.optc", backend="eager")

    inner = AutoModelForCausalLM.from_config(config.text_config, dtype=torch.float32)
    inner.model.load_state_dict(wrapper.model.language_model.state_dict())
    inner.save_pretrained(tmp_path / "text")
    llm = LLM(optc.compile(tmp_path / "text", tmp_path / "a.optc", backend="eager"), kv_cache_memory=2**22)
    ids = torch.arange(5, 45)
    with torch.no_grad():
        expected = wrapper(input_ids=ids[None]).logits[0][:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    assert llm.score(ids.tolist())[0] == pytest.approx(expected.tolist(), abs=1e-4)


def test_unknown_architectures_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(UnsupportedModelError, match="no_such_model"):
        load_checkpoint(str(folder))
    (folder / "config.json").write_text('{"model_type": "own_code", "auto_map": {"AutoConfig": "x.Y"}}')
    with pytest.raises(UnsupportedModelError, match=r"own_code.*its own code, which optc does not run"):
        load_checkpoint(str(folder))


def test_a_refusal_changes_nothing(tmp_path: Path) -> None:
    """An artifact that stands at the output stays."""
    good = save_model("llama", tmp_path / "good")
    output = optc.compile(good, tmp_path / "a.optc", backend="eager")
    before = (output / "manifest.json").read_bytes()
    bad = _write_config("mamba", tmp_path / "bad", {})
    with pytest.raises(UnsupportedModelError):
        optc.compile(bad, output, backend="eager", force=True)
    assert (output / "manifest.json").read_bytes() == before
    shutil.rmtree(output)


def test_a_window_that_only_the_cache_applies(tmp_path: Path) -> None:
    """Llama's masks know no window; with one in its config, transformers' cache forgets tokens that its masks show."""
    folder = save_model("llama", tmp_path / "llama", sliding_window=8)
    with pytest.raises(UnsupportedModelError, match=r"sliding window of 8.*--max-model-len 8"):
        optc.compile(folder, tmp_path / "out.optc", backend="eager")
    output = optc.compile(folder, tmp_path / "short.optc", backend="eager", max_model_len=8)
    assert LLM(output).manifest.kv_cache[0].window == 0
