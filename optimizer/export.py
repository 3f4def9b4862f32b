"""From an artifact to a checkpoint that other tools load: `optc export`.

Codes and scales go out to the bit. What the other format has no place for is refused by name; what only some of its
readers can run is said.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..runtime.artifact import Artifact, open_artifact
from ..runtime.manifest import Manifest, QuantizedLayer
from ..runtime.ops.quantized import StoredWeight, pack_bits
from ..runtime.scheme import QuantizationArgs, Scheme
from ..runtime.unpack import plain_weights, stored_weights
from .checkpoint import load_skeleton, read_json
from .names import CheckpointNames, checkpoint_names
from .package import CHECKPOINT_FOLDER, write_checkpoint, writing

FORMATS = ("compressed-tensors",)

# Modules that vLLM computes as one, which therefore must have one scheme.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def export(artifact: Path | str, output: Path | str, *, format: str = "compressed-tensors") -> tuple[str, ...]:
    """Write the model of an artifact as a checkpoint in Hugging Face format.

    Args:
        artifact: folder that `optc compile` wrote, of a checkpoint.
        output: folder to write; it must not exist.
        format: how quantized weights are stored: compressed-tensors.

    Returns:
        What a reader of the checkpoint should know, such as which tools cannot run it.

    Raises:
        UsageError: an unknown format, an existing output, or an artifact that the format has no place for.
        ArtifactError: the artifact cannot be read, or the checkpoint cannot be written.
    """
    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    output = Path(output)
    if output.exists():
        raise UsageError(f"{output} exists; choose another -o")
    opened = open_artifact(artifact)
    if f"{CHECKPOINT_FOLDER}/config.json" not in opened.manifest.files:
        raise UsageError(f"{artifact}: was compiled from a module; only the artifacts of checkpoints are exported")
    stored = {layer.record.name: layer for layer in _layers(opened)}
    names = checkpoint_names(load_skeleton(opened.file(CHECKPOINT_FOLDER)), plain_weights(opened), stored)
    layers = {names.modules[name]: layer for name, layer in stored.items()}
    tensors = dict(names.plain)
    for module, layer in layers.items():
        tensors |= {f"{module}.{leaf}": value for leaf, value in layer.tensors().items()}
    with writing(output, force=False) as folder:
        write_checkpoint(folder, tensors)
        _write_files(folder, opened, _quantization_config(layers, names))
    return _remarks(layers, opened.manifest)


@dataclass(frozen=True)
class _Layer:
    """A quantized weight, its record and its scheme, and its static scale of activations if it has one."""

    record: QuantizedLayer
    weight: StoredWeight = field(repr=False)
    scheme: Scheme
    input_scale: Tensor | None = field(repr=False)

    @property
    def layout(self) -> str:
        """What compressed-tensors calls the layout it gives to weights of this scheme."""
        if self.scheme.weights.type == "float":
            return "float-quantized" if self.scheme.input_activations else "naive-quantized"
        return "int-quantized" if self.scheme.input_activations else "pack-quantized"

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of its module, by the last parts of their names."""
        unpacked, bits = self.weight.unpack(), self.scheme.weights.num_bits
        scale = self.weight.scale.reshape(1) if self.scheme.weights.strategy == "tensor" else self.weight.scale
        found = {"weight_scale": scale}
        if self.layout == "pack-quantized":
            found["weight_packed"] = pack_bits(unpacked.codes, bits)
            found["weight_shape"] = torch.tensor(self.weight.shape)
        else:
            found["weight"] = unpacked.codes
        if unpacked.zero is not None:
            is_packed = self.layout == "pack-quantized"
            found["weight_zero_point"] = pack_bits(unpacked.zero.t(), bits).t() if is_packed else unpacked.zero
        if self.input_scale is not None:
            found["input_scale"] = self.input_scale
        return found


def _layers(artifact: Artifact) -> list[_Layer]:
    """Raises UsageError: nothing is quantized, or something that compressed-tensors has no place for."""
    quantization = artifact.manifest.quantization
    if quantization is None or not quantization.layers:
        raise UsageError(
            f"{artifact.path}: none of its weights is quantized; the checkpoint it was compiled from says all that it does"
        )
    constants, found = artifact.constants(), []
    for record, weight in stored_weights(artifact):
        scheme = quantization.schemes[record.scheme]
        if reason := _has_no_place(record, weight, scheme):
            raise UsageError(f"{record.name} cannot be exported to compressed-tensors: {reason}")
        input_scale = record.constants.get("input_scale")
        found.append(_Layer(record, weight, scheme, constants[input_scale] if input_scale else None))
    return found


def _has_no_place(record: QuantizedLayer, weight: StoredWeight, scheme: Scheme) -> str | None:
    """Why compressed-tensors has no place for a weight, and the way out."""
    if record.experts is not None:
        return (
            "its readers take the experts of a layer in as many ways as there are models; compile with experts in full "
            'precision, by a recipe with the rule {name: "*.experts.*", scheme: none}'
        )
    if record.transposed:
        return "its model keeps it as [inputs, outputs], and only the weights of Linear layers are quantized there"
    if record.role == "embedding":
        return "its readers take embeddings in full precision; compile with the embedding so"
    if weight.group_index is not None:
        return "a group index (act-order) was removed from the format; quantize the unquantized checkpoint with --algorithm gptq"
    if weight.zero is not None and weight.zero.is_floating_point():
        return "its zero points are no integers (hqq); compile with another --algorithm"
    activations, columns = scheme.input_activations, weight.shape[1]
    sizes = (scheme.weights.group_size, activations.group_size if activations is not None else None)
    for size in sizes:
        if size is not None and columns % size:
            return (
                f"its {columns} inputs are no multiple of the {size} that share a scale; compile with a scheme by rows"
            )
    return None


