"""Checkpoints that compressed-tensors itself wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from optc.errors import CheckpointError
from optc.optimizer.checkpoint import load_checkpoint
from optc.passes.quantize.given import name_schemes

from .prequantized_cases import CONFIG, Tensors, is_projection, read, weights_of

LIBRARY_CASES: dict[str, dict[str, Any]] = {
    "pack-quantized 4 bits": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 32}},
    "pack-quantized 4 bits asymmetric": {
        "weights": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}
    },
    "pack-quantized 3 bits a row asymmetric": {"weights": {"num_bits": 3, "strategy": "channel", "symmetric": False}},
    "pack-quantized 8 bits": {"weights": {"num_bits": 8, "strategy": "channel"}},
    "pack-quantized 8 bits asymmetric": {
        "weights": {"num_bits": 8, "strategy": "group", "group_size": 32, "symmetric": False}
    },
    "int-quantized": {
        "weights": {"num_bits": 8, "strategy": "channel"},
        "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True},
    },
    "int-quantized 4 bits": {
        "weights": {"num_bits": 4, "strategy": "group", "group_size": 32},
        "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True},
    },
    "int-quantized asymmetric static": {
        "weights": {"num_bits": 8, "strategy": "tensor", "symmetric": False},
        "input_activations": {"num_bits": 8, "strategy": "tensor"},
    },
    "float-quantized dynamic": {
        "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
        "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
    },
    "float-quantized static": {
        "weights": {"num_bits": 8, "type": "float", "strategy": "tensor"},
        "input_activations": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    },
    "float-quantized blocks": {
        "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 32]},
        "input_activations": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "dynamic": True},
    },
    "naive-quantized": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}},
}


def library_checkpoint(folder: Path, groups: dict[str, Any], dtype: torch.dtype = torch.float16) -> Tensors:
    """A small Llama that compressed-tensors quantized and wrote; gives the weights as it dequantizes them."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=dtype)
    config = {"config_groups": groups, "ignore": ["lm_head"], "quantization_status": "frozen"}
    apply_quantization_config(model, QuantizationConfig.model_validate(config))
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        args, weight = scheme.weights, module.weight.detach()
        rows, columns = weight.shape
        down, across = {
            "tensor": (rows, columns),
            "channel": (1, columns),
            "group": (1, args.group_size),
            "block": args.block_structure,
        }[args.strategy]
        blocks = weight.unflatten(0, (-1, down)).unflatten(2, (-1, across))
        scale, zero = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), args)
        module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))
        if hasattr(module, "input_scale"):
            module.input_scale.data.fill_(0.02)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    compressor.decompress_model(model)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if name.endswith(".weight")}


@pytest.mark.parametrize("case", LIBRARY_CASES)
def test_what_compressed_tensors_wrote(case: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    group = {"targets": ["Linear"], **LIBRARY_CASES[case]}
    expected = library_checkpoint(tmp_path / "checkpoint", {"group_0": group})
    config = json.loads((tmp_path / "checkpoint/config.json").read_text())["quantization_config"]
    assert config["format"] == case.split()[0]
    files = load_file(tmp_path / "checkpoint/model.safetensors")
    found = weights_of(read(tmp_path / "checkpoint"))
    assert sorted(found) == sorted(name for name in expected if is_projection(name))
    for name, weight in found.items():
        module, stored = name.removesuffix(".weight"), weight.stored
        assert torch.equal(stored.scale.flatten(), files[f"{module}.weight_scale"].flatten())
        packed = files.get(f"{module}.weight_packed")
        if packed is not None and stored.args.num_bits < 8:
            assert torch.equal(stored.weight, packed)
        elif packed is None and stored.args.num_bits == 8:
            assert torch.equal(stored.weight.view(torch.int8), files[name].view(torch.int8))
        assert torch.equal(stored.dequantize().half(), expected[name])
        assert (weight.input_scale is not None) == ("static" in case)
        assert (weight.input_activations is not None) == ("input_activations" in LIBRARY_CASES[case])


def test_several_config_groups(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    groups = {
        "group_0": {
            "targets": [r"re:.*(up|gate)_proj$", "model.layers.0.mlp.down_proj"],
            "weights": {"num_bits": 4, "strategy": "group", "group_size": 32},
        },
        "group_1": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "strategy": "channel"},
            "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True},
        },
    }
    expected = library_checkpoint(tmp_path / "checkpoint", groups)
    found = weights_of(read(tmp_path / "checkpoint"))
    schemes = name_schemes(found)
    for name, weight in found.items():
        packed = any(part in name for part in ("up_proj", "gate_proj", "layers.0.mlp.down_proj"))
        assert schemes[weight.scheme] == ("w4a16-g32" if packed else "w8a8"), name
        assert torch.equal(weight.stored.dequantize().half(), expected[name])


def test_the_model_is_the_one_that_transformers_loads_with_compressed_tensors(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    group = {"targets": ["Linear"], **LIBRARY_CASES["pack-quantized 4 bits asymmetric"]}
    library_checkpoint(tmp_path / "checkpoint", {"group_0": group}, torch.bfloat16)
    # Compressed, transformers 5.23 with compressed-tensors 0.20 takes no zero points.
    expand = CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "checkpoint", dtype=torch.bfloat16, quantization_config=expand
    )
    ids = torch.arange(8)[None]
    expected = theirs(ids).logits
    ours = load_checkpoint(str(tmp_path / "checkpoint")).model
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs.state_dict()[name]), name
    assert torch.equal(ours(ids).logits, expected)


def test_a_config_that_ignores_what_is_quantized(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    library_checkpoint(tmp_path / "a", {"g": {"targets": ["Linear"], **LIBRARY_CASES["pack-quantized 4 bits"]}})
    config = json.loads((tmp_path / "a/config.json").read_text())
    config["quantization_config"]["ignore"] = ["re:.*down_proj"]
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.mlp\.down_proj is quantized, and quantization_config ignores it"
    ):
        load_checkpoint(str(tmp_path / "a"))
