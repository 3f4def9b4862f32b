"""Packed weights: the layout and its inverse, the ops' reference implementations, and the native kernels against them.

`OPTC_TEST_ISA` picks the instruction set; `test_other_isas` runs part of this file again under each one the host has.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optc.optimizer.lowering.native import build_kernels
from optc.runtime.ops.kernels import load_kernels, supports
from optc.runtime.ops.packed import (
    PANEL,
    PackedWeight,
    embedding_packed_reference,
    linear_packed_a8_reference,
    linear_packed_reference,
    pack_matrix,
    reason_not_to_pack,
    unpack_matrix,
)
from optc.runtime.ops.quantized import FP8, linear_quantized_reference, quantize_activations
from optc.runtime.scheme import find_scheme, scheme_names

from .isas import ISA, run_again, under_other_isas
from .quantized_cases import DTYPES, ROWS_OF_X, Case, all_cases, assert_near

OPS = torch.ops.optc


@pytest.fixture(scope="module", autouse=True)
def native() -> None:
    load_kernels(build_kernels(ISA))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def is_packable(case: Case) -> bool:
    return reason_not_to_pack(case.weight().unpack(), find_scheme(case.scheme).activation) is None


PACKABLE = [case for case in all_cases() if is_packable(case)]


def packed_arguments(case: Case, rows: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Of optc::linear_packed, and of optc::linear_quantized for the same layer."""
    stored = case.weight()
    canonical = case.arguments(rows, stored)
    x, _, _, _, _, input_scale, bias, bits, _, activation = canonical
    packed = PackedWeight.pack(stored.unpack())
    parts = (packed.weight, packed.scale, packed.zero)
    return (x, *parts, input_scale, bias, case.shape[0], bits, packed.group, activation), canonical


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (32, 8), (33, 9), (70, 203), (13, 64)])
def test_packing_integers_is_undone(bits: int, shape: tuple[int, int]) -> None:
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int8)
    packed = pack_matrix(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-shape[0] // PANEL) * PANEL * -(-shape[1] // (32 // bits)) * 4
    assert torch.equal(unpack_matrix(packed, bits, *shape), codes)


@pytest.mark.parametrize("dtype", [*DTYPES, FP8])
def test_packing_floats_is_undone(dtype: torch.dtype) -> None:
    matrix = (torch.randn(45, 77) * 100).to(dtype)
    found = unpack_matrix(pack_matrix(matrix, 16), 16, 45, 77)
    assert found.dtype == dtype and torch.equal(found.view(torch.uint8), matrix.view(torch.uint8))


def test_where_a_code_lies() -> None:
    """The layout is a file format: output 17, column 13 of the first panel."""
    codes = torch.full((32, 16), -8, dtype=torch.int8)
    codes[17, 13] = 3
    packed = pack_matrix(codes, 4)
    assert packed.shape == (1, 2, 128) and packed[0, 1, 64 + 4 * 1 + 1] == 11 << 4
    assert int((packed != 0).sum()) == 1


@pytest.mark.parametrize("case", PACKABLE, ids=lambda case: f"{case.scheme}-{case.shape}")
def test_packing_a_weight_is_undone(case: Case) -> None:
    weight = case.weight().unpack()
    found = PackedWeight.pack(weight).unpack()
    assert torch.equal(found.codes.view(torch.uint8), weight.codes.view(torch.uint8))
    assert torch.equal(found.scale, weight.scale)
    assert (found.zero is None) == (weight.zero is None)
    assert weight.zero is None or (found.zero is not None and torch.equal(found.zero, weight.zero))


@pytest.mark.parametrize(
    ("scheme", "options", "reason"),
    [
        ("w4a16-g32", {"act_order": True}, "act-order"),
        ("w3a16-g32", {}, "3 bits"),
        ("fp8-dynamic", {}, "FP8 activations"),
    ],
)
def test_what_is_not_packed(scheme: str, options: dict[str, bool], reason: str) -> None:
    case = Case(scheme=scheme, **options)  # type: ignore[arg-type]
    assert reason in str(reason_not_to_pack(case.weight().unpack(), find_scheme(scheme).activation))


@pytest.mark.parametrize("case", PACKABLE, ids=lambda case: f"{case.scheme}-{case.shape}")
def test_reference_is_that_of_the_stored_weight(case: Case) -> None:
    packed, canonical = packed_arguments(case, 5)
    assert torch.equal(linear_packed_reference(*packed), linear_quantized_reference(*canonical))


def check_linear(case: Case, rows: int) -> None:
    arguments, _ = packed_arguments(case, rows)
    x, weight, scale, zero, input_scale, bias, _, _, group, activation = arguments
    wide = x.float()
    rounded = wide if activation == "none" else quantize_activations(wide, activation, input_scale)
    size = rounded.abs() @ case.weight().dequantize().abs().t()
    if zero is not None:  # codes and zero points are multiplied apart
        magnitude = PackedWeight(
            weight,
            scale.abs(),
            -zero.abs() if zero.dtype != torch.int8 else None,
            group,
            case.weight().args,
            case.shape,
        )
        size = (
            size
            + 256 * rounded.abs() @ magnitude.unpack().scale.float().repeat_interleave(group, 1)[:, : x.shape[1]].t()
        )
    if bias is not None:
        size = size + bias.float().abs()
    expected = linear_packed_reference(wide, *arguments[1:])
    assert_near(OPS.linear_packed(*arguments), expected, size, case.dtype)
    if activation.startswith("int8") and not activation.endswith("static"):
        check_rounded(case, arguments, expected, size)


def check_rounded(case: Case, arguments: tuple[Any, ...], expected: Tensor, size: Tensor) -> None:
    x, weight, scale, zero, _, bias, outputs, bits, group, activation = arguments
    codes, steps = round_to_codes(x, activation)
    given = (codes, steps, weight, scale, zero, bias, outputs, bits, group, case.dtype, activation)
    found = OPS.linear_packed_a8(*given)
    assert_near(linear_packed_a8_reference(*given[:-2], torch.float32, activation), expected, size, torch.float32)
    assert torch.equal(found, OPS.linear_packed(*arguments)), "rounding beforehand changes bits"


def round_to_codes(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    columns = x.shape[-1]
    group = int(activation.removeprefix("int8-group")) if "group" in activation else columns
    padded = torch.nn.functional.pad(x.float(), (0, -columns % group)).unflatten(-1, (-1, group))
    steps = padded.abs().amax(-1) / 127
    steps = torch.where(steps > 0, steps, 1.0)
    codes = (padded / steps[..., None]).round().flatten(-2)[..., :columns].to(torch.int8)
    return codes.contiguous(), steps


@pytest.mark.parametrize("case", PACKABLE, ids=lambda case: f"{case.scheme}-{case.shape}")
def test_every_scheme(case: Case) -> None:
    for rows in ROWS_OF_X:
        check_linear(case, rows)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    scheme=st.sampled_from(scheme_names()),
    shape=st.tuples(st.integers(1, 100), st.integers(1, 1200)),
    rows=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    scale_dtype=st.sampled_from(DTYPES),
    options=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    scheme: str,
    shape: tuple[int, int],
    rows: int,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    options: tuple[bool, bool],
    seed: int,
) -> None:
    asymmetric = not find_scheme(scheme).weights.symmetric
    case = Case(
        scheme=scheme,
        shape=shape,
        dtype=dtype,
        scale_dtype=scale_dtype,
        bias=options[0],
        floating_zero=options[1] and asymmetric,
        seed=seed,
    )
    if not is_packable(case):
        return
    if rows:
        check_linear(case, rows)
    else:
        assert OPS.linear_packed(*packed_arguments(case, 0)[0]).shape == (0, shape[0])
    check_embedding(case)


def check_embedding(case: Case) -> None:
    packed = PackedWeight.pack(case.weight().unpack())
    ids = torch.randint(0, case.shape[0], (2, 7))
    how = (*case.shape, packed.args.num_bits, packed.group, case.dtype)
    given = (ids, packed.weight, packed.scale, packed.zero, *how)
    expected = OPS.embedding_quantized  # the same rows of the stored weight
    stored = case.weight()
    rest = (case.shape[1], stored.args.num_bits, list(stored.args.block(*case.shape)), case.dtype)
    wanted = expected(ids, stored.weight, stored.scale, stored.zero, stored.group_index, *rest)
    assert torch.equal(embedding_packed_reference(*given), wanted)
    assert torch.equal(OPS.embedding_packed(*given), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (13, 203), (131, 1061), (64, 512)])
