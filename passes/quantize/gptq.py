"""GPTQ: codes chosen column by column, the error of each column made good by those after it; then refined."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...runtime.ops.quantized import QuantizedWeight
from ...runtime.scheme import QuantizationArgs
from .rtn import nearest_codes, rtn, spread

_COLUMNS_AT_ONCE = 128


@dataclass(frozen=True)
class Factors:
    """A Hessian and what GPTQ needs of it, each f32[K, K]; the same for all weights that have these inputs.

    Attributes:
        hessian: H = mean of x^T x over inputs x [tokens, K].
        damped: H with more on its diagonal.
        order: i64[K], in which diag(H) falls. Rows and columns of the factors are in it.
        lower: L, lower triangular, with L L^T = damped.
        inverse: U, upper triangular, with U^T U = damped^-1.
    """

    hessian: Tensor = field(repr=False)
    damped: Tensor = field(repr=False)
    order: Tensor = field(repr=False)
    lower: Tensor = field(repr=False)
    inverse: Tensor = field(repr=False)


def factor(hessian: Tensor, *, damping: float = 0.01) -> Factors:
    """Factor H + damping, f32[K, K] and finite.

    `damping` is what is added to diag(H), in means of diag(H); it is doubled until H + damping can be factored.
    """
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True, stable=True)
    unit = torch.where(diagonal.mean() > 0, diagonal.mean(), torch.ones(()))
    while True:
        damped = hessian + torch.diag((damping * unit).expand_as(diagonal))
        lower, failed = torch.linalg.cholesky_ex(damped[order][:, order])
        if not failed:
            inverse, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return Factors(hessian, damped, order, lower, inverse)
        damping = max(2 * damping, 1e-4)
        assert damping < 1e4, "a finite H with this damping is dominated by its diagonal"


def gptq(
    weight: Tensor, factors: Factors, args: QuantizationArgs, scale_dtype: torch.dtype, *, rounds: int = 3
) -> QuantizedWeight:
    """Codes that keep the products with the measured inputs: Q = dequantized with least tr((Q - W) H (Q - W)^T).

    Frantar et al. 2022 (arXiv 2210.17323, algorithm 1). Scales are chosen before any code, as they are stored, so that
    the columns can go in the order of falling diag(H) at no later cost. Coordinate descent on the same loss follows:
    each code given the others (QuantEase, arXiv 2309.01885), then each scale given the others and the codes. Last, a row
    that rounding to nearest serves better takes that, so the loss is never larger.

    A column whose input was always zero does not touch the others and is rounded to nearest.

    Args:
        weight: f32[N, K], finite.
        factors: of H.
        args: integer codes, with scales of rows or of groups in them.
        scale_dtype: what scales are stored in.
        rounds: of coordinate descent; with none, this is plain GPTQ.
    """
    rows, group = args.block(*weight.shape)
    assert args.type == "int" and rows == 1
    nearest = rtn(weight, args, scale_dtype, importance=factors.hessian.diagonal())
    state = _Columns.of(nearest, weight)
    _compensate(state, factors.inverse, factors.order)
    for _ in range(rounds):
        _descend(state, factors.damped)
        _refit(state, factors.damped, group)
    return _better_rows(state.quantized(nearest), nearest, weight, factors.hessian)


def make_good(weight: Tensor, factors: Factors, cross: Tensor) -> Tensor:
    """The weight that makes good what the layers before it lost: f32[N, K].

    With x the inputs in the quantized model and x' the same in the original one, the result V has the least mean square
    of x V^T - x' W^T, so that x V^T is as near to the original output as a linear layer can bring it. It is ridge
    regression towards W:  V = W + W (C - H)^T (H + damping)^-1, C = `cross`.

    Li et al. 2025 (GPTAQ, arXiv 2504.02692) have the same aim; they build it into the column loop.

    Args:
        weight: W, f32[N, K].
        factors: of H, mean of x^T x.
        cross: mean of x^T x', f32[K, K].
    """
    wanted = ((cross - factors.hessian) @ weight.t())[factors.order]
    correction: Tensor = torch.cholesky_solve(wanted, factors.lower)
    return weight + correction[factors.order.argsort()].t()


@dataclass
class _Columns:
    """The work in progress, transposed, so that a column of the weight lies in one piece.

    Attributes:
        weight: W^T, f32[K, N].
        codes: f32[K, N].
        scale, zero: of each element, f32[K, N]; `zero` f32[K, 1] of zeros if symmetric.
        args: of the weight.
        scale_dtype: what scales are stored in.
    """

    weight: Tensor
    codes: Tensor
    scale: Tensor
    zero: Tensor
    args: QuantizationArgs
    scale_dtype: torch.dtype

    @classmethod
    def of(cls, start: QuantizedWeight, weight: Tensor) -> _Columns:
        shape = (*weight.shape,)
        zero = (
            torch.zeros(shape[1], 1) if start.zero is None else spread(start.zero, start.block, shape).t().contiguous()
        )
        scale = spread(start.scale, start.block, shape).t().contiguous()
        return cls(
            weight.t().contiguous(), start.codes.t().float().contiguous(), scale, zero, start.args, start.scale.dtype
        )

    def round(self, column: int, values: Tensor) -> Tensor:
        """Choose a column's codes for these values; gives what they mean."""
        self.codes[column] = nearest_codes(values, self.scale[column], self.zero[column], self.args)
        return (self.codes[column] - self.zero[column]) * self.scale[column]

    def error(self) -> Tensor:
        """(Q - W)^T, f32[K, N]."""
        return (self.codes - self.zero) * self.scale - self.weight

    def quantized(self, start: QuantizedWeight) -> QuantizedWeight:
        codes = self.codes.t().to(torch.int8).contiguous()
        scale = self.scale[:: start.block[1]].t().to(self.scale_dtype).contiguous()
        return replace(start, codes=codes, scale=scale)


