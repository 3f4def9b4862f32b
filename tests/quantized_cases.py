"""Random stored weights of any scheme, and arguments of the ops that use them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optc.runtime.ops.quantized import FP8, QuantizedWeight, StoredWeight
from optc.runtime.scheme import QuantizationArgs, find_scheme, scheme_names

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# What rounding to the dtype of a result adds to its error, relative to the result.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
ROWS_OF_X = (1, 2, 3, 5, 16, 17, 64, 257)
# [N, K]: one output, fewer columns than a register; sizes that no group, tile or word divides; two blocks of 128 rows.
SHAPES = [(1, 13), (13, 203), (131, 261)]


def random_weight(
    args: QuantizationArgs,
    rows: int,
    columns: int,
    *,
    scale_dtype: torch.dtype = torch.float32,
    floating_zero: bool = False,
    act_order: bool = False,
) -> QuantizedWeight:
    """Codes of the whole range, scales of both signs, zero points if the scheme is asymmetric."""
    block = args.block(rows, columns)
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    if args.type == "float":
        codes = (torch.randn(rows, columns) * 2.0 ** torch.randint(-9, 8, (rows, columns))).clamp(-448, 448).to(FP8)
    else:
        lowest, highest = args.code_range()
        codes = torch.randint(lowest, highest + 1, (rows, columns), dtype=torch.int8)
    scale = ((torch.rand(grid) + 0.1) * torch.where(torch.rand(grid) < 0.2, -1, 1) / 100).to(scale_dtype)
    zero = None
    if floating_zero:
        zero = (torch.randn(grid) * 3).to(scale_dtype)
    elif not args.symmetric:
        zero = torch.randint(lowest, highest + 1, grid, dtype=torch.int8)
    group_index = (torch.randperm(columns) // block[1]).int() if act_order else None
    return QuantizedWeight(codes, scale, zero, group_index, args)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A linear layer: `scheme` with rows of x and the shape [N, K] of its weight."""

    scheme: str = "w4a16-g32"
    shape: tuple[int, int] = (13, 203)
    dtype: torch.dtype = torch.float32
    scale_dtype: torch.dtype = torch.float32
    bias: bool = False
    floating_zero: bool = False
    act_order: bool = False
    seed: int = 0

    def weight(self) -> StoredWeight:
        torch.manual_seed(self.seed)
        weight = random_weight(
            find_scheme(self.scheme).weights,
            *self.shape,
            scale_dtype=self.scale_dtype,
            floating_zero=self.floating_zero,
            act_order=self.act_order,
        )
        return weight.pack()

    def arguments(self, rows: int, stored: StoredWeight | None = None) -> tuple[Any, ...]:
        """For optc::linear_quantized; one row of x in seven is zeros, and one number in fifty an outlier."""
        stored = stored or self.weight()
        scheme = find_scheme(self.scheme)
        x = torch.randn(rows, self.shape[1]) * torch.where(torch.rand(rows, self.shape[1]) < 0.02, 30, 1)
        x[3::7] = 0
        bias = torch.randn(self.shape[0]).to(self.dtype) if self.bias else None
        input_scale = torch.tensor([0.02]) if scheme.activation.endswith("static") else None
        block = list(stored.args.block(*self.shape))
        parts = (stored.weight, stored.scale, stored.zero, stored.group_index)
        return x.to(self.dtype), *parts, input_scale, bias, stored.args.num_bits, block, scheme.activation


def all_cases() -> list[Case]:
    """Every scheme with every shape; dtypes, bias and the rarer parts of a weight take turns."""
    cases = []
    for i, name in enumerate(scheme_names()):
        weights = find_scheme(name).weights
        for j, shape in enumerate(SHAPES):
            turn = i + j
            cases.append(
                Case(
                    scheme=name,
                    shape=shape,
                    dtype=DTYPES[turn % 3],
                    scale_dtype=DTYPES[(turn // 3) % 3],
                    bias=turn % 2 == 0,
                    floating_zero=not weights.symmetric and turn % 4 == 1,
                    act_order=weights.strategy == "group" and turn % 4 == 2,
                    seed=turn,
                )
            )
    return cases


def assert_near(found: Tensor, expected: Tensor, size: Tensor, dtype: torch.dtype) -> None:
    """Within float32 sums of numbers whose magnitudes add up to `size`, and the rounding to `dtype`."""
    assert found.dtype == dtype and found.shape == expected.shape
    allowed = ROUNDING[dtype] * expected.double().abs() + 2e-6 * size.double() + 1e-30
    if dtype == torch.float16:
        allowed += 2**-25  # subnormal
    excess = (found.double() - expected.double()).abs() - allowed
    assert excess.max() <= 0, f"off by {excess.max().item()} more than allowed"
