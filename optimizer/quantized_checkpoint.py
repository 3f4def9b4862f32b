"""Checkpoints that another tool quantized: their codes go into the artifact as they are.

The model itself is loaded with the weights as the codes mean them, in its dtype, so that capture and every check see a
model like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from torch import Tensor, nn

from ..errors import CheckpointError, UnsupportedModelError
from ..passes.quantize.given import GivenWeight
from .formats.awq import AWQ
from .formats.compressed_tensors import CompressedTensors
from .formats.experts import stack
from .formats.fp8 import BlockFP8
from .formats.gptq import GPTQ
from .formats.module import Format, QuantizedModule

_READERS: dict[str, Callable[[Mapping[str, Any], str], Format]] = {
    "awq": AWQ.parse,
    "gptq": GPTQ.parse,
    "compressed-tensors": CompressedTensors.parse,
    "fp8": BlockFP8.parse,
}

# Scales of a KV cache or of attention itself. optc's cache computes its own.
_UNUSED = ("k_scale", "v_scale", "q_scale", "kv_scale", "k_zero_point", "v_zero_point", "q_zero_point")


@dataclass(frozen=True)
class Quantized:
    """What a quantized checkpoint gives besides its model.

    Attributes:
        label: what the user calls it, such as AWQ, 4 bits, groups of 128.
        weights: by the names of the model's parameters.
        kv_cache: what the checkpoint says of the KV cache: int8, fp8 or nothing.
        notes: decisions taken.
    """

    label: str
    weights: Mapping[str, GivenWeight] = field(repr=False)
    kv_cache: Literal["int8", "fp8"] | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Expanded:
    """The tensors of a quantized checkpoint as a model takes them.

    Attributes:
        tensors: all weights under the checkpoint's names, quantized ones as their codes mean them.
        weights: the codes, by the checkpoint's names.
    """

    tensors: dict[str, Tensor]
    weights: dict[str, GivenWeight]


def find_format(raw: Mapping[str, Any], path: str) -> Format | None:
    """The format that a config.json says its weights are in; none if they are not quantized.

    Raises:
        UnsupportedModelError: one that optc does not read.
        CheckpointError: a quantization_config that is none.
    """
    config = raw.get("quantization_config") or raw.get("compression_config")
    if config is None:
        return None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: quantization_config is a {type(config).__name__}, expected an object")
    method = str(config.get("quant_method", "")).lower().replace("_", "-")
    if not method and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        method = "bitsandbytes"
    if method not in _READERS:
        raise UnsupportedModelError(
            f"{path}: its weights are quantized by {method or 'a method that quantization_config does not name'}; optc reads "
            f"{', '.join(_READERS)}: take a checkpoint in one of those, or the unquantized one and quantize it with optc"
        )
    return _READERS[method](config, path)


def expand(folder: Path, files: list[Path], found: Format, skeleton: nn.Module, dtype: torch.dtype) -> Expanded:
    """Read the weights module by module; what is quantized becomes `dtype`.

    Args:
        folder: the checkpoint.
        files: its safetensors files.
        found: their format.
        skeleton: the model without weights, for the classes of its modules.
        dtype: of the model.

    Raises:
        CheckpointError: a tensor is missing, damaged, or is not what quantization_config says; names it.
    """
    kinds = {name: type(module).__name__ for name, module in skeleton.named_modules()}
    result = Expanded({}, {})
    with ExitStack() as stack:
        modules = _modules([stack.enter_context(safetensors.safe_open(path, "pt")) for path in files])
        for name, tensors in modules.items():
            kind = kinds.get(name, "Linear")
            if found.is_coded({leaf: kept.dtype for leaf, kept in tensors.items()}):
                read = {leaf: kept.read for leaf, kept in tensors.items()}
                given = found.read(QuantizedModule(str(folder), name, kind, read))
                result.weights[f"{name}.weight"] = given
                value = given.stored.dequantize().to(dtype)
                # GPT-2's Conv1D keeps its weight as [inputs, outputs].
                result.tensors[f"{name}.weight"] = value.t().contiguous() if kind == "Conv1D" else value
                tensors = {leaf: kept for leaf, kept in tensors.items() if leaf not in found.leaves}
            else:
                _refuse_strays(folder, name, tensors, found)
            others = {_join(name, leaf): kept.read() for leaf, kept in tensors.items() if leaf not in _UNUSED}
            result.tensors.update(others)
    if not result.weights:
        raise CheckpointError(
            f"{folder}: quantization_config says {found.label}, and no weight is stored so; remove the config's entry if the "
            "weights are unquantized"
        )
    return result


def match_parameters(
    expanded: Expanded, model: nn.Module, label: str, experts: Mapping[str, Sequence[str]]
) -> tuple[dict[str, GivenWeight], tuple[str, ...]]:
    """The quantized weights by the names of the model's parameters, and a note on those that are none of them.

    A parameter is the weight that was read if it is that very tensor: transformers renames weights, and merges some, such
    as those of experts, into others. Those of experts are stacked as the model has them; others that are merged stay
    expanded in the model's dtype.

    Args:
        expanded: the checkpoint.
        model: that was loaded from it.
        label: what the user calls the format.
        experts: names of the model's parameters [G, N, K] -> the checkpoint's weights in them, in the order of their rows.
    """
    by_address = {parameter.data_ptr(): name for name, parameter in model.named_parameters()}
    matched = {
        by_address[pointer]: given
        for name, given in expanded.weights.items()
        if (pointer := expanded.tensors[name].data_ptr()) in by_address
    }
    found = {name for name in expanded.weights if expanded.tensors[name].data_ptr() in by_address}
    parameters = dict(model.named_parameters())
    for name, parts in experts.items():
        if all(part in expanded.weights for part in parts):
            stacked = stack([expanded.weights[part] for part in parts])
            if stacked is not None and _holds(parameters[name], stacked):
                matched[name] = stacked
                found |= set(parts)
    merged = [name for name in expanded.weights if name not in found]
    if not merged:
        return matched, ()
    return matched, (
        f"{label}: {len(merged)} of {len(expanded.weights)} quantized weights, among them {merged[0]}, are parts of larger "
        "ones in the model that cannot hold their codes, and stored in its dtype",
    )


def _holds(parameter: Tensor, given: GivenWeight) -> bool:
    """Whether a parameter is what the codes mean: that it was merged as the codes were stacked."""
    value = given.stored.dequantize().to(parameter.dtype)
    return value.numel() == parameter.numel() and torch.equal(value.view_as(parameter), parameter)


@dataclass(frozen=True)
class _Kept:
    """A tensor in a file: its dtype as safetensors names it, and what reads it."""

    dtype: str
    read: Callable[[], Tensor] = field(repr=False)


def _modules(files: list[Any]) -> dict[str, dict[str, _Kept]]:
    """Module name -> last part of the name -> tensor, over all files, in the order of the names."""
    found: dict[str, dict[str, _Kept]] = {}
    for opened in files:
        for name in opened.keys():  # noqa: SIM118  it is no dict
            module, _, leaf = name.rpartition(".")
            found.setdefault(module, {})[leaf] = _Kept(
                opened.get_slice(name).get_dtype(), partial(opened.get_tensor, name)
            )
    return dict(sorted(found.items()))


def _join(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if module else leaf


def _refuse_strays(folder: Path, name: str, tensors: Mapping[str, _Kept], found: Format) -> None:
    """Raises CheckpointError: scales or codes that nothing belongs to."""
    strays = sorted((set(tensors) & set(found.leaves)) - {"weight"})
    if strays:
        raise CheckpointError(
            f"{folder}: {name}.{strays[0]} is there, and the codes it belongs to are not ({found.label}); the checkpoint is "
            "incomplete, download it again"
        )


__all__ = ["Expanded", "Quantized", "expand", "find_format", "match_parameters"]
