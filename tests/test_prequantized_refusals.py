"""Quantized checkpoints that are damaged, or of a kind that cannot be read, and what cannot be done with the others."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import optc
from optc.errors import CheckpointError, OptcError, UnsupportedModelError, UsageError
from optc.optimizer.checkpoint import load_checkpoint

from .families import load_reference
from .prequantized_cases import AWQ_CONFIG, Codes, Tensors, make_awq, random_weights, write


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    return random_weights(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def awq(plain: Tensors, tmp_path: Path) -> Path:
    return write(tmp_path / "awq", make_awq(plain, {}), AWQ_CONFIG)


def edited(folder: Path, change: Callable[[Tensors], object]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


FIRST = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{FIRST}.scales"), r"down_proj has qweight, qzeros and no scales"),
        (lambda t: t.pop(f"{FIRST}.qweight"), r"down_proj\.qzeros is there, and the codes it belongs to are not"),
        (lambda t: [t.pop(f"{FIRST}.{leaf}") for leaf in ("qweight", "qzeros", "scales")], r"lacks 1 weights of Llama"),
        (lambda t: t.update({f"{FIRST}.scales": t[f"{FIRST}.scales"][:2].clone()}), r"scales is float16 \[2, 64\], expected"),
        (lambda t: t.update({f"{FIRST}.qweight": t[f"{FIRST}.qweight"][:80].clone()}), r"80 inputs, which the groups of 32"),
        (lambda t: t.update({f"{FIRST}.qzeros": t[f"{FIRST}.qzeros"].long()}), r"qzeros is int64 \[3, 8\], expected int32"),
        (lambda t: t[f"{FIRST}.scales"].fill_(float("nan")), r"down_proj has scales that are NaN or Inf"),
        (lambda t: t.update({f"{FIRST}.qweight": t[f"{FIRST}.qweight"][:64].clone(),
                             f"{FIRST}.qzeros": t[f"{FIRST}.qzeros"][:2].clone(),
                             f"{FIRST}.scales": t[f"{FIRST}.scales"][:2].clone()}),
         r"down_proj\.weight is \[64, 64\], the config makes it \[64, 96\]"),
    ],
)  # fmt: skip
def test_damaged_weights_are_named(
    change: Callable[[Tensors], object], message: str, awq: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(str(edited(awq, change)))


def test_a_truncated_file(awq: Path, tmp_path: Path) -> None:
    content = (awq / "model.safetensors").read_bytes()
    (awq / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="truncated or corrupt safetensors file"):
        load_checkpoint(str(awq))


def test_the_group_size_of_another_checkpoint(plain: Tensors, tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "awq", make_awq(plain, {}), {**AWQ_CONFIG, "group_size": 16})
    with pytest.raises(CheckpointError, match=r"qzeros is int32 \[3, 8\], expected int32 \[6, 8\]"):
        load_checkpoint(str(checkpoint))


def refusals() -> Iterator[Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}
    ct = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"}
    weights = group["weights"]
    for config, message in [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"quantized by bitsandbytes; optc reads awq, gptq"),
        ({"load_in_8bit": True}, r"quantized by bitsandbytes"),
        ({"quant_method": "mxfp4"}, r"quantized by mxfp4"),
        ({"quant_method": "torchao"}, r"quantized by torchao"),
        ({"bits": 4}, r"a method that quantization_config does not name"),
        ({**AWQ_CONFIG, "version": "gemv"}, r"AWQ in the layout gemv; optc reads gemm"),
        ({**AWQ_CONFIG, "backend": "llm-awq"}, r"AWQ in the layout llm-awq"),
        ({**AWQ_CONFIG, "bits": 8}, r"AWQ with 8 bits"),
        ({"quant_method": "gptq", "bits": 2, "group_size": 32}, r"GPTQ with 2 bits; optc reads 3, 4 and 8 bits"),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"},
            r"GPTQ in the layout marlin",
        ),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "pack_dtype": "int16"}, r"GPTQ packed into int16"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"a": {"bits": 2}}}, r"GPTQ with 2 bits"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, r"FP8 as e5m2"),
        (
            {**ct, "config_groups": {"g": group}, "format": "nvfp4-pack-quantized"},
            r"with nvfp4-pack-quantized; optc reads",
        ),
        ({**ct, "config_groups": {"g": group}, "quantization_status": "frozen"}, r"pack-quantized \(frozen\)"),
        ({**ct, "config_groups": {"g": group}, "sparsity_config": {"format": "sparse-24-bitmask"}}, r"sparse weights"),
        ({**ct, "config_groups": {"g": group}, "transform_config": {"config_groups": {"r": {}}}}, r"rotations"),
        ({**ct, "config_groups": {"g": {**group, "weights": {**weights, "num_bits": 6}}}}, r"with 6 bits"),
        (
            {**ct, "config_groups": {"g": {**group, "weights": {**weights, "type": "float"}}}},
            r"float weights of 4 bits",
        ),
        (
            {**ct, "config_groups": {"g": {**group, "weights": {**weights, "strategy": "tensor_group"}}}},
            r"by tensor_group",
        ),
    ]:
        yield pytest.param(config, UnsupportedModelError, message, id=message[:40])
    for config, message in [
        ({"quant_method": "awq", "bits": "four", "group_size": 32}, r"has bits 'four', expected an integer"),
        ("int8", r"quantization_config is a str, expected an object"),
        ({**ct, "config_groups": {}}, r"has no config_groups"),
        ({**ct, "config_groups": {"g": {"targets": ["Linear"]}}}, r"the config group g has no weights or no targets"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size \[128\], expected two integers"),
    ]:
        yield pytest.param(config, CheckpointError, message, id=message[:40])


@pytest.mark.parametrize(("config", "kind", "message"), list(refusals()))
def test_what_cannot_be_read_is_refused_before_the_weights(
    config: Any, kind: type[OptcError], message: str, tmp_path: Path
) -> None:
    checkpoint = write(tmp_path / "checkpoint", {"x": torch.zeros(1)}, config)
    with pytest.raises(kind, match=message):
        load_checkpoint(str(checkpoint))


def test_weights_that_are_not_quantized_after_all(plain: Tensors, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="says AWQ, 4 bits, groups of 32, and no weight is stored so"):
        load_checkpoint(str(write(tmp_path / "a", plain, AWQ_CONFIG)))


@pytest.mark.parametrize("quantize", ["int4", "int8", "w4a16-g32"])
def test_a_quantized_checkpoint_is_not_quantized_again(quantize: str, awq: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"already quantized \(AWQ, 4 bits, groups of 32\); compile it as it is"):
        optc.compile(awq, tmp_path / "a.optc", backend="eager", quantize=quantize)


def test_a_quantized_checkpoint_takes_no_adapter(awq: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="an adapter cannot be merged into codes"):
        optc.compile(awq, tmp_path / "a.optc", backend="eager", adapter=tmp_path)


def test_an_expanded_checkpoint_saves_as_an_unquantized_one(plain: Tensors, tmp_path: Path) -> None:
    written: dict[str, Codes] = {}
    checkpoint = write(tmp_path / "awq", make_awq(plain, written), AWQ_CONFIG)
    model = load_checkpoint(str(checkpoint)).model
    model.save_pretrained(tmp_path / "expanded")
    assert "quantization_config" not in json.loads((tmp_path / "expanded/config.json").read_text())
    again = load_reference(tmp_path / "expanded")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
