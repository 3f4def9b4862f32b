"""Rounding to nearest, and the choice of scales."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optc.passes.quantize.rtn import choose_scales, round_to, rtn
from optc.runtime.ops.quantized import FP8, QuantizedWeight
from optc.runtime.scheme import QuantizationArgs, find_scheme

SCHEMES = ["w8a16", "w8a16-g32", "w4a16-g32", "w4a16-g128-asym", "w4a16-channel", "w3a16-g64", "w3a16-g32-asym"]
FLOATS = ["fp8-weight", "fp8-tensor", "fp8-block"]


def awkward(rows: int, columns: int, seed: int, magnitude: float) -> Tensor:
    """Normal weights with a zero row, a constant stretch, an outlier, denormals and a zero stretch."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * magnitude
    weight[0] = 0
    weight[-1, : columns // 2] = magnitude
    weight[rows // 2, columns // 2] = 100 * magnitude
    weight[rows // 3, : columns // 3] = 1e-41
    weight[2 * rows // 3, columns // 2 :] = 0
    return weight


def squared_error(quantized: QuantizedWeight, weight: Tensor) -> Tensor:
    return (quantized.dequantize() - weight).square().sum(dim=1)


@pytest.mark.parametrize("name", SCHEMES + FLOATS)
@settings(max_examples=15)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 300),
    seed=st.integers(0, 99),
    magnitude=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_codes_are_the_nearest_for_scales_as_stored(
    name: str, rows: int, columns: int, seed: int, magnitude: float, dtype: torch.dtype
) -> None:
    args, weight = find_scheme(name).weights, awkward(rows, columns, seed, magnitude)
    found = rtn(weight, args, dtype)
    block = args.block(rows, columns)
    assert found.scale.dtype == dtype
    assert found.scale.shape == (-(-rows // block[0]), -(-columns // block[1]))
    assert torch.isfinite(found.scale).all() and (found.scale != 0).all()
    assert (found.zero is None) == args.symmetric
    assert torch.equal(found.codes, round_to(weight, found.scale, found.zero, args))
    assert torch.isfinite(found.dequantize()).all()
    found.pack().check()
    if args.type == "int":
        lowest, highest = args.code_range()
        assert found.codes.dtype == torch.int8
        assert lowest <= found.codes.min() and found.codes.max() <= highest
        for other in (found.codes - 1, found.codes + 1):
            inside = (lowest <= other) & (other <= highest)
            moved = QuantizedWeight(other, found.scale, found.zero, None, args).dequantize()
            farther = (moved - weight).abs() >= (found.dequantize() - weight).abs() * (1 - 1e-5)
            assert (farther | ~inside).all()
    else:
        assert found.codes.dtype == FP8


@pytest.mark.parametrize("name", SCHEMES + FLOATS)
@pytest.mark.parametrize("is_weighted", [False, True])
def test_the_search_is_never_worse_than_the_range(name: str, is_weighted: bool) -> None:
    args, weight = find_scheme(name).weights, awkward(48, 256, 0, 0.02)
    importance = torch.rand(256) + 0.01 if is_weighted else None
    weights = torch.ones(256) if importance is None else importance
    searched, ranged = (rtn(weight, args, torch.bfloat16, mse=mse, importance=importance) for mse in (True, False))
    losses = [((q.dequantize() - weight).square() * weights).sum(dim=1) for q in (searched, ranged)]
    if args.block(48, 256)[0] == 1:
        assert (losses[0] <= losses[1] * (1 + 1e-5)).all()
    assert losses[0].sum() <= losses[1].sum() * (1 + 1e-5)


@pytest.mark.parametrize(("name", "ratio"), [("w4a16-g128", 0.8), ("w3a16-g128", 0.75), ("w8a16-g32", 0.95)])
def test_the_search_gains_on_normal_weights(name: str, ratio: float) -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    args = find_scheme(name).weights
    searched, ranged = (squared_error(rtn(weight, args, torch.bfloat16, mse=mse), weight) for mse in (True, False))
    assert searched.sum() < ratio * ranged.sum()


def test_importance_moves_the_error_to_other_columns() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    importance = torch.ones(128)
    importance[::16] = 1000.0
    args = find_scheme("w3a16-g128").weights
    plain, weighted = (
        rtn(weight, args, torch.bfloat16, importance=i).dequantize() - weight for i in (None, importance)
    )
    assert weighted[:, ::16].square().sum() < 0.7 * plain[:, ::16].square().sum()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_lowest_code_serves_either_side(sign: float) -> None:
    """Weights at -8 to 7 steps, or 8 to -7: exact with a scale of the right sign."""
    weight = sign * torch.arange(-8.0, 8.0).repeat(2)[None] * 0.25
    found = rtn(weight, find_scheme("w4a16-g32").weights, torch.bfloat16)
    assert torch.equal(found.dequantize(), weight)
    assert found.scale.item() == sign * 0.25


def test_an_outlier_in_one_group_leaves_the_others_alone() -> None:
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    args = find_scheme("w4a16-g32").weights
    plain = rtn(weight, args, torch.bfloat16)
    weight[0, 3] = 1000.0
    changed = rtn(weight, args, torch.bfloat16)
    assert torch.equal(plain.codes[1:], changed.codes[1:])
    assert torch.equal(plain.codes[0, 32:], changed.codes[0, 32:])


def test_chunks_do_not_show() -> None:
    """A weight of more than one chunk gives what its rows give alone."""
    weight = torch.randn(300, 512, generator=torch.Generator().manual_seed(0))
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=64)
    whole, _ = choose_scales(weight, args, torch.bfloat16)
    parts = [choose_scales(part, args, torch.bfloat16)[0] for part in weight.split(37)]
    assert torch.equal(whole, torch.cat(parts))
