"""The native kernels of quantized layers against the reference implementations, which are called directly.

`OPTC_TEST_ISA` picks the instruction set; `test_other_isas` runs part of this file again under each one the host has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optc.optimizer.lowering.native import build_kernels
from optc.runtime.ops.kernels import load_kernels
from optc.runtime.ops.quantized import (
    FP8,
    StoredWeight,
    embedding_quantized_reference,
    linear_quantized_reference,
    quantize_activations,
)
from optc.runtime.scheme import find_scheme, scheme_names

from .isas import ISA, run_again, under_other_isas
from .quantized_cases import DTYPES, ROWS_OF_X, Case, all_cases, assert_near, random_weight

OPS = torch.ops.optc


@pytest.fixture(scope="module", autouse=True)
def native() -> None:
    load_kernels(build_kernels(ISA))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def parts(stored: StoredWeight) -> tuple[Any, ...]:
    return stored.weight, stored.scale, stored.zero, stored.group_index


def check_linear(case: Case, stored: StoredWeight, rows: int) -> None:
    """Both sum in float32, in another order; the reference in float32 shows how large the sum's parts are."""
    arguments = case.arguments(rows, stored)
    x = arguments[0].float()
    if arguments[-1] != "none":
        x = quantize_activations(x, arguments[-1], arguments[5])
    bias = torch.zeros(1) if arguments[6] is None else arguments[6].float()
    size = x.abs() @ stored.dequantize().abs().t() + bias.abs()
    exact = (arguments[0].float(), *arguments[1:])
    found = OPS.linear_quantized(*arguments)
    assert_near(found, linear_quantized_reference(*exact), size, case.dtype)


def check_embedding(case: Case, stored: StoredWeight) -> None:
    ids = torch.randint(0, case.shape[0], (2, 7))
    how = (case.shape[1], stored.args.num_bits, list(stored.args.block(*case.shape)), case.dtype)
    found = OPS.embedding_quantized(ids, *parts(stored), *how)
    assert torch.equal(found, embedding_quantized_reference(ids, *parts(stored), *how))


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: f"{case.scheme}-{case.shape}")
def test_every_scheme(case: Case) -> None:
    stored = case.weight()
    for rows in ROWS_OF_X:
        check_linear(case, stored, rows)
    check_embedding(case, stored)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    scheme=st.sampled_from(scheme_names()),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 300)),
    rows=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    scale_dtype=st.sampled_from(DTYPES),
    options=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    scheme: str,
    shape: tuple[int, int],
    rows: int,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    options: tuple[bool, bool, bool],
    seed: int,
) -> None:
    args = find_scheme(scheme).weights
    case = Case(
        scheme=scheme,
        shape=shape,
        dtype=dtype,
        scale_dtype=scale_dtype,
        bias=options[0],
        floating_zero=options[1] and not args.symmetric,
        act_order=options[2] and args.strategy == "group",
        seed=seed,
    )
    stored = case.weight()
    if rows:
        check_linear(case, stored, rows)
    else:
        assert OPS.linear_quantized(*case.arguments(0, stored)).shape == (0, shape[0])
    check_embedding(case, stored)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_every_code_width(bits: int) -> None:
    """Also those that no scheme has."""
    args = find_scheme("w4a16-g32-asym").weights.model_copy(update={"num_bits": bits})
    case = Case(scheme="w4a16-g32-asym")
    for columns in (1, 7, 8, 31, 32, 33, 64, 203):
        torch.manual_seed(columns)
        stored = random_weight(args, 67, columns).pack()
        check_embedding(replace(case, shape=(67, columns)), stored)


ACTIVATIONS = ["int8-token", "int8-group32", "int8-static", "fp8-token", "fp8-group32", "fp8-static"]


