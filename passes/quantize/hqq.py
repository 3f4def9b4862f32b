"""HQQ: zero points that fit the bulk of the weights and let outliers go. Needs no data."""

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
    """Round to nearest around zero points that give a small sum of |W - dequantized|^power, power < 1.

    Half-quadratic splitting (Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models"): the
    error is split into a sparse part, which shrinkage takes from it, and a rest, whose least squares have a closed form;
    in turns, with beta growing. Zero points are numbers in the dtype of the scales. The scales, and where the zero points
    start, are those of rounding to nearest. Each group keeps the zero point with the least mean magnitude of the error.

    Args:
        weight: f32[N, K].
        args: asymmetric integer codes, with scales of rows or of groups in them.
        scale_dtype: what scales and zero points are stored in; codes are chosen for them as they are stored.
        power: of the error that is minimized.
        beta, growth: weight of the quadratic term, and what it is multiplied by each time. Errors count in steps of codes.
        iterations: the most that are made; fewer if no group gets better.
    """
    assert not args.symmetric and args.type == "int" and args.block(*weight.shape)[0] == 1
    scale, start = choose_scales(weight, args, scale_dtype)
    assert start is not None
    groups, steps = weight.unflatten(1, (scale.shape[1], -1)), scale.float()[..., None]
    zero = best = start[..., None].to(scale_dtype)
    least = torch.full_like(steps, float("inf"))
    for _ in range(iterations):
        error = groups / steps - (nearest_codes(groups, steps, zero.float(), args) - zero.float())
        loss = error.abs().mean(dim=-1, keepdim=True)
        better = loss < least
        if not better.any():
            break
        best, least = torch.where(better, zero, best), torch.where(better, loss, least)
        rest = error - _shrink(error, beta, power)
        zero = (zero.float() - rest.mean(dim=-1, keepdim=True)).to(scale_dtype)
        beta *= growth
    codes = nearest_codes(groups, steps, best.float(), args).to(torch.int8).flatten(1)
    return QuantizedWeight(codes, scale, best.squeeze(-1), None, args)


def _shrink(error: Tensor, beta: float, power: float) -> Tensor:
    """The sparse part: least of |e|^power + beta / 2 (e - error)^2, by generalized soft thresholding."""
    size = error.abs()
    return error.sign() * (size - size.clamp_min(1e-8).pow(power - 1) / beta).clamp_min(0)
