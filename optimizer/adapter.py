"""Merging a PEFT LoRA adapter into a model's weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from ..errors import CheckpointError

# Initialisations that change the base weights: the adapter fits those, not the checkpoint's.
_RESIDUAL_INITS = ("pissa", "olora", "corda", "loftq")
_DEFAULT_ALPHA = 8
"""PEFT's, for a config that names none."""


def merge_adapter(model: nn.Module, adapter: Path) -> None:
    """Add a PEFT LoRA adapter to the weights: W += scaling * B @ A, computed in float32.

    `scaling` is lora_alpha / r, or lora_alpha / sqrt(r) with rank-stabilised LoRA (Kalajdzievski 2023); rank and alpha
    patterns are honoured. Layers that store W transposed (GPT-2's Conv1D) are handled.

    Raises:
        CheckpointError: not a LoRA adapter, one of another model, or one that needs more than merging.
    """
    config, tensors = read_adapter(adapter)
    modules = dict(model.named_modules())
    tensors = {name: value for name, value in tensors.items() if not _is_base_weight(name, value, modules)}
    pairs = _adapter_pairs(adapter, tensors)
    for name, (a, b) in pairs.items():
        weight = getattr(modules.get(name), "weight", None)
        delta = _lora_scaling(config, name, rank=a.shape[0]) * (b.float() @ a.float())
        transposed = config.get("fan_in_fan_out") or type(modules.get(name)).__name__ == "Conv1D"
        delta = delta.t() if transposed else delta
        if not isinstance(weight, Tensor) or weight.shape != delta.shape:
            found = (
                "no such layer"
                if weight is None
                else f"that layer is {tuple(weight.shape)}, the adapter's is {tuple(delta.shape)}"
            )
            raise CheckpointError(f"{adapter}: adapter for another model: {name}: {found} in {type(model).__name__}")
        # A new tensor, so that an adapted output layer leaves the input embedding alone that it was tied to.
        modules[name].weight = nn.Parameter((weight.float() + delta).to(weight.dtype), requires_grad=False)


def read_adapter(adapter: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of an adapter, checked as far as that goes without the model it is for.

    Raises:
        CheckpointError: not a LoRA adapter, or one that needs more than merging.
    """
    config_path, weights_path = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    for path in (config_path, weights_path):
        if not path.is_file():
            raise CheckpointError(f"{adapter}: no {path.name}; expected a PEFT LoRA adapter")
    config = _read_config(config_path)
    try:
        with safetensors.safe_open(weights_path, "pt") as opened:
            tensors: dict[str, Tensor] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except Exception as error:
        raise CheckpointError(f"{adapter}: unreadable adapter: {error}") from error
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("bias", "none") != "none":
        raise CheckpointError(
            f"{adapter}: {config.get('peft_type')} adapter; optc merges plain LoRA (no DoRA, no trained biases)"
        )
    init = str(config.get("init_lora_weights")).lower()
    if init.startswith(_RESIDUAL_INITS):
        raise CheckpointError(
            f"{adapter}: init_lora_weights {init!r} changed the base weights, so the adapter does not fit the checkpoint's; "
            "save it with PEFT's path_initial_model_for_weight_conversion"
        )
    if config.get("alora_invocation_tokens") is not None:
        raise CheckpointError(
            f"{adapter}: an activated LoRA (alora_invocation_tokens) acts on some tokens only and cannot be merged"
        )
    return config, tensors


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        patterns = config.get("alpha_pattern") or {}
        alphas = [config.get("lora_alpha", _DEFAULT_ALPHA), *patterns.values()]
    except (ValueError, OSError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: unreadable adapter: {error}") from error
    if wrong := [alpha for alpha in alphas if isinstance(alpha, bool) or not isinstance(alpha, int | float)]:
        raise CheckpointError(f"{path}: lora_alpha {wrong[0]!r} is not a number")
    for pattern in patterns:
        try:
            re.compile(_layers(pattern))
        except re.error as error:
            raise CheckpointError(f"{path}: alpha_pattern {pattern!r} is not a regular expression: {error}") from error
    assert isinstance(config, dict)
    return config


def _layers(pattern: str) -> str:
    """The expression that PEFT matches layer names with."""
    return rf"(.*\.)?({pattern})$"


def _is_base_weight(name: str, value: Tensor, modules: dict[str, nn.Module]) -> bool:
    """Whether this is the model's own weight: PEFT puts copies of adapted embeddings and output layers into adapters."""
    match = re.fullmatch(r"base_model\.model\.(.+?)(?:\.base_layer)?\.weight", name)
    weight = getattr(modules.get(match[1]), "weight", None) if match else None
    return isinstance(weight, Tensor) and torch.equal(weight, value.to(weight.dtype))


def _adapter_pairs(adapter: Path, tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_(A|B)(?:\.default)?\.weight", name)
        if match is None:
            raise CheckpointError(
                f"{adapter}: the adapter holds {name}, which is not a LoRA matrix; optc merges plain LoRA on linear layers"
            )
        found.setdefault(match[1], {})[match[2]] = value
    if not found:
        raise CheckpointError(f"{adapter}: the adapter holds no LoRA matrices")
    if odd := [name for name, pair in found.items() if len(pair) != 2]:
        raise CheckpointError(f"{adapter}: {odd[0]} has only one of lora_A and lora_B")
    pairs = {name: (pair["A"], pair["B"]) for name, pair in found.items()}
    for name, (a, b) in pairs.items():
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise CheckpointError(
                f"{adapter}: {name}: lora_A is {list(a.shape)} and lora_B {list(b.shape)}; expected [rank, in] and [out, rank]"
            )
    return pairs


def _lora_scaling(config: dict[str, Any], name: str, rank: int) -> float:
    alpha = config.get("lora_alpha", _DEFAULT_ALPHA)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(_layers(pattern), name):
            alpha = value
            break
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)