def test_weights_of_floats(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix, bias = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)
    packed = pack_matrix(matrix, 16)
    for rows in ROWS_OF_X:
        x = torch.randn(rows, shape[1]).to(dtype)
        given = (x, packed, None, None, None, bias, shape[0], 16, 0, "none")
        expected = torch.nn.functional.linear(x.float(), matrix.float(), bias.float())
        size = x.float().abs() @ matrix.float().abs().t() + bias.float().abs()
        assert_near(linear_packed_reference(x.float(), *given[1:]), expected, size, torch.float32)
        assert_near(OPS.linear_packed(*given), expected, size, dtype)
    ids = torch.randint(0, shape[0], (5,))
    assert torch.equal(OPS.embedding_packed(ids, packed, None, None, *shape, 16, 0, dtype), matrix[ids])


SAME_BITS = (
    "w4a8-g32",
    "w4a8-g128-asym",
    "w8a8",
    "w8a8-static",
    "w4a16-g64",
    "w8a16",
    "fp8-weight",
    "w4a16-channel-asym",
)


@pytest.mark.parametrize(
    ("dtype", "columns"), [*((dtype, 1061) for dtype in DTYPES), (torch.bfloat16, 1024), (torch.bfloat16, 896)]
)
@pytest.mark.parametrize("scheme", [*SAME_BITS, "floats"])
def test_same_bits_alone_and_in_a_batch(scheme: str, dtype: torch.dtype, columns: int) -> None:
    """Whatever other rows there are, wherever the row is, and on any number of threads."""
    torch.manual_seed(1)
    if scheme == "floats":
        x, rest = (
            torch.randn(300, columns).to(dtype),
            (pack_matrix(torch.randn(70, columns).to(dtype), 16), None, None, None, None, 70, 16, 0, "none"),
        )
    else:
        arguments, _ = packed_arguments(Case(scheme=scheme, shape=(70, columns), dtype=dtype), 300)
        x, rest = arguments[0], arguments[1:]
    torch.set_num_threads(2)
    together = OPS.linear_packed(x, *rest)
    for rows in (1, 2, 3, 4, 7, 12, 13, 25, 299):
        torch.set_num_threads((1, 2, 3, 8)[rows % 4])
        assert torch.equal(OPS.linear_packed(x[5 : 5 + rows], *rest), together[5 : 5 + rows])


