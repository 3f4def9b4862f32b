"""LoRA adapters, merged into the weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optc.errors import CheckpointError
from optc.optimizer.adapter import merge_adapter

from .capture_cases import EXACT, assert_scores, compiled, log_probabilities, random_ids
from .families import load_reference, save_model

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
    unmerged = log_probabilities(adapted, random_ids(40))

    model = load_reference(checkpoint)
    expected = _by_hand(model, adapter, _expected_scaling(options))
    merge_adapter(model, adapter)
    assert len(expected) == {"llama": 1 if tied else 4, "gpt2": 6}[name]
    for layer, weight in expected.items():
        torch.testing.assert_close(model.get_submodule(layer).weight.data, weight, atol=1e-6, rtol=1e-5)

    llm = compiled(checkpoint, adapter=adapter)
    assert llm.score(random_ids(40))[0] == pytest.approx(unmerged.tolist(), abs=EXACT)
    assert llm.manifest.model.adapter == str(adapter)
    assert (log_probabilities(load_reference(checkpoint), random_ids(40)) - unmerged).abs().max() > 0.1
    if not tied:  # peft merges an output layer into the embedding it is tied to
        assert_scores(llm, adapted.merge_and_unload(), random_ids(40))


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
