"""Checkpoints that other tools quantized: their codes and scales arrive in the artifact to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from optc.optimizer.checkpoint import load_checkpoint
from optc.optimizer.quantization import given_recipe, given_weights
from optc.optimizer.targets import find_target
from optc.passes.quantize.given import name_schemes
from optc.passes.quantize.recipe import Recipe
from optc.runtime.artifact import open_artifact
from optc.runtime.ops.quantized import FP8
from optc.runtime.unpack import unpack

from .families import save_model
from .prequantized_cases import (
    AWQ_CONFIG,
    CONFIG,
    Codes,
    Tensors,
    check_compiled,
    gptq_tensors,
    logits,
    make_awq,
    meaning,
    random_codes,
    random_weights,
    read,
    replace_projections,
    same_bits,
    stored_in,
    weights_of,
    write,
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    return random_weights(tmp_path_factory.mktemp("plain"))


GPTQ_CASES = [
    # bits, group, symmetric, act-order, version
    (4, 32, True, False, 1),
    (4, 32, False, False, 1),
    (4, 32, False, True, 2),
    (4, -1, True, False, 1),
    (4, 32, True, True, 1),
    (3, 32, True, False, 1),
    (3, 32, False, True, 2),
    (8, 32, True, False, 2),
    (8, 32, False, False, 1),
]


@pytest.mark.parametrize(("bits", "group", "symmetric", "act_order", "version"), GPTQ_CASES)
def test_gptq(
    bits: int, group: int, symmetric: bool, act_order: bool, version: int, plain: Tensors, tmp_path: Path
) -> None:
    written: dict[str, tuple[Codes, Tensor]] = {}

    def make(name: str, weight: Tensor) -> Tensors:
        rows, columns = weight.shape
        size = columns if group < 0 else group
        order = torch.arange(columns) // size
        if act_order:
            order = order[torch.randperm(columns, generator=torch.Generator().manual_seed(len(written)))]
        codes = random_codes(rows, columns, bits, size, symmetric=symmetric, seed=len(written))
        written[name] = codes, order
        return gptq_tensors(codes, bits, order, version)

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order, "sym": symmetric}
    config |= {"checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
    checkpoint = write(tmp_path / "gptq", replace_projections(plain, make), config)
    found = weights_of(read(checkpoint))
    assert found.keys() == written.keys()
    half = 2 ** (bits - 1)
    for name, weight in found.items():
        (q, z, s), order = written[name]
        stored = weight.stored
        assert torch.equal(stored.unpack().codes.long() + half, q)
        assert torch.equal(stored.scale, s) and stored.scale.dtype == torch.float16
        zero = stored.unpack().zero
        assert zero is None if symmetric else torch.equal(zero.long() + half, z)
        assert (stored.group_index is not None) == act_order
        assert torch.equal(stored.dequantize(), meaning((q, z, s), order))
    if (bits, act_order, symmetric) == (4, True, False):
        check_compiled(checkpoint, tmp_path)


def test_gptq_rules_for_single_modules_and_a_quantized_head(plain: Tensors, tmp_path: Path) -> None:
    widths = {"down_proj": (8, 32), "q_proj": (4, 64), "lm_head": (4, 32), "up_proj": (3, 32)}
    written = {}

    def make(name: str, weight: Tensor) -> Tensors:
        bits, group = next((width for part, width in widths.items() if part in name), (4, 32))
        if "k_proj" in name:
            return {"weight": weight}
        order = torch.arange(weight.shape[1]) // group
        written[name] = random_codes(*weight.shape, bits, group, symmetric=True, seed=len(written)), order
        return gptq_tensors(written[name][0], bits, order, 1)

    tensors = replace_projections(plain, make)
    head = make("lm_head.weight", tensors.pop("lm_head.weight"))
    tensors |= {f"lm_head.{leaf}": value for leaf, value in head.items()}
    dynamic = {
        r"+:.*\.down_proj": {"bits": 8},
        r".*\.q_proj.*": {"group_size": 64},
        r"+:.*up_proj": {"bits": 3},
        r"-:.*\.k_proj": {},
    }
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": dynamic, "lm_head": True}
    checkpoint = write(tmp_path / "gptq", tensors, config)
    found = weights_of(read(checkpoint))
    assert found.keys() == written.keys() and "lm_head.weight" in found
    for name, weight in found.items():
        assert torch.equal(weight.stored.dequantize(), meaning(*written[name]))
    assert set(name_schemes(found).values()) == {"w4a16-g32", "w4a16-g64", "w8a16-g32", "w3a16-g32"}


def test_gptq_of_a_model_that_keeps_its_weights_transposed(tmp_path: Path) -> None:
    source = save_model("gpt2", tmp_path / "plain")
    tensors, written = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            columns, rows = tensor.shape
            written[name] = random_codes(rows, columns, 4, 32, symmetric=False, seed=len(written))
            order = torch.arange(columns) // 32
            module = name.removesuffix(".weight")
            found = gptq_tensors(written[name], 4, order, 2)
            tensors |= {f"{module}.{leaf}": value for leaf, value in found.items()}
        else:
            tensors[name] = tensor
    config = json.loads((source / "config.json").read_text())
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"}
    checkpoint = tmp_path / "quantized"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    save_file(tensors, checkpoint / "model.safetensors")
    stored = stored_in(checkpoint, tmp_path / "a.optc")
    assert stored.keys() == written.keys()
    weights = unpack(open_artifact(tmp_path / "a.optc"))
    for name, (layer, weight) in stored.items():
        value = meaning(written[name], torch.arange(weight.shape[1]) // 32)
        assert layer.transposed
        assert torch.equal(weight.dequantize(), value)
        assert torch.equal(weights[name], value.t())


@pytest.mark.parametrize("group", [32, -1])
def test_awq(group: int, plain: Tensors, tmp_path: Path) -> None:
    written: dict[str, Codes] = {}
    tensors = make_awq(plain, written, group)
    checkpoint = write(tmp_path / "awq", tensors, {**AWQ_CONFIG, "group_size": group, "modules_to_not_convert": None})
    found = weights_of(read(checkpoint))
    assert found.keys() == written.keys()
    for name, weight in found.items():
        q, z, s = written[name]
        size = q.shape[1] if group < 0 else group
        unpacked = weight.stored.unpack()
        assert torch.equal(unpacked.codes.long() + 8, q) and torch.equal(unpacked.zero.long() + 8, z)
        assert torch.equal(unpacked.scale, s)
        assert torch.equal(unpacked.dequantize(), meaning((q, z, s), torch.arange(q.shape[1]) // size))
    assert set(name_schemes(found).values()) == {"w4a16-g32-asym" if group > 0 else "w4a16-channel-asym"}
    if group > 0:
        check_compiled(checkpoint, tmp_path)


def test_the_scales_stay_as_they_are_in_a_model_of_another_dtype(plain: Tensors, tmp_path: Path) -> None:
    written: dict[str, Codes] = {}
    checkpoint = write(tmp_path / "awq", make_awq(plain, written), AWQ_CONFIG)
    found = read(checkpoint, dtype="bfloat16")
    assert all(torch.equal(weight.stored.scale, written[name][2]) for name, weight in weights_of(found).items())
    assert found.model.dtype == torch.bfloat16


@pytest.mark.parametrize("target", ["native", "h100"])
def test_fp8_blocks_with_ragged_edges(target: str, plain: Tensors, tmp_path: Path) -> None:
    written: dict[str, Tensors] = {}

    def make(name: str, weight: Tensor) -> Tensors:
        rows, columns = weight.shape
        scale = torch.rand(-(-rows // 40), -(-columns // 48), generator=torch.Generator().manual_seed(len(written)))
        codes = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(len(written))) * 50).to(FP8)
        written[name] = {"weight": codes, "weight_scale_inv": (scale + 0.1) / 5000}
        return written[name]

    config = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [40, 48],
        "modules_to_not_convert": ["lm_head"],
    }
    checkpoint = write(tmp_path / "fp8", replace_projections(plain, make), config, dtype="bfloat16")
    found = stored_in(checkpoint, tmp_path / "a.optc", target=target, verify=target == "native")
    assert found.keys() == written.keys()
    for name, (layer, stored) in found.items():
        codes, scale = written[name]["weight"], written[name]["weight_scale_inv"]
        assert torch.equal(stored.weight.view(torch.int8), codes.view(torch.int8))
        assert torch.equal(stored.scale, scale) and stored.scale.dtype == torch.float32
        value = torch.stack(
            [codes[n].float() * scale[n // 40, torch.arange(codes.shape[1]) // 48] for n in range(len(codes))]
        )
        assert torch.equal(stored.dequantize(), value)
        assert layer.scheme == "given-0"
    manifest = open_artifact(tmp_path / "a.optc").manifest
    assert manifest.quantization is not None
    activation = manifest.quantization.schemes["given-0"].activation
    assert activation == ("none" if target == "native" else "fp8-group48")
    assert any("not rounded to FP8" in note for note in manifest.model.notes) == (target == "native")
    if target == "native":
        ids = torch.arange(10)[None]
        expected = load_checkpoint(str(checkpoint), dtype="float32").model(ids).logits
        assert (logits(tmp_path / "a.optc", ids) - expected).abs().max() < 0.03 * expected.abs().max(), "bfloat16"


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_fp8_with_one_scale_a_weight(scheme: str, plain: Tensors, tmp_path: Path) -> None:
    def make(name: str, weight: Tensor) -> Tensors:
        extra = {"input_scale": torch.tensor(0.01)} if scheme == "static" else {}
        return {"weight": (weight * 100).to(FP8), "weight_scale": torch.tensor(0.01), **extra}

    config = {"quant_method": "fp8", "activation_scheme": scheme}
    checkpoint = write(tmp_path / "fp8", replace_projections(plain, make), config)
    found = weights_of(read(checkpoint))
    assert len(found) == 7 * CONFIG.num_hidden_layers
    for weight in found.values():
        assert weight.stored.scale.tolist() == [[pytest.approx(0.01)]]
        assert weight.scheme.activation == ("fp8-static" if scheme == "static" else "fp8-token")
        assert (
            weight.input_scale is None if scheme == "dynamic" else weight.input_scale.tolist() == [pytest.approx(0.01)]
        )
    assert set(name_schemes(found).values()) == {"fp8-tensor" if scheme == "static" else "given-0"}


def test_the_kv_cache_of_the_checkpoint_and_of_the_user(plain: Tensors, tmp_path: Path) -> None:
    def make(name: str, weight: Tensor) -> Tensors:
        scale = weight.abs().amax(1, keepdim=True) / 127
        extra = {"k_scale": torch.tensor(0.1)} if "k_proj" in name else {}
        return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale, **extra}

    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    config = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True},
    }
    checkpoint = write(tmp_path / "int8", replace_projections(plain, make), config)
    stored_in(checkpoint, tmp_path / "a.optc", verify=False)
    manifest = open_artifact(tmp_path / "a.optc").manifest
    assert {spec.dtype for spec in manifest.kv_cache} == {"float8_e4m3fn"}
    assert any("the KV cache is fp8, as the checkpoint says" in note for note in manifest.model.notes)
    quantized = read(checkpoint).quantized
    assert quantized is not None
    asked = Recipe(kv_cache="int8")
    assert given_recipe(quantized, asked).kv_cache == "int8"
    assert given_weights(quantized, find_target("native"), asked)[1] == []


def experts_checkpoint(folder: Path, quantization: dict[str, Any], make: Callable[[int, Tensor], Tensors]) -> Path:
    """A Mixtral whose projections and experts are what `make` gives for their number and their plain weight."""
    source = save_model("mixtral", folder / "plain")
    tensors: Tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if ".experts." in name or "_proj" in name:
            made = make(len(tensors), tensor)
            tensors |= {f"{name.removesuffix('.weight')}.{leaf}": value for leaf, value in made.items()}
        else:
            tensors[name] = tensor
    (folder / "quantized").mkdir()
    config = json.loads((source / "config.json").read_text())
    (folder / "quantized" / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    save_file(tensors, folder / "quantized" / "model.safetensors")
    return folder / "quantized"


def gptq_experts(number: int, tensor: Tensor) -> Tensors:
    codes = random_codes(*tensor.shape, 4, 32, symmetric=False, seed=number)
    return gptq_tensors(codes, 4, torch.arange(tensor.shape[1]) // 32, 1)


def fp8_experts(number: int, tensor: Tensor) -> Tensors:
    """In blocks of 32 x 32, which divide every weight."""
    generator = torch.Generator().manual_seed(number)
    scale = torch.rand(tensor.shape[0] // 32, tensor.shape[1] // 32, generator=generator) * 0.02 + 0.01
    return {"weight": torch.randn(tensor.shape, generator=generator).to(FP8), "weight_scale_inv": scale}


def fp8_experts_with_one_scale(number: int, tensor: Tensor) -> Tensors:
    generator = torch.Generator().manual_seed(number)
    codes = torch.randn(tensor.shape, generator=generator).to(FP8)
    return {"weight": codes, "weight_scale": torch.rand(1, generator=generator) * 0.02 + 0.01}


_FP8_TENSOR = {"weights": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}}
EXPERTS: dict[str, tuple[dict[str, Any], Callable[[int, Tensor], Tensors]]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32}, gptq_experts),
    "fp8 blocks": ({"quant_method": "fp8", "weight_block_size": [32, 32]}, fp8_experts),
    "fp8 with one scale each": (
        {
            "quant_method": "compressed-tensors",
            "format": "naive-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], **_FP8_TENSOR}},
        },
        fp8_experts_with_one_scale,
    ),
}


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_are_stacked_as_the_model_has_them(case: str, tmp_path: Path) -> None:
    checkpoint = experts_checkpoint(tmp_path, *EXPERTS[case])
    found = read(checkpoint)
    assert not any("parts of larger ones" in note for note in found.notes)
    experts = {name: weight for name, weight in weights_of(found).items() if ".experts." in name}
    assert len(experts) == 4 and len(weights_of(found)) == 12
    stored = stored_in(checkpoint, tmp_path / "compiled.optc", verify=False)
    assert all(same_bits(weight, weights_of(found)[name].stored) for name, (_, weight) in stored.items())
    assert {name for name, (layer, _) in stored.items() if layer.experts == 4} == set(experts)
    ids = torch.randint(0, 160, (1, 12), generator=torch.Generator().manual_seed(3))
    expected = found.model.float()(ids).logits
    assert (logits(tmp_path / "compiled.optc", ids) - expected).abs().max() < 1e-2 * expected.abs().max()


def test_experts_that_one_matrix_cannot_hold_are_expanded_and_said_so(tmp_path: Path) -> None:
    """Each expert has the columns in another order."""

    def make(number: int, tensor: Tensor) -> Tensors:
        codes = random_codes(*tensor.shape, 4, 32, symmetric=True, seed=number)
        order = torch.randperm(tensor.shape[1], generator=torch.Generator().manual_seed(number)) // 32
        return gptq_tensors(codes, 4, order, 1)

    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
    found = read(experts_checkpoint(tmp_path, quantization, make))
    assert all("self_attn" in name for name in weights_of(found)) and weights_of(found)
    assert any("that cannot hold their codes, and stored in its dtype" in note for note in found.notes)
