"""Checkpoints as other tools quantize them, and what the tests compare them with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import optc
from optc.optimizer.checkpoint import Checkpoint, load_checkpoint
from optc.passes.quantize.given import GivenWeight
from optc.runtime.artifact import open_artifact
from optc.runtime.manifest import QuantizedLayer
from optc.runtime.ops.quantized import StoredWeight
from optc.runtime.unpack import stored_weights

Tensors = dict[str, Tensor]
Codes = tuple[Tensor, Tensor, Tensor]
"""Codes i64[N, K] and zeros i64[N, groups] from 0, scales f16[N, groups]."""

CONFIG = LlamaConfig(
    vocab_size=160,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    dtype="float16",
)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def random_weights(folder: Path) -> Tensors:
    """The weights of a small Llama in float16, by way of `folder`."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float16).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def is_projection(name: str) -> bool:
    return name.endswith(tuple(f"{projection}.weight" for projection in PROJECTIONS))


def random_codes(rows: int, columns: int, bits: int, group: int, *, symmetric: bool, seed: int) -> Codes:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator)
    zeros = torch.randint(0, 2**bits, (rows, groups), generator=generator)
    if symmetric:
        zeros = torch.full_like(zeros, 2 ** (bits - 1))
    scales = (torch.rand(rows, groups, generator=generator) * 0.02 + 0.01) * 8 / 2**bits
    return codes, zeros, scales.half()


def meaning(codes: Codes, groups: Tensor) -> Tensor:
    """(code - zero) * scale, f32[N, K], one column after the other."""
    q, z, s = codes
    columns = [(q[:, k] - z[:, g]).float() * s[:, g].float() for k, g in enumerate(groups.tolist())]
    return torch.stack(columns, dim=1)


def pack_words(values: list[int], bits: int) -> list[int]:
    """Integers as one long number, the first lowest, cut into signed 32-bit words."""
    number = sum(value << (i * bits) for i, value in enumerate(values))
    count = -(-len(values) * bits // 32)
    words = [(number >> (32 * i)) & 0xFFFFFFFF for i in range(count)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def pack_rows(values: Tensor, bits: int) -> Tensor:
    return torch.tensor([pack_words(row, bits) for row in values.tolist()], dtype=torch.int32)


def gptq_tensors(codes: Codes, bits: int, groups: Tensor, version: int) -> Tensors:
    q, z, s = codes
    stored = (z - 1) % 2**bits if version == 1 else z
    return {
        "qweight": pack_rows(q, bits).t().contiguous(),
        "qzeros": pack_rows(stored.t(), bits),
        "scales": s.t().contiguous(),
        "g_idx": groups.to(torch.int32),
    }


def awq_tensors(codes: Codes) -> Tensors:
    def pack(values: Tensor) -> Tensor:
        words = [
            pack_words([row[8 * c + i] for i in (0, 2, 4, 6, 1, 3, 5, 7)], 4)
            for row in values.tolist()
            for c in range(len(row) // 8)
        ]
        return torch.tensor(words, dtype=torch.int32).reshape(values.shape[0], -1)

    q, z, s = codes
    return {"qweight": pack(q.t()), "qzeros": pack(z.t()), "scales": s.t().contiguous()}


def write(folder: Path, tensors: Tensors, quantization: dict[str, Any], **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG.to_dict(), "architectures": ["LlamaForCausalLM"], "quantization_config": quantization, **changes}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def replace_projections(plain: Tensors, make: Callable[[str, Tensor], Tensors]) -> Tensors:
    """The weights with those of the projections replaced by what `make` gives for them."""
    found: Tensors = {}
    for name, tensor in plain.items():
        if is_projection(name):
            module = name.removesuffix(".weight")
            found |= {f"{module}.{leaf}": value for leaf, value in make(name, tensor).items()}
        else:
            found[name] = tensor
    return found


def read(checkpoint: Path, **options: Any) -> Checkpoint:
    """The checkpoint as it is compiled, and a check that its model has the weights as their codes mean them."""
    found = load_checkpoint(str(checkpoint), **options)
    assert found.quantized is not None
    parameters = dict(found.model.named_parameters())
    for name, weight in found.quantized.weights.items():
        value = weight.stored.dequantize().to(found.model.dtype)
        if parameters[name].dim() == 3:
            value = value.view_as(parameters[name])
        assert torch.equal(parameters[name], value.t() if parameters[name].shape != value.shape else value)
    return found


def weights_of(found: Checkpoint) -> dict[str, GivenWeight]:
    assert found.quantized is not None
    return dict(found.quantized.weights)


def stored_in(checkpoint: Path, output: Path, **options: Any) -> dict[str, tuple[QuantizedLayer, StoredWeight]]:
    artifact = open_artifact(optc.compile(checkpoint, output, backend="eager", **options))
    return {layer.name: (layer, stored) for layer, stored in stored_weights(artifact)}


def same_bits(one: StoredWeight, other: StoredWeight) -> bool:
    def described(weight: StoredWeight) -> dict[str, Any]:
        return {
            name: (part.dtype, part.shape, part.contiguous().flatten().view(torch.uint8).tolist())
            for name, part in weight.tensors().items()
        }

    return described(one) == described(other)


def check_compiled(checkpoint: Path, tmp_path: Path, **options: Any) -> None:
    """The artifact holds the codes that were read, and computes what transformers does with what they mean."""
    found = read(checkpoint)
    stored = stored_in(checkpoint, tmp_path / "compiled.optc", **options)
    assert stored.keys() == weights_of(found).keys()
    assert all(same_bits(weight, weights_of(found)[name].stored) for name, (_, weight) in stored.items())
    assert {layer.algorithm for layer, _ in stored.values()} == {"given"}
    ids = torch.randint(0, CONFIG.vocab_size, (1, 12), generator=torch.Generator().manual_seed(3))
    expected = found.model.float()(ids).logits
    error = (logits(tmp_path / "compiled.optc", ids) - expected).abs().max() / expected.abs().max()
    assert error < 1e-2, "16 bits against float32"


def logits(artifact: Path, ids: Tensor) -> Tensor:
    opened = open_artifact(artifact)
    program, _ = opened.load_program(opened.manifest.score.file, opened.constants(), torch.device("cpu"))
    return program(ids, torch.arange(ids.shape[1])[None])[0].float()


def make_awq(plain: Tensors, written: dict[str, Codes], group: int = 32, **options: Any) -> Tensors:
    def make(name: str, weight: Tensor) -> Tensors:
        size = weight.shape[1] if group < 0 else group
        written[name] = random_codes(*weight.shape, 4, size, symmetric=False, seed=len(written), **options)
        return awq_tensors(written[name])

    return replace_projections(plain, make)


AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
