"""HQQ: zero points, or scales, that fit the bulk of the weights and let outliers go. Needs no data."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.ops.quantized import QuantizedWeight
from ...runtime.scheme import QuantizationArgs
from .rtn import choose_scales, nearest_codes


def hqq(
    weight: Tensor,
    args: QuantizationArgs,
    scale_dtype: torch.dtype,
    *,
    power: float = 0.7,
    beta: float = 10.0,
    growth: float = 1.01,
    iterations: int = 20,
) -> QuantizedWeight:
    """Round to nearest around the zero points that give the least sum of |W - dequantized|^power, power < 1.

    Half-quadratic splitting (Badri & Shaji 2023, "Half-Quadratic Quantization"): the error is split into a sparse part,
    which shrinkage takes from it, and the rest, whose squares have a closed form minimum; in turns, with beta growing. It
    starts from the ranges of rounding to nearest, and each group keeps the best it has seen.

    The paper fits zero points, stored as numbers in the dtype of the scales. A symmetric scheme has none, so there the
    scale is fitted, by the same split.

    Args:
        weight: f32[N, K].
        args: integer codes, scales of rows or of groups in them.
        scale_dtype: what scales and zero points are stored in; codes are chosen for them as they are stored.
        power: of the error that is minimized.
        beta, growth: weight of the quadratic term, and what it is multiplied by each time; the paper's values. Errors
            count in steps of the codes.
        iterations: the most that are made.
    """
    assert args.type == "int" and args.block(*weight.shape)[0] == 1
    scale, zero = choose_scales(weight, args, scale_dtype)
    groups = weight.unflatten(1, (scale.shape[1], -1))
    steps, offset = scale[..., None], (torch.zeros(1) if zero is None else zero[..., None]).to(scale_dtype)
    best_steps, best_offset = steps, offset.expand_as(steps)
    least = torch.full_like(steps, float("inf"), dtype=torch.float32)
    for _ in range(iterations):
        codes = nearest_codes(groups, steps.float(), offset.float(), args)
        error = groups / steps.float() - (codes - offset.float())
        loss = (error * steps.float()).abs().pow(power).sum(dim=-1, keepdim=True)
        better = loss < least
        if not better.any():
            break
        least = torch.where(better, loss, least)
        best_steps, best_offset = torch.where(better, steps, best_steps), torch.where(better, offset, best_offset)
        rest = error - _shrink(error, beta, power)
        if args.symmetric:
            steps = _refitted(codes, steps.float(), rest).to(scale_dtype)
        else:
            offset = (offset.float() - rest.mean(dim=-1, keepdim=True)).to(scale_dtype)
        beta *= growth
    scale, offset = best_steps.squeeze(-1), best_offset
    codes = nearest_codes(groups, best_steps.float(), offset.float(), args).to(torch.int8).flatten(1)
    return QuantizedWeight(codes, scale, None if args.symmetric else offset.squeeze(-1).contiguous(), None, args)


def _shrink(error: Tensor, beta: float, power: float) -> Tensor:
    """The sparse part: least of |e|^power + beta / 2 (e - error)^2, by generalized soft thresholding."""
    size = error.abs()
    return error.sign() * (size - size.clamp_min(1e-8).pow(power - 1) / beta).clamp_min(0)


def _refitted(codes: Tensor, steps: Tensor, rest: Tensor) -> Tensor:
    """The steps for which codes * steps comes nearest to the weight without its sparse error: least squares."""
    energy = codes.square().sum(dim=-1, keepdim=True)
    fitted = steps * (1 + (codes * rest).sum(dim=-1, keepdim=True) / energy.clamp_min(1))
    return torch.where(fitted == 0, steps, fitted)
