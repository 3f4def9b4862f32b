"""Checkpoints that other tools quantized: their codes and scales arrive in the artifact to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig

import optc
from optc.errors import CheckpointError, OptcError, UnsupportedModelError, UsageError
from optc.optimizer.checkpoint import Checkpoint, load_checkpoint
from optc.optimizer.quantization import given_recipe, given_weights
from optc.optimizer.targets import find_target
from optc.passes.quantize.given import GivenWeight, name_schemes
from optc.passes.quantize.recipe import Recipe
from optc.runtime.artifact import open_artifact
from optc.runtime.manifest import QuantizedLayer
from optc.runtime.ops.quantized import FP8, StoredWeight
from optc.runtime.unpack import stored_weights, unpack

from .families import load_reference, save_model

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


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    """The weights of a small Llama in float16."""
    folder = tmp_path_factory.mktemp("plain")
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


def make_awq(plain: Tensors, written: dict[str, Codes], group: int = 32, **options: Any) -> Tensors:
    def make(name: str, weight: Tensor) -> Tensors:
        size = weight.shape[1] if group < 0 else group
        written[name] = random_codes(*weight.shape, 4, size, symmetric=False, seed=len(written), **options)
        return awq_tensors(written[name])

    return replace_projections(plain, make)


AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


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


# Files that compressed-tensors itself wrote.

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


# Refusals.


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