def test_a_forked_process_has_threads_of_its_own() -> None:
    """Those of its parent are not in it."""
    script = """
import os, pathlib, sys, torch
from optc.runtime.ops.kernels import load_kernels
load_kernels(pathlib.Path(sys.argv[1]))
torch.set_num_threads(3)
x, w, s = torch.randn(2, 1024), torch.randint(0, 256, (64, 128, 128), dtype=torch.uint8), torch.rand(64, 8, 32)
run = lambda: torch.ops.optc.linear_packed(x, w, s, None, None, None, 2048, 4, 128, "int8-group128")
expected = run()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(run(), expected) else 1)
same = torch.equal(run(), expected)
sys.exit(os.waitpid(child, 0)[1] or not same)
"""
    subprocess.run([sys.executable, "-c", script, str(build_kernels(ISA))], check=True, timeout=60)


def test_numbers_that_are_not_finite_stay_in_their_row() -> None:
    arguments, _ = packed_arguments(Case(scheme="w4a8-g32", shape=(40, 256)), 4)
    x = arguments[0].clone()
    clean = OPS.linear_packed(x, *arguments[1:])
    x[1, 7], x[2, 9] = float("nan"), float("inf")
    found = OPS.linear_packed(x, *arguments[1:])
    assert found[1:3].isnan().all() and torch.equal(found[[0, 3]], clean[[0, 3]])


@under_other_isas
def test_other_isas(isa: str) -> None:
    only = "same_bits or weights_of_floats or not_finite or (every_scheme and (203 or 261) and (g32 or not g))"
    run_again(__file__, isa, only)


@pytest.mark.skipif(not supports("avx512_bf16"), reason="tiles are for libraries with AVX512-BF16")
def test_tiles_of_amx_in_software() -> None:
    """More than 12 rows go through tiles, with a whole or a ragged last unit of columns, and get the bits of fewer rows, which
    go through none. (An error put into the tiles' product failed here.)
    """
    compiler = f"{os.environ.get('CXX', 'g++')} {IN_SOFTWARE}"
    run_again(__file__, "avx512_bf16", "rows_reach_tiles or (same_bits and (1024 or 896))", CXX=compiler)


