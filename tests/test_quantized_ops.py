"""What stored weights mean: the reference ops and the packing against definitions written out here, one element at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optc.runtime.ops.quantized import (
    FP8,
    StoredWeight,
    embedding_quantized_reference,
    linear_quantized_reference,
    pack_bits,
    quantize_activations,
    unpack_bits,
)
from optc.runtime.scheme import QuantizationArgs, find_scheme, scheme_names

from .quantized_cases import DTYPES, ROWS_OF_X, Case, all_cases, assert_near, random_weight

OPS = torch.ops.optc


def e4m3(byte: int) -> float:
    """The value of an E4M3 code: a sign, four bits of exponent with bias 7, three of mantissa; all ones are NaN."""
    sign, exponent, mantissa = (-1) ** (byte >> 7), byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


E4M3 = np.array([e4m3(byte) for byte in range(127)])  # 0 to 448, in order


def fields(words: list[int], bits: int, count: int) -> list[int]:
    """Codes of 2 to 7 bits out of 32-bit words, which together are one long number."""
    number = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return [(number >> (bits * i) & (2**bits - 1)) - 2 ** (bits - 1) for i in range(count)]


def meaning(stored: StoredWeight) -> Tensor:
    """f64[N, K]: each element from its own bits, scale and zero point."""
    (rows, columns), bits = stored.shape, stored.args.num_bits
    height, width = stored.args.block(rows, columns)
    if stored.args.type == "float":
        codes = [[e4m3(byte) for byte in row] for row in stored.weight.view(torch.uint8).tolist()]
    elif bits == 8:
        codes = stored.weight.tolist()
    else:
        codes = [fields(row, bits, columns) for row in stored.weight.tolist()]
    scale = stored.scale.double().tolist()
    zero = [[0.0] * len(row) for row in scale]
    if stored.zero is not None and stored.zero.dtype == torch.int32:
        by_group = [fields(column, bits, len(scale)) for column in stored.zero.t().tolist()]
        zero = [[float(group[r]) for group in by_group] for r in range(len(scale))]
    elif stored.zero is not None:
        zero = stored.zero.double().tolist()
    group = [c // width for c in range(columns)]
    if stored.group_index is not None:
        group = stored.group_index.tolist()
    return torch.tensor(
        [
            [(codes[r][c] - zero[r // height][group[c]]) * scale[r // height][group[c]] for c in range(columns)]
            for r in range(rows)
        ],
        dtype=torch.float64,
    )


def nearest_e4m3(values: np.ndarray) -> np.ndarray:
    """Of the two neighbours in the table the nearer one, of two that are as near the one with an even code."""
    above = np.searchsorted(E4M3, np.abs(values)).clip(1, 126)
    to_above, to_below = E4M3[above] - np.abs(values), np.abs(values) - E4M3[above - 1]
    is_above = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    return np.copysign(E4M3[np.where(is_above, above, above - 1)], values)


def rounded(x: Tensor, activation: str, input_scale: Tensor | None) -> Tensor:
    """f64[M, K]: x after it was rounded to 8 bits in steps that are float32."""
    if activation == "none":
        return x.double()
    kind, how = activation.split("-")
    columns = x.shape[1]
    group = int(how[5:]) if how.startswith("group") else columns
    largest = np.float32(127 if kind == "int8" else 448)
    result = np.zeros(x.shape)
    for r, row in enumerate(x.float().numpy()):
        for start in range(0, columns, group):
            part = row[start : start + group]
            step = np.abs(part).max() / largest
            if input_scale is not None:
                step = np.float32(input_scale.item())
            if step == 0:
                continue
            scaled = np.clip(part / step, -largest, largest)
            codes = np.rint(scaled) if kind == "int8" else nearest_e4m3(scaled)
            result[r, start : start + group] = codes.astype(np.float64) * np.float64(step)
    return torch.from_numpy(result)


def check_linear(case: Case, stored: StoredWeight, weight: Tensor, rows: int) -> None:
    arguments = case.arguments(rows, stored)
    x = rounded(arguments[0], arguments[-1], arguments[5])
    bias = torch.zeros(1) if arguments[6] is None else arguments[6].double()
    size = x.abs() @ weight.abs().t() + bias.abs()
    # A product below the smallest subnormal is lost, and as much of each weight.
    size += 2.0**-149 / 2e-6 * (x.abs().sum(1, keepdim=True) + x.shape[1])
    assert_near(linear_quantized_reference(*arguments), x @ weight.t() + bias, size, case.dtype)


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: f"{case.scheme}-{case.shape}")
def test_every_scheme_means_what_is_written(case: Case) -> None:
    stored = case.weight()
    stored.check()
    weight = meaning(stored)
    torch.testing.assert_close(stored.dequantize().double(), weight, rtol=1e-6, atol=1e-6 * float(weight.abs().max()))
    for rows in ROWS_OF_X:
        check_linear(case, stored, weight, rows)


SCALES = {
    "zeros": lambda scale: scale * (torch.rand_like(scale.float()) < 0.5).to(scale.dtype),
    "denormal": lambda scale: (scale.float() * 1e-38).to(scale.dtype),
    "outliers": lambda scale: scale * torch.where(torch.rand_like(scale.float()) < 0.1, 1000, 1).to(scale.dtype),
}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    scheme=st.sampled_from(scheme_names()),
    shape=st.tuples(st.integers(1, 20), st.integers(1, 150)),
    rows=st.integers(1, 5),
    kind=st.sampled_from(["plain", "constant", *SCALES]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scale_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    options=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_scale(
    scheme: str,
    shape: tuple[int, int],
    rows: int,
    kind: str,
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
    if kind in SCALES:
        stored = replace(stored, scale=SCALES[kind](stored.scale))
    if kind == "constant":
        quantized = stored.unpack()
        quantized.codes.copy_(quantized.codes[:1, :1].expand(*shape).clone())
        stored = quantized.pack()
    check_linear(case, stored, meaning(stored), rows)


def test_leading_dimensions_are_kept() -> None:
    arguments = Case().arguments(6)
    flat = linear_quantized_reference(*arguments)
    deep = linear_quantized_reference(arguments[0].reshape(2, 3, -1), *arguments[1:])
    assert torch.equal(deep, flat.reshape(2, 3, -1))
    assert linear_quantized_reference(arguments[0][:0], *arguments[1:]).shape == (0, 13)


@pytest.mark.parametrize(
    "activation", ["int8-token", "int8-group4", "int8-static", "fp8-token", "fp8-group4", "fp8-static"]
)
def test_rounded_activations(activation: str) -> None:
    """Zeros stay zeros; NaN and Inf come out as NaN or Inf, in their own row; the largest magnitude keeps its value."""
    scale = torch.tensor([0.5]) if activation.endswith("static") else None
    x = torch.tensor([[0.0, -0.0, 0, 0, 0, 0], [1, -2, 3, -4, 5, 6], [1, 2, math.nan, 4, 5, 6], [7, 6, 5, 4, 3, 2]])
    found = quantize_activations(x, activation, scale)
    assert not found[0].any()
    assert found[2].isnan().any() and found[[0, 1, 3]].isfinite().all()
    assert torch.equal(found[1, 5], x[1, 5]) or scale is not None
    if scale is None:
        assert not quantize_activations(torch.tensor([[1.0, math.inf]]), activation, None).isfinite().all()
    tiny = torch.full((2, 6), 1e-45)
    assert quantize_activations(tiny, activation, scale).isfinite().all()


def test_large_static_activations_are_cut_off() -> None:
    x = torch.tensor([[1e6, -1e6, 0.26]])
    assert quantize_activations(x, "int8-static", torch.tensor([0.5])).tolist() == [[63.5, -63.5, 0.5]]
    assert quantize_activations(x, "fp8-static", torch.tensor([0.5])).tolist() == [[224.0, -224.0, 0.25]]


# Packing.


@settings(max_examples=100, deadline=None, derandomize=True)
@given(bits=st.integers(2, 8), shape=st.tuples(st.integers(1, 5), st.integers(1, 120)), seed=st.integers(0, 1000))
def test_packing_is_dense_and_undone(bits: int, shape: tuple[int, int], seed: int) -> None:
    torch.manual_seed(seed)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int8)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.int32 and packed.shape == (shape[0], -(-shape[1] * bits // 32))
    for row, words in zip(codes.tolist(), packed.tolist(), strict=True):
        assert fields(words, bits, shape[1]) == row
        last = words[-1] & 0xFFFFFFFF
        assert shape[1] * bits % 32 == 0 or last >> (shape[1] * bits % 32) == 0  # nothing after the last code
    assert torch.equal(unpack_bits(packed, bits, shape[1]), codes)


@pytest.mark.parametrize("bits", range(2, 8))
def test_packing_in_parts_does_not_show(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (50, 70), dtype=torch.int8)
    whole = pack_bits(codes, bits)
    monkeypatch.setattr("optc.runtime.ops.quantized._CODES_AT_ONCE", 300)
    assert torch.equal(pack_bits(codes, bits), whole)
    assert torch.equal(unpack_bits(whole, bits, 70), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packing_is_compressed_tensors_own(bits: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (7, 61), dtype=torch.int8)
    assert torch.equal(helpers.pack_to_int32(codes, bits), pack_bits(codes, bits))
    assert torch.equal(helpers.unpack_from_int32(pack_bits(codes, bits), bits, codes.shape), codes)
    zeros = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (21, 3), dtype=torch.int8)
    assert torch.equal(helpers.pack_to_int32(zeros, bits, packed_dim=0), pack_bits(zeros.t(), bits).t())


@pytest.mark.parametrize("name", scheme_names())
def test_pack_and_unpack_are_inverse(name: str) -> None:
    for floating_zero in (False, True):
        args = find_scheme(name).weights
        weight = random_weight(args, 9, 77, floating_zero=floating_zero and not args.symmetric)
        back = weight.pack().unpack()
        assert torch.equal(back.codes.view(torch.int8), weight.codes.view(torch.int8))
        assert weight.zero is None if back.zero is None else torch.equal(back.zero, weight.zero)
        assert torch.equal(weight.pack().dequantize(), weight.dequantize())


def test_bytes_are_what_the_scheme_says() -> None:
    stored = random_weight(find_scheme("w4a16-g128").weights, 256, 1024, scale_dtype=torch.float16).pack()
    assert 8 * stored.num_bytes() / (256 * 1024) == 4 + 16 / 128
    stored = random_weight(find_scheme("w3a16-g32-asym").weights, 256, 1024, scale_dtype=torch.float16).pack()
    assert 8 * stored.num_bytes() / (256 * 1024) == 3 + 16 / 32 + 3 / 32


ACT_ORDER = Case(scheme="w4a16-g32-asym", shape=(13, 203), act_order=True)


@pytest.mark.parametrize(
    ("scheme", "part", "change", "message"),
    [
        (
            "w4a16-g32",
            "weight",
            lambda w: w[:, :-1],
            r"codes is torch.int32 \[13, 25\], expected torch.int32 \[13, 26\]",
        ),
        ("w4a16-g32", "weight", lambda w: w.to(torch.int8), "codes is torch.int8"),
        ("w8a16", "weight", lambda w: w[:5], r"codes is torch.int8 \[5, 203\]"),
        ("fp8-weight", "weight", lambda w: w.float(), "expected torch.float8_e4m3fn"),
        ("w8a16", "scale", lambda s: s[:, 0], r"scale is torch.float32 \[13\], expected torch.float32 \[13, 1\]"),
        ("w8a16", "scale", lambda s: s.double(), "scale is torch.float64"),
        ("fp8-block", "scale", lambda s: s[:, :1], r"scale is torch.float32 \[1, 1\], expected torch.float32 \[1, 2\]"),
        ("w4a16-g32-asym", "zero", lambda z: z[:1], r"zero is torch.int32 \[1, 7\], expected torch.int32 \[2, 7\]"),
        ("w4a16-g32-asym", "zero", lambda z: z.to(torch.int8), r"zero is torch.int8 \[2, 7\]"),
        ("w4a16-g32-asym", "zero", lambda z: torch.zeros(2, 7), r"zero is torch.float32 \[2, 7\]"),
        ("w4a16-g32-asym", "zero", lambda z: None, "zero is missing, but the scheme is asymmetric"),
        ("w4a16-g32", "zero", lambda z: torch.zeros(13, 7), "zero is there, but the scheme is symmetric"),
        ("w4a16-g32", "group_index", lambda g: torch.zeros(203), "group_index is torch.float32"),
        ("w4a16-g32", "group_index", lambda g: torch.full((203,), 7, dtype=torch.int32), "outside 0 to 6"),
        ("w4a16-g32", "group_index", lambda g: torch.full((203,), -1, dtype=torch.int32), "outside 0 to 6"),
    ],
)
def test_wrong_parts_are_refused(scheme: str, part: str, change: object, message: str) -> None:
    stored = Case(scheme=scheme).weight()
    stored.check()
    with pytest.raises(ValueError, match=message):
        replace(stored, **{part: change(getattr(stored, part))}).check()  # type: ignore[operator]


# Embeddings.


@pytest.mark.parametrize("name", scheme_names())
def test_embedding_is_a_row_of_the_table(name: str) -> None:
    for i, shape in enumerate([(1, 13), (131, 203)]):
        args = find_scheme(name).weights
        case = Case(scheme=name, shape=shape, scale_dtype=DTYPES[i], act_order=args.strategy == "group" and i == 1)
        stored = case.weight()
        ids = torch.randint(0, shape[0], (2, 5))
        parts = (stored.weight, stored.scale, stored.zero, stored.group_index)
        how = (shape[1], args.num_bits, list(args.block(*shape)))
        for dtype in DTYPES:
            found = embedding_quantized_reference(ids, *parts, *how, dtype)
            assert torch.equal(found, stored.dequantize()[ids].to(dtype))


@pytest.mark.parametrize("case", [Case(), Case(scheme="w8a8", dtype=torch.bfloat16, bias=True), ACT_ORDER])
def test_opcheck(case: Case) -> None:
    stored = case.weight()
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.linear_quantized.default, case.arguments(5, stored), test_utils=tests)
    parts = (stored.weight, stored.scale, stored.zero, stored.group_index)
    how = (case.shape[1], stored.args.num_bits, list(stored.args.block(*case.shape)), case.dtype)
    torch.library.opcheck(OPS.embedding_quantized.default, (torch.tensor([[0, 12]]), *parts, *how), test_utils=tests)


def test_e4m3_here_is_torchs() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    torch.testing.assert_close(codes, torch.tensor([e4m3(byte) for byte in range(256)]), equal_nan=True, rtol=0, atol=0)


def test_asymmetric_per_tensor() -> None:
    """One scale and one zero point for all, which imported checkpoints have."""
    args = QuantizationArgs(strategy="tensor", symmetric=False)
    stored = random_weight(args, 5, 30).pack()
    stored.check()
    assert stored.zero is not None and stored.zero.shape == (1, 1)
    torch.testing.assert_close(stored.dequantize().double(), meaning(stored), rtol=1e-6, atol=1e-6)
