"""Weights of experts as codes: the op that multiplies by them, and whole models of many families."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import optc
from optc.errors import UsageError
from optc.optimizer.budget import Budget, choose_mix
from optc.optimizer.capture import capture
from optc.optimizer.export import export
from optc.optimizer.lowering.native import build_kernels
from optc.passes.base import run_passes
from optc.passes.canonicalize import Canonicalize
from optc.passes.graph import Program, get_weight
from optc.passes.quantize.calibrate import Calibration, Walk
from optc.passes.quantize.quantize import Quantize
from optc.passes.quantize.recipe import Recipe, Rule
from optc.passes.quantize.roles import find_candidates
from optc.runtime.artifact import Artifact, open_artifact
from optc.runtime.manifest import QuantizedLayer
from optc.runtime.ops.kernels import host_isa, load_kernels
from optc.runtime.ops.quantized import (
    StoredWeight,
    grouped_mm_quantized_reference,
    linear_quantized_reference,
    quantize_activations,
)
from optc.runtime.scheme import find_scheme, scheme_names
from optc.runtime.unpack import unpack

from .families import MAX_LEN, VOCAB_SIZE, load_reference, save_model
from .prequantized_cases import logits
from .quantized_cases import DTYPES, Case, assert_near

OPS = torch.ops.optc
EVERY_TIME = ["mixtral", "gpt_oss", "deepseek_v2"]
FAMILIES = [
    *EVERY_TIME,
    *("afmoe", "axk1", "deepseek_v3", "dots1", "ernie4_5_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "granitemoe"),
    *("mimo_v2_flash", "minimax_m2", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe"),
]


def arguments(case: Case, stored: StoredWeight, ends: list[int], rows: int) -> tuple[Any, ...]:
    """For optc::grouped_mm_quantized, of `case.shape` [G * N, K]."""
    x, *parts, input_scale, _, bits, block, activation = case.arguments(rows, stored)
    return x, *parts, input_scale, torch.tensor(ends, dtype=torch.int32), bits, block, activation


def expert_by_expert(case: Case, stored: StoredWeight, given: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Each expert's rows times its own matrix, and the sizes of the sums."""
    x, ends, input_scale, activation = given[0].float(), given[6].tolist(), given[5], given[-1]
    if activation != "none":
        x = quantize_activations(x, activation, input_scale)
    matrices = stored.dequantize().unflatten(0, (len(ends), -1))
    found, size = (torch.zeros(x.shape[0], matrices.shape[1]) for _ in range(2))
    for start, end, matrix in zip([0, *ends], ends, matrices, strict=False):
        found[start:end] = x[start:end] @ matrix.t()
        size[start:end] = x[start:end].abs() @ matrix.abs().t()
    return found, size


@settings(max_examples=100)
@given(
    scheme=st.sampled_from(scheme_names()),
    experts=st.integers(1, 5),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 200)),
    counts=st.lists(st.integers(0, 6), min_size=5, max_size=5),
    rest=st.integers(0, 2),
    dtype=st.sampled_from(DTYPES),
    options=st.tuples(st.booleans(), st.booleans()),
)
def test_the_op(
    scheme: str,
    experts: int,
    shape: tuple[int, int],
    counts: list[int],
    rest: int,
    dtype: torch.dtype,
    options: tuple[bool, bool],
) -> None:
    """Experts without rows, rows without an expert, and blocks of rows that go on over the end of an expert."""
    load_kernels(build_kernels(host_isa()))
    weights = find_scheme(scheme).weights
    case = Case(
        scheme=scheme,
        shape=(experts * shape[0], shape[1]),
        dtype=dtype,
        floating_zero=options[0] and not weights.symmetric,
        act_order=options[1] and weights.strategy == "group",
    )
    stored, ends = case.weight(), torch.tensor(counts[:experts]).cumsum(0).tolist()
    given_ = arguments(case, stored, ends, ends[-1] + rest)
    expected, size = expert_by_expert(case, stored, given_)
    native = OPS.grouped_mm_quantized(*given_)
    if not expected.numel():
        assert native.shape == grouped_mm_quantized_reference(*given_).shape == expected.shape
        return
    assert_near(grouped_mm_quantized_reference(*given_), expected, size, dtype)
    assert_near(native, expected, size, dtype)
    assert not native[ends[-1] :].any()