def rounded_by_kernel(x: torch.Tensor, activation: str, input_scale: torch.Tensor | None) -> torch.Tensor:
    """What the kernel makes of x [M, K], seen through a unit matrix: sums of one number and zeros."""
    columns = x.shape[1]
    unit = torch.eye(columns, dtype=torch.int8)
    ones = torch.ones(columns, 1)
    return OPS.linear_quantized(x, unit, ones, None, None, input_scale, None, 8, [1, columns], activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_rounded_as_in_the_reference(activation: str) -> None:
    """To the bit: magnitudes from subnormal to large, ties, zeros of both signs, and all E4M3 numbers and their middles."""
    torch.manual_seed(0)
    scale = torch.tensor([0.25]) if activation.endswith("static") else None
    values = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    table = torch.cat([values, (values[1:] + values[:-1]) / 2, -values])
    rows = [table, torch.randn(table.numel()) * 2.0 ** torch.randint(-20, 10, table.shape), torch.zeros_like(table)]
    rows += [table / 448 * 127, (table / 4).round() / 2, table * 1e-42, torch.full_like(table, 1e-45), table * 1e30]
    x = torch.stack(rows)
    expected = quantize_activations(x, activation, scale)
    torch.testing.assert_close(rounded_by_kernel(x, activation, scale), expected, rtol=0, atol=0)


@pytest.mark.parametrize("activation", ["none", *ACTIVATIONS])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_bad_numbers_stay_visible(activation: str, bad: float) -> None:
    """A row with NaN or Inf does not look like an answer, unless a static scale cuts Inf off; other rows do not notice."""
    arguments = list(Case(scheme="w8a16-g32", shape=(9, 70)).arguments(4))
    arguments[-1] = activation
    if activation.endswith("static"):
        arguments[5] = torch.tensor([0.25])
    good = OPS.linear_quantized(*arguments)
    arguments[0][2, 5] = bad
    found, expected = OPS.linear_quantized(*arguments), linear_quantized_reference(*arguments)
    assert torch.equal(found[[0, 1, 3]], good[[0, 1, 3]])
    assert torch.equal(found.isfinite(), expected.isfinite()) and torch.equal(found.isnan(), expected.isnan())
    assert not found[2].isfinite().any() or (activation.endswith("static") and bad == bad)


def test_a_code_that_is_nan_stays_nan() -> None:
    stored = Case(scheme="fp8-weight").weight()
    stored.weight.view(torch.uint8)[[0, 5], [3, 202]] = 0xFF
    case = Case(scheme="fp8-weight")
    found = OPS.linear_quantized(*case.arguments(2, stored))
    assert found.isnan().any(0).nonzero().flatten().tolist() == [0, 5]


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8", "w4a16-g32-asym", "w3a16-g64", "fp8-dynamic", "fp8-block"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits(scheme: str, dtype: torch.dtype) -> None:
    """A row of the result does not depend on the rows beside it, on a part of the outputs alone, or on the threads."""
    case = Case(scheme=scheme, shape=(75, 517), dtype=dtype, bias=True)
    stored = case.weight()
    x, *rest = case.arguments(300, stored)
    together = OPS.linear_quantized(x, *rest)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for rows in (1, 2, 3, 5, 7, 64, 299):
            for start in (0, 1, 300 - rows):
                alone = OPS.linear_quantized(x[start : start + rows], *rest)
                assert torch.equal(alone, together[start : start + rows])
    if rest[7][0] == 1 and stored.zero is None:
        bias = rest[5][10:31]
        some = OPS.linear_quantized(x, stored.weight[10:31], stored.scale[10:31], *rest[2:5], bias, *rest[6:])
        assert torch.equal(some, together[:, 10:31])


def test_more_rows_than_are_held_at_once() -> None:
    case = Case(scheme="w8a16", shape=(6, 20001))
    check_linear(case, case.weight(), 40)


def test_strided_arguments_are_copied_not_misread() -> None:
    case = Case(scheme="w4a16-g32-asym")
    rest = case.arguments(6)[1:]
    wide = torch.randn(2, 203, 3).transpose(1, 2)
    strided = [torch.stack([a, a], -1)[..., 0] if isinstance(a, torch.Tensor) else a for a in rest]
    found = OPS.linear_quantized(wide, *strided)
    assert found.shape == (2, 3, 13)
    assert torch.equal(found, OPS.linear_quantized(wide.contiguous(), *rest))


@under_other_isas
def test_other_isas(isa: str) -> None:
    only = (
        "code_width or activations_are or bad_numbers or same_bits and w or (every_scheme and 203 and (g32 or not g))"
    )
    run_again(__file__, isa, only)


@pytest.mark.slow
def test_compiled_code_calls_the_kernels(tmp_path: Path) -> None:
    """Strings, lists, dtypes and absent tensors arrive through AOTInductor as they were given."""
    cases = [Case(scheme=name, shape=(13, 203)) for name in ("w8a8", "w8a8-static", "w4a16-g32-asym", "fp8-block")]
    cases.append(Case(scheme="w3a16-g32", shape=(13, 203), act_order=True, bias=True, dtype=torch.bfloat16))
    arguments = [case.arguments(5) for case in cases]
    table = Case(scheme="w4a16-g32-asym").weight()

    class Layers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            constants = [*(value for given in arguments for value in given[1:]), *parts(table)]
            for i, value in enumerate(constants):
                self.register_buffer(f"weight_{i}", value) if isinstance(value, torch.Tensor) else None
            self.buffer_of = {id(v): f"weight_{i}" for i, v in enumerate(constants) if isinstance(v, torch.Tensor)}

        def mine(self, given: tuple[Any, ...]) -> list[Any]:
            return [getattr(self, self.buffer_of[id(v)]) if isinstance(v, torch.Tensor) else v for v in given]

        def forward(self, ids: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            how = (203, 4, [1, 32], torch.bfloat16)
            embedded = OPS.embedding_quantized(ids, *self.mine(parts(table)), *how)
            calls = zip(inputs, arguments, strict=True)
            return embedded, *(OPS.linear_quantized(x, *self.mine(given[1:])) for x, given in calls)

    layers, inputs = Layers(), (torch.tensor([3, 12, 0]), *(given[0] for given in arguments))
    exported = torch.export.export(layers, inputs, strict=False)
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "layers.pt2"))
    compiled = torch._inductor.aoti_load_package(package)
    for found, expected in zip(compiled(*inputs), layers(*inputs), strict=True):
        assert found.dtype == expected.dtype and torch.equal(found, expected)


