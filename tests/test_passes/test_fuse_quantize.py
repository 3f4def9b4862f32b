"""The pass that lets norms and gates round what quantized linear layers take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from optc.optimizer.lowering.native import build_kernels
from optc.passes.base import run_passes
from optc.passes.fuse_quantize import FuseQuantize
from optc.passes.graph import Program
from optc.passes.pack_weights import PackWeights
from optc.passes.quantize.quantize import Quantize
from optc.passes.quantize.recipe import Recipe, Rule
from optc.runtime.manifest import PassRecord
from optc.runtime.ops.kernels import host_isa, load_kernels

from .exported import Function, export, ops

OPS = torch.ops.optc
K = 64


@pytest.fixture(scope="module", autouse=True)
def native() -> None:
    load_kernels(build_kernels(host_isa()))


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


Build = Callable[..., Any]


def program_of(
    f: Build, scheme: str | None, dtype: torch.dtype = torch.bfloat16, others: dict[str, str] | None = None
) -> tuple[Program, list[Tensor]]:
    """`f(weights, x, y)` with the matrices a and b quantized by a scheme, and packed."""
    weights = {"a": numbers(32, K, dtype=dtype, seed=1), "b": numbers(40, K, dtype=dtype, seed=2)}
    module = Function(f, **weights, w=numbers(K, dtype=dtype, seed=3))
    inputs = [numbers(1, 5, K, dtype=dtype, seed=seed) for seed in (4, 5)]
    program = export(module, *inputs)
    if scheme:
        used = ("a", "b") if "b" in program.weights() else ("a",)
        rules = tuple(Rule(name=name, scheme=(others or {}).get(name, scheme)) for name in used)
        recipe = Recipe(rules=rules)
        run_passes(program, [Quantize(recipe=recipe)], facts={"canonical"})
    run_passes(program, [PackWeights()], facts={"canonical"})
    return program, inputs


def fuse(program: Program) -> PassRecord:
    (record,) = run_passes(program, [FuseQuantize()], facts={"canonical"})
    return record


def norm(self: Any, x: Tensor, y: Tensor) -> Any:
    normed = OPS.rms_norm(x, self.w, 1e-5, 0.0)
    return linear(normed, self.a), linear(normed, self.b)


def add_norm(self: Any, x: Tensor, y: Tensor) -> Any:
    normed, total = OPS.add_rms_norm(x, y, self.w, 1e-5, 1.0)
    return linear(normed, self.a), linear(normed, self.b), total


def last_norm(self: Any, x: Tensor, y: Tensor) -> Any:
    """The sum is used nowhere else."""
    return linear(OPS.add_rms_norm(x, y, self.w, 1e-5, 1.0)[0], self.a)


def silu(self: Any, x: Tensor, y: Tensor) -> Any:
    return linear(OPS.silu_mul(x, y), self.a)


def gelu(self: Any, x: Tensor, y: Tensor) -> Any:
    return linear(OPS.gelu_mul(x, y, True), self.a)


linear = torch.nn.functional.linear

CASES = {norm: 2, add_norm: 2, last_norm: 1, silu: 1, gelu: 1}


@pytest.mark.parametrize("build", CASES)
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32", "w4a8g-g32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_bits(build: Build, scheme: str, dtype: torch.dtype) -> None:
    """Fused and unfused round the same numbers to the same codes, so that every bit of the outputs is the same."""
    program, inputs = program_of(build, scheme, dtype)
    before = program.module(*inputs)
    record = fuse(program)
    assert record.matches == 1 and not record.declined
    counts = ops(program)
    assert counts["optc.linear_packed_a8.default"] == CASES[build] and "optc.linear_packed.default" not in counts
    for a, b in zip(program.module(*inputs), before, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_activation_of_each_op() -> None:
    program, _ = program_of(add_norm, "w4a8g-g32")
    fuse(program)
    (node,) = program.graph.find_nodes(op="call_function", target=OPS.add_rms_norm_a8.default)
    assert node.args[-1] == "int8-group32"
    assert {n.args[-1] for n in program.graph.find_nodes(op="call_function", target=OPS.linear_packed_a8.default)} == {
        "int8-group32"
    }


@pytest.mark.parametrize("scheme", [None, "w8a16", "w4a16-g32"])
def test_what_is_not_rounded_is_no_candidate(scheme: str | None) -> None:
    program, _ = program_of(norm, scheme)
    record = fuse(program)
    assert record.matches == 0 and not record.declined


def test_what_goes_elsewhere_too() -> None:
    def f(self: Any, x: Tensor, y: Tensor) -> Any:
        normed = OPS.rms_norm(x, self.w, 1e-5, 0.0)
        return linear(normed, self.a), normed + 1

    program, _ = program_of(f, "w8a8")
    before = ops(program)
    record = fuse(program)
    assert record.matches == 0 and ops(program) == before
    assert "takes it as it is" in record.declined[0]


def test_layers_that_round_differently() -> None:
    program, _ = program_of(norm, "w8a8", others={"b": "w4a8g-g32"})
    record = fuse(program)
    assert record.matches == 0 and "another layer by" in record.declined[0]


def test_a_layer_that_does_not_round() -> None:
    program, _ = program_of(norm, "w8a8", others={"b": "w8a16"})
    record = fuse(program)
    assert record.matches == 0 and "none" in record.declined[0]