def test_one_expert_is_a_linear_layer() -> None:
    case = Case(scheme="w4a8-g32-asym")
    stored = case.weight()
    x, *parts, input_scale, bias, bits, block, activation = case.arguments(6, stored)
    expected = linear_quantized_reference(x, *parts, input_scale, bias, bits, block, activation)
    ends = torch.tensor([6], dtype=torch.int32)
    found = grouped_mm_quantized_reference(x, *parts, input_scale, ends, bits, block, activation)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "case", [Case(shape=(12, 64)), Case(scheme="w8a8-static", shape=(12, 64), dtype=torch.bfloat16)]
)
def test_opcheck(case: Case) -> None:
    given_ = arguments(case, case.weight(), [2, 2, 5], 7)
    torch.library.opcheck(OPS.grouped_mm_quantized.default, given_, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([1, 2], "13 rows of weight for 2 experts, expected a multiple"),
        ([8], "offsets must rise from 0 to at most 7"),
        ([-1], "offsets must rise"),
        ([], "13 rows of weight for 0 experts"),
    ],
)
def test_bad_offsets_raise(ends: list[int], message: str) -> None:
    load_kernels(build_kernels(host_isa()))
    case = Case(shape=(13, 64))
    with pytest.raises(RuntimeError, match=message):
        OPS.grouped_mm_quantized(*arguments(case, case.weight(), ends, 7))


def layers_of(artifact: Artifact) -> list[QuantizedLayer]:
    assert artifact.manifest.quantization is not None
    return list(artifact.manifest.quantization.layers)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in EVERY_TIME else pytest.mark.slow) for name in FAMILIES]
)
def test_a_family_computes_what_its_codes_mean(name: str, tmp_path: Path) -> None:
    """The logits are those of transformers with the weights that `unpack` gives; what is no code is as it was."""
    checkpoint = save_model(name, tmp_path / name)
    recipe = Recipe(default="w4a16-g128", adapt=True)
    artifact = open_artifact(optc.compile(checkpoint, tmp_path / "a.optc", backend="eager", quantize=recipe))
    reference, weights, layers = load_reference(checkpoint), unpack(artifact), layers_of(artifact)
    parameters = dict(reference.named_parameters())
    experts = {key for key, value in parameters.items() if value.dim() == 3 and ".experts." in key}
    assert experts and experts == {layer.name for layer in layers if layer.experts is not None}
    assert {layer.role for layer in layers} == {"attention", "mlp"}
    assert not [layer.name for layer in layers if layer.name.endswith(("gate.weight", "router.weight"))]
    sizes = artifact.manifest.constants
    for layer in layers:
        stored = sum(sizes_of(sizes[constant].shape, sizes[constant].dtype) for constant in layer.constants.values())
        assert layer.bits_per_weight * math.prod(layer.shape) == pytest.approx(8 * stored)
        assert layer.bits_per_weight < 5.5 and weights[layer.name].shape == parameters[layer.name].shape
    with torch.no_grad():
        for key, value in parameters.items():
            if key not in {layer.name for layer in layers}:
                assert key not in weights or torch.equal(weights[key], value)
            else:
                assert 0 < (weights[key] - value).abs().max() < 0.3 * value.abs().max()
                value.copy_(weights[key])
        ids = torch.randint(3, VOCAB_SIZE, (1, 20), generator=torch.Generator().manual_seed(1))
        expected = reference(input_ids=ids, use_cache=False).logits
    assert (logits(artifact.path, ids) - expected).abs().max() < 1e-4 * max(1, expected.abs().max())


