"""HQQ against rounding to nearest, and its zero points as they are stored."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optc.errors import UsageError
from optc.passes.quantize.hqq import _shrink, hqq
from optc.passes.quantize.recipe import Recipe, Rule
from optc.passes.quantize.rtn import rtn
from optc.runtime.scheme import find_scheme

SCHEMES = ["w4a16-g32-asym", "w4a16-g128-asym", "w3a16-g64-asym", "w3a16-channel-asym", "w8a16-g32-asym"]


def heavy_tailed(rows: int, columns: int, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return 0.02 * torch.distributions.StudentT(4.0).sample((rows, columns))


@pytest.mark.parametrize("name", SCHEMES)
def test_the_error_is_less_than_with_whole_zero_points(name: str) -> None:
    weight, args = heavy_tailed(64, 256), find_scheme(name).weights
    nearest = rtn(weight, args, torch.bfloat16).dequantize() - weight
    fitted = hqq(weight, args, torch.bfloat16).dequantize() - weight
    assert fitted.abs().mean() < nearest.abs().mean()
    assert fitted.square().mean() < nearest.square().mean()


@given(
    st.sampled_from(SCHEMES),
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from([1e-6, 1.0, 1e4]),
    st.integers(0, 9),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_what_is_stored_means_the_same(
    name: str, rows: int, groups: int, size: float, zeros: int, dtype: torch.dtype
) -> None:
    args = find_scheme(name).weights
    weight = size * heavy_tailed(rows, 128 * groups, seed=rows)
    weight[:, :zeros] = 0
    if zeros > 5:
        weight[0] = size  # constant groups
    found = hqq(weight, args, dtype)
    assert found.zero is not None and found.zero.dtype == found.scale.dtype == dtype
    low, high = args.code_range()
    assert low <= found.codes.min() and found.codes.max() <= high
    stored = found.pack()
    stored.check()
    assert torch.equal(stored.dequantize(), found.dequantize())
    nearest = rtn(weight, args, dtype).dequantize() - weight
    bound = nearest.abs().mean() * 1.001 + 1e-3 * weight.abs().mean()  # the start, up to its zero point in the dtype
    assert (found.dequantize() - weight).abs().mean() <= bound


@given(st.floats(-3, 3), st.floats(1, 50))
def test_shrinkage_gives_zero_or_a_point_where_the_loss_is_flat(error: float, beta: float) -> None:
    """|e|^0.7 / 0.7 + beta / 2 (e - error)^2 has its stationary point where e = error - |e|^-0.3 / beta."""
    (sparse,) = _shrink(torch.tensor([error]), beta, 0.7).tolist()
    assert abs(sparse) <= abs(error) and sparse * error >= 0
    assert sparse == 0 or abs(abs(error) - abs(error) ** -0.3 / beta - abs(sparse)) < 1e-5


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(default="w4a16-g128", rounding="hqq"),
        Recipe(default="w8a8", rounding="hqq"),
        Recipe(rules=(Rule(role="mlp", scheme="w3a16-g64", rounding="hqq"),)),
    ],
)
def test_symmetric_schemes_are_refused(recipe: Recipe) -> None:
    with pytest.raises(UsageError, match=r"hqq fits zero points.*-asym"):
        recipe.check_names()


def test_fp8_and_asymmetric_schemes_are_not_refused() -> None:
    rule = Rule(role="mlp", scheme="fp8-weight")
    Recipe(default="w4a16-g128-asym", rounding="hqq", rules=(rule,)).check_names()