def _quantization_config(layers: Mapping[str, _Layer], names: CheckpointNames) -> dict[str, Any]:
    """The quantization_config for these weights, by the names of the checkpoint's modules."""
    by_scheme: dict[str, list[str]] = {}
    for module, layer in layers.items():
        by_scheme.setdefault(layer.record.scheme, []).append(module)
    groups = {}
    for i, (_, modules) in enumerate(sorted(by_scheme.items())):
        layer, scheme = layers[modules[0]], layers[modules[0]].scheme
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if len(by_scheme) == 1 else modules,
            "weights": _arguments(scheme.weights),
            "input_activations": _arguments(scheme.input_activations) if scheme.input_activations else None,
            "output_activations": None,
            "format": layer.layout,
        }
    layouts = {layer.layout for layer in layers.values()}
    matrices = [
        name.removesuffix(".weight")
        for name, value in names.plain.items()
        if name.endswith(".weight") and value.dim() == 2
    ]
    return {
        "quant_method": "compressed-tensors",
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted({*matrices, *names.tied}),
        "kv_cache_scheme": None,
    }


def _arguments(args: QuantizationArgs) -> dict[str, Any]:
    return {name: value for name, value in args.model_dump(mode="json").items() if name != "actorder"}


def _write_files(folder: Path, artifact: Artifact, quantization: dict[str, Any]) -> None:
    """config.json, the tokenizer and the generation defaults."""
    names = [name for name in artifact.manifest.files if name.startswith(f"{CHECKPOINT_FOLDER}/")]
    if tokenizer := artifact.manifest.tokenizer:
        names += [name for name in (tokenizer.tokenizer, tokenizer.chat_template) if name is not None]
    for name in names:
        shutil.copyfile(artifact.file(name), folder / Path(name).name)
    config = read_json(folder / "config.json")
    config.pop("torch_dtype", None)  # what older checkpoints call it
    config |= {"dtype": artifact.manifest.model.dtype, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _remarks(layers: Mapping[str, _Layer], manifest: Manifest) -> tuple[str, ...]:
    """What readers of the checkpoint cannot do, and what of the artifact is not in it."""
    found, values = [], list(layers.values())
    quantization, dtype = manifest.quantization, getattr(torch, manifest.model.dtype)
    if quantization is not None and quantization.kv_cache_scheme is not None:
        found.append(
            "the checkpoint says nothing of the KV cache: choose its dtype where you serve it (vLLM: --kv-cache-dtype)"
        )
    rounded = [layer for layer in values if not torch.equal(layer.weight.scale, layer.weight.scale.to(dtype))]
    if rounded:
        found.append(
            f"{len(rounded)} weights have scales in {str(rounded[0].weight.scale.dtype).removeprefix('torch.')}, which "
            f"transformers rounds to the model's {manifest.model.dtype}"
        )
    asymmetric = [layer for layer in values if layer.weight.zero is not None]
    if any(layer.layout == "pack-quantized" for layer in asymmetric):
        several = len({layer.record.scheme for layer in values}) > 1
        found.append(
            "transformers does not load weights with zero points beside other schemes"
            if several
            else "weights with zero points: transformers loads them by quantization_config=CompressedTensorsConfig(dequantize=True)"
        )
    if any(layer.scheme.input_activations for layer in asymmetric):
        found.append("vLLM takes no weights with zero points where activations are rounded")
    if any(layer.layout == "pack-quantized" and layer.scheme.weights.num_bits == 3 for layer in values):
        found.append("older versions of vLLM take 4 and 8 bits only; there are weights of 3 bits")
    if any(layer.scheme.input_activations and layer.scheme.input_activations.strategy == "group" for layer in values):
        found.append(
            "activations are rounded in groups, for which vLLM has no kernels; --scheme w4a16-g128 or w8a8 suits it"
        )
    if any(layer.scheme.weights.num_bits < 8 and layer.scheme.input_activations for layer in values):
        found.append("vLLM runs 4-bit weights with INT8 activations on some processors only")
    if any(layer.record.role == "lm_head" for layer in values):
        found.append("lm_head is quantized, which not every version of vLLM takes")
    if manifest.model.dtype == "float32":
        found.append("the model is float32; vLLM computes in bfloat16 or float16 and rounds what is not quantized")
    for parts in _FUSED:
        for module, layer in layers.items():
            owner, _, leaf = module.rpartition(".")
            others = [layers.get(f"{owner}.{part}") for part in parts] if leaf == parts[0] else []
            if any(other is None or other.scheme != layer.scheme for other in others):
                found.append(f"vLLM wants one scheme for {', '.join(parts)} of a layer; those of {owner} differ")
                break
    return tuple(found)