def _compensate(state: _Columns, inverse: Tensor, order: Tensor) -> None:
    """GPTQ: round the columns in this order and let those after each take up its error."""
    weight = state.weight[order]
    for start in range(0, len(weight), _COLUMNS_AT_ONCE):
        end = min(start + _COLUMNS_AT_ONCE, len(weight))
        block, inner = weight[start:end], inverse[start:end, start:end]
        errors = torch.empty_like(block)
        for i, column in enumerate(order[start:end].tolist()):
            errors[i] = (block[i] - state.round(column, block[i])) / inner[i, i]
            block[i + 1 :].addr_(inner[i, i + 1 :], errors[i], alpha=-1)
        weight[end:].addmm_(inverse[start:end, end:].t(), errors, alpha=-1)


def _descend(state: _Columns, hessian: Tensor) -> None:
    """Give each column in turn the codes that are best while all other columns stay."""
    errors = state.error()
    for start in range(0, len(errors), _COLUMNS_AT_ONCE):
        end = min(start + _COLUMNS_AT_ONCE, len(errors))
        slopes, inner = hessian[start:end] @ errors, hessian[start:end, start:end]
        for i, column in enumerate(range(start, end)):
            value = state.weight[column] + errors[column]
            change = state.round(column, value - slopes[i] / inner[i, i]) - value
            errors[column] += change
            slopes[i + 1 :].addr_(inner[i + 1 :, i], change)


def _refit(state: _Columns, hessian: Tensor, group: int) -> None:
    """Give each group's scale in turn the value, of those that can be stored, that is best while all else stays."""
    errors = state.error()
    for start in range(0, len(errors), group):
        part = slice(start, start + group)
        levels, old = state.codes[part] - state.zero[part], state.scale[start]
        slope = (levels * (hessian[part] @ errors)).sum(dim=0)
        curvature = (levels * (hessian[part, part] @ levels)).sum(dim=0)
        best = (old - slope / curvature).to(state.scale_dtype).float()
        new = torch.where(torch.isfinite(best) & (best * old > 0), best, old)
        errors[part] += levels * (new - old)
        state.scale[part] = new


def _better_rows(found: QuantizedWeight, nearest: QuantizedWeight, weight: Tensor, hessian: Tensor) -> QuantizedWeight:
    """Each row from where its loss is smaller."""

    def loss(quantized: QuantizedWeight) -> Tensor:
        error = quantized.dequantize() - weight
        return (error @ hessian * error).sum(dim=1)

    better = (loss(found) <= loss(nearest))[:, None]
    codes = torch.where(better, found.codes, nearest.codes)
    return replace(found, codes=codes, scale=torch.where(better, found.scale, nearest.scale))