IN_SOFTWARE = "-DOPTC_AMX_IN_SOFTWARE"


@pytest.mark.skipif(IN_SOFTWARE not in os.environ.get("CXX", ""), reason="only tiles in software are counted")
@pytest.mark.parametrize("columns", [1024, 896])
@pytest.mark.parametrize("scheme", SAME_BITS)
def test_which_rows_reach_tiles(scheme: str, columns: int) -> None:
    """Those of more than 12 whose products are of integers."""
    products = ctypes.CDLL(str(build_kernels(ISA))).optc_tile_products
    products.restype = ctypes.c_int64
    arguments, _ = packed_arguments(Case(scheme=scheme, shape=(70, columns), dtype=torch.bfloat16), 33)
    for rows in (1, 12, 13, 33):
        before = products()
        OPS.linear_packed(arguments[0][:rows], *arguments[1:])
        assert (products() > before) == (rows > 12 and find_scheme(scheme).activation != "none"), rows


def test_codes_without_columns() -> None:
    codes, steps = torch.zeros(2, 0, dtype=torch.int8), torch.zeros(2, 0)
    weight, scale = torch.zeros(1, 0, 128, dtype=torch.uint8), torch.zeros(1, 1, 32)
    with pytest.raises(RuntimeError, match="a packed weight must have rows and columns"):
        OPS.linear_packed_a8(codes, steps, weight, scale, None, None, 32, 4, 32, torch.float32, "int8-group32")


LINEAR = ("x", "weight", "scale", "zero", "input_scale", "bias", "outputs", "bits", "group", "activation")


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("x", torch.zeros(2, 64), r"weight has shape \[1, 26, 128\], expected \[1, 8, 128\]"),
        ("x", torch.zeros(2, 203).double(), "linear_packed supports float32, bfloat16 and float16 on the CPU"),
        ("weight", torch.zeros(1, 26, 128, dtype=torch.int64), "a packed weight has dtype Long"),
        ("bits", 3, "packed codes of 3 bits, expected 4 or 8"),
        ("outputs", 33, r"weight has shape \[1, 26, 128\], expected \[2, 26, 128\]"),
        ("scale", None, "codes need a scale"),
        ("scale", torch.zeros(1, 6, 32), r"scale has shape \[1, 6, 32\], expected \[1, 7, 32\]"),
        ("zero", torch.zeros(1, 7, 31, dtype=torch.int8), r"zero has shape \[1, 7, 31\], expected \[1, 7, 32\]"),
        ("group", 36, "groups of 36 columns, expected a multiple of 8"),
        ("bias", torch.zeros(12), r"bias has shape \[12\], expected \[13\]"),
        ("activation", "int4-token", "unknown activation 'int4-token'"),
        ("activation", "int8-group", "unknown activation 'int8-group'"),
        ("activation", "int8-group24", "groups of 32 columns with activations in groups of 24"),
        ("activation", "int8-static", "activation 'int8-static' needs an input_scale of one number"),
    ],
)
def test_bad_arguments_raise(argument: str, value: object, message: str) -> None:
    arguments = list(packed_arguments(Case(scheme="w4a8-g32-asym"), 2)[0])
    arguments[LINEAR.index(argument)] = value
    with pytest.raises(RuntimeError, match=message):
        OPS.linear_packed(*arguments)


@pytest.mark.parametrize("bad", [-1, 13])
def test_ids_outside_of_the_table_raise(bad: int) -> None:
    packed = PackedWeight.pack(Case().weight().unpack())
    with pytest.raises(RuntimeError, match=f"id {bad} is outside of a table of 13 rows"):
        OPS.embedding_packed(torch.tensor([0, bad]), packed.weight, packed.scale, None, 13, 203, 4, 32, torch.float32)


def test_opcheck() -> None:
    for case in (Case(), Case(scheme="w8a8", dtype=torch.bfloat16, bias=True)):
        arguments, _ = packed_arguments(case, 5)
        torch.library.opcheck(OPS.linear_packed.default, arguments, test_utils=("test_schema", "test_faketensor"))