def sizes_of(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * getattr(torch, dtype).itemsize


@pytest.mark.parametrize("name", ["mixtral", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_native_code(name: str, tmp_path: Path) -> None:
    """The step program's greedy tokens are those of the scoring program, which the reference ops compute."""
    output = optc.compile(save_model(name, tmp_path / name), tmp_path / "a.optc", quantize="int4")
    prompt = [5, 7, 11, 13, 17, 19]
    llm = optc.LLM(output)
    assert llm.engine.executor.is_native
    (result,) = llm.generate([prompt], max_tokens=8, temperature=0, ignore_eos=True)
    tokens = prompt + list(result.token_ids)
    best = logits(output, torch.tensor([tokens]))[0].argmax(dim=-1).tolist()
    assert best[len(prompt) - 1 : -1] == tokens[len(prompt) :]


def test_rounded_activations(tmp_path: Path) -> None:
    checkpoint = save_model("mixtral", tmp_path / "mixtral")
    artifact = open_artifact(optc.compile(checkpoint, tmp_path / "a.optc", backend="eager", quantize="int8"))
    assert {layer.scheme for layer in layers_of(artifact) if layer.experts is not None} == {
        "w8a8g-g32", "w8a8g-g64",
    }  # fmt: skip
    ids = torch.randint(3, VOCAB_SIZE, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = load_reference(checkpoint)(input_ids=ids, use_cache=False).logits
    assert (logits(artifact.path, ids) - expected).norm() < 0.1 * expected.norm()


@pytest.fixture(scope="module")
def _mixtral(tmp_path_factory: pytest.TempPathFactory) -> Program:
    model = load_reference(save_model("mixtral", tmp_path_factory.mktemp("mixtral")))
    program, _ = capture(model.requires_grad_(False), MAX_LEN)
    run_passes(program, [Canonicalize()])
    return program


@pytest.fixture
def mixtral(_mixtral: Program) -> Program:
    return _mixtral.copy()


def calibration() -> Calibration:
    generator = torch.Generator().manual_seed(1)
    return Calibration(tuple(torch.randint(3, VOCAB_SIZE, (40,), generator=generator) for _ in range(4)), "random", 1)


def quantized(program: Program, recipe: Recipe, **options: Any) -> Program:
    found = program.copy()
    run_passes(found, [Quantize(recipe=recipe, **options)], facts={"canonical"})
    return found


def test_gptq_keeps_the_products_with_what_flows_into_the_experts(mixtral: Program) -> None:
    """On the inputs of all experts together, with the layers before them quantized; twice the same."""
    only = Recipe(
        default="none", rounding="gptq", rules=(Rule(name="model.layers.0.*.gate_up_proj", scheme="w4a16-g32"),)
    )
    found = quantized(mixtral, only, calibration=calibration())
    again = quantized(mixtral, only, calibration=calibration())
    nearest = quantized(mixtral, only.model_copy(update={"rounding": "rtn-minmax"}))
    assert all(torch.equal(value, again.weights()[name]) for name, value in found.weights().items())
    (candidate,) = [c for c in find_candidates(mixtral)[0] if c.name.endswith("0.mlp.experts.gate_up_proj")]
    with Walk(mixtral, calibration().samples, [candidate.linears[0].all_input_nodes[0]]) as walk:
        list(walk.run())
        hessian = walk.statistics().hessian
    original = candidate.as_matrix(get_weight(mixtral.module, candidate.name))
    losses = [((error @ hessian) * error).sum() for error in (matrix_in(p) - original for p in (found, nearest))]
    assert losses[0] < 0.7 * losses[1]


def test_gptq_of_experts_does_not_follow_the_rows_of_the_unquantized_model(mixtral: Program) -> None:
    """Where the quantized layers before them send tokens to other experts, row i is another token."""
    found = {}
    for rounding in ("gptq", "rtn"):
        recipe = Recipe(default="w3a16-g32", rounding=rounding, adapt=True)
        program = quantized(mixtral, recipe, calibration=calibration())
        assert program.quantization is not None
        found[rounding] = {layer.name: layer.error for layer in program.quantization.layers if layer.experts}
    for name, error in found["gptq"].items():
        assert error < 2.5 * found["rtn"][name], name


def matrix_in(program: Program) -> Tensor:
    assert program.quantization is not None
    (layer,) = program.quantization.layers
    parts = {part: get_weight(program.module, constant) for part, constant in layer.constants.items()}
    args = program.quantization.schemes[layer.scheme].weights
    return StoredWeight(parts["codes"], parts["scale"], parts.get("zero"), None, args, layer.shape).dequantize()


def test_later_layers_see_the_experts_quantized(mixtral: Program) -> None:
    """Also where the view of the weights is made before what is multiplied by them."""
    first = next(node for node in mixtral.graph.nodes if node.op == "call_function")
    (candidate,) = [c for c in find_candidates(mixtral)[0] if c.name.endswith("0.mlp.experts.gate_up_proj")]
    x, view, _ = candidate.linears[0].args
    first.prepend(view.args[0])
    first.prepend(view)
    weight = get_weight(mixtral.module, candidate.name)
    with Walk(mixtral, calibration().samples, [x]) as walk:
        list(walk.run())
        walk.replace({candidate.name: torch.zeros_like(weight)})
        found = list(walk.outputs({}))
    kept = weight.clone()
    weight.zero_()
    expected = [mixtral.module(sample[None], torch.arange(len(sample))[None])[0] for sample in calibration().samples]
    weight.copy_(kept)
    for output, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-4)


def test_a_budget_counts_the_experts(mixtral: Program) -> None:
    recipe, record = choose_mix(
        mixtral, Recipe(default="w4a16-g128", adapt=True), Budget(bits=6.0), calibration(), calibration().samples[:2]
    )
    groups = [group for group in record.groups if any(".experts." in name for name in group.weights)]
    assert len(groups) == 4 and all(group.chosen for group in groups)
    assert record.bits_per_weight is not None and record.bits_per_weight <= 6
    layers = quantized(mixtral, recipe, calibration=calibration()).quantization
    assert layers is not None and layers.bits_per_weight <= 6.01


def test_export_refuses_experts_by_name(tmp_path: Path) -> None:
    checkpoint = save_model("mixtral", tmp_path / "mixtral")
    options: dict[str, Any] = {"backend": "eager", "verify": False}
    output = optc.compile(checkpoint, tmp_path / "a.optc", quantize="w8a16", **options)
    with pytest.raises(UsageError, match=r"experts\.gate_up_proj cannot be exported .* \{name: \"\*\.experts\.\*\""):
        export(output, tmp_path / "exported")
    way_out = Recipe(default="w8a16", rules=(Rule(name="*.experts.*", scheme="none"),))
    output = optc.compile(checkpoint, tmp_path / "b.optc", quantize=way_out, **options)
    export(output, tmp_path / "exported")
    assert (tmp_path / "exported" / "model.safetensors").exists()