LINEAR = ("x", "weight", "scale", "zero", "group_index", "input_scale", "bias", "bits", "block", "activation")


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("x", torch.zeros(2, 64), r"weight has shape \[13, 26\], expected \[\*, 8\]"),
        ("x", torch.zeros(2, 203).double(), "linear_quantized supports float32, bfloat16 and float16 on the CPU"),
        ("weight", torch.zeros(13, 26), "weight has dtype Float, expected Char, Float8_e4m3fn or Int"),
        (
            "weight",
            torch.zeros(13, 203, dtype=torch.int8),
            "weight has dtype Char, which does not hold codes of 4 bits",
        ),
        ("bits", 8, "weight has dtype Int, which does not hold codes of 8 bits"),
        ("bits", 3, r"weight has shape \[13, 26\], expected \[\*, 20\]"),
        ("block", [1], "block must be two positive numbers"),
        ("block", [1, 0], "block must be two positive numbers"),
        ("block", [1, 64], r"scale has shape \[13, 7\], expected \[13, 4\]"),
        ("block", [2, 32], r"scale has shape \[13, 7\], expected \[7, 7\]"),
        ("scale", torch.zeros(13, 7).double(), "scale supports float32, bfloat16 and float16"),
        ("zero", torch.zeros(13, 7, dtype=torch.int32), r"zero has shape \[13, 7\], expected \[2, 7\]"),
        ("zero", torch.zeros(2, 7), r"zero has shape \[2, 7\], expected \[13, 7\]"),
        ("zero", torch.zeros(13, 7, dtype=torch.int64), "zero supports float32, bfloat16 and float16"),
        ("group_index", torch.full((203,), 7, dtype=torch.int32), "group_index names a group outside 0 to 6"),
        ("group_index", torch.full((203,), -1, dtype=torch.int32), "group_index names a group outside 0 to 6"),
        ("group_index", torch.zeros(203), "group_index has dtype Float, expected Int"),
        ("group_index", torch.zeros(7, dtype=torch.int32), r"group_index has shape \[7\], expected \[203\]"),
        ("bias", torch.zeros(12), r"bias has shape \[12\], expected \[13\]"),
        ("activation", "int4-token", "unknown activation 'int4-token', expected none, or int8 or fp8"),
        ("activation", "int8", "unknown activation 'int8'"),
        ("activation", "int8-group", "unknown activation 'int8-group'"),
        ("activation", "int8-static", "activation 'int8-static' needs an input_scale of one number"),
    ],
)
def test_bad_arguments_raise(argument: str, value: object, message: str) -> None:
    arguments = list(Case(scheme="w4a16-g32-asym").arguments(2))
    arguments[LINEAR.index(argument)] = value
    with pytest.raises(RuntimeError, match=message):
        OPS.linear_quantized(*arguments)


@pytest.mark.parametrize("bad", [-1, 13])
def test_ids_outside_of_the_table_raise(bad: int) -> None:
    stored = Case().weight()
    with pytest.raises(RuntimeError, match=f"id {bad} is outside of a table of 13 rows"):
        OPS.embedding_quantized(torch.tensor([0, bad]), *parts(stored), 203, 4, [1, 32], torch.float32)


def test_opcheck() -> None:
    for case in (Case(), Case(scheme="w8a8", dtype=torch.bfloat16, bias=True), Case(scheme="fp8-block")):
        stored = case.weight()
        # torch compares the arguments before and after with operations that float8 does not have.
        tests = ("test_schema", "test_faketensor")[stored.weight.dtype == FP8 :]
        torch.library.opcheck(OPS.linear_quantized.default, case.arguments(5, stored), test_utils=tests)
        how = (case.shape[1], stored.args.num_bits, list(stored.args.block(*case.shape)), case.dtype)
        ids = torch.tensor([[0, 12, 3]])
        torch.library.opcheck(OPS.embedding_quantized.default, (ids, *parts(stored), *how), test_utils=tests)
