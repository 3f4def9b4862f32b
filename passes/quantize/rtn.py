"""Round to nearest, and the choice of scales that every algorithm starts from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...runtime.ops.quantized import FP8, FP8_MAX, QuantizedWeight
from ...runtime.scheme import QuantizationArgs

# Fractions of the range that are tried as scales. With 8 bits nothing is worth cutting, but where the steps fall counts.
_GRID: tuple[float, ...] = tuple(torch.linspace(1.1, 0.48, 32).tolist())
_GRID_8_BITS: tuple[float, ...] = tuple(torch.linspace(1.07, 0.93, 24).tolist())
_VALUES_AT_ONCE = 2**16  # so that a chunk and what is computed from it stay in the cache


def rtn(
    weight: Tensor,
    args: QuantizationArgs,
    scale_dtype: torch.dtype,
    *,
    mse: bool = True,
    importance: Tensor | None = None,
    grid: Sequence[float] | None = None,
) -> QuantizedWeight:
    """Round each weight to the nearest code.

    Args:
        weight: f32[N, K].
        args: of the weight.
        scale_dtype: what scales are stored in; codes are chosen for the scale as it is stored.
        mse: choose each scale for the least squared error, over a grid and then by least squares; else for the range.
        importance: f32[K]: weights of the squared errors of each column, such as the mean square of its input.
        grid: the fractions of the range that are tried, if not the usual ones.
    """
    scale, zero = choose_scales(weight, args, scale_dtype, mse=mse, importance=importance, grid=grid)
    return QuantizedWeight(round_to(weight, scale, zero, args), scale, zero, None, args)


def choose_scales(
    weight: Tensor,
    args: QuantizationArgs,
    scale_dtype: torch.dtype,
    *,
    mse: bool = True,
    importance: Tensor | None = None,
    grid: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scale [ceil(N / rows), ceil(K / columns)] in `scale_dtype` and, if asymmetric, zero points int8 of that shape."""
    blocks = _blocks(weight, args)
    weights = None
    if importance is not None:
        rows, _ = args.block(*weight.shape)
        spread = importance.float().clamp_min(importance.float().mean() * 1e-6 + 1e-30)
        weights = _blocks(spread.expand(rows, -1), args)
    scales, zeros = [], []
    grid = grid or (_GRID_8_BITS if args.num_bits == 8 else _GRID)
    for part in blocks.split(max(1, _VALUES_AT_ONCE // blocks[0].numel())):
        scale, zero = _search(part, args, scale_dtype, weights if mse else None, grid if mse else ())
        scales.append(scale)
        zeros.append(zero)
    return torch.cat(scales), None if args.symmetric else torch.cat(zeros).to(torch.int8)


def _blocks(weight: Tensor, args: QuantizationArgs) -> Tensor:
    """[N, K] -> [row blocks, column blocks, elements], padded with zeros, which no range or error sees."""
    rows, columns = args.block(*weight.shape)
    padded: Tensor = torch.nn.functional.pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
    blocks: Tensor = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).transpose(1, 2).flatten(2)
    return blocks


def largest_of_blocks(weight: Tensor, args: QuantizationArgs) -> Tensor:
    """The largest magnitude of the weights that share a scale: f32[ceil(N / rows), ceil(K / columns)]."""
    return _blocks(weight, args).abs().amax(dim=-1)


def _search(
    blocks: Tensor, args: QuantizationArgs, dtype: torch.dtype, importance: Tensor | None, grid: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The scale and zero point of each block [R, G, E] -> [R, G]."""
    best_scale, best_zero = _from_range(blocks, args, dtype, 1.0, 1.0)
    if not grid:
        return best_scale, best_zero
    values, least = torch.empty_like(blocks), torch.full_like(best_zero, torch.inf)

    def consider(scale: Tensor, zero: Tensor) -> None:
        nonlocal best_scale, best_zero, least
        loss = _loss(blocks, scale.float()[..., None], zero[..., None], args, importance, values)
        better = loss < least
        least = torch.where(better, loss, least)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)

    consider(best_scale, best_zero)
    # A symmetric integer range has one code more below zero; a negative scale turns it upside down.
    signs = (1.0, -1.0) if args.type == "int" and args.symmetric and args.num_bits < 8 else (1.0,)
    for shrink in grid:
        for sign in signs:
            consider(*_from_range(blocks, args, dtype, shrink, sign))
    for _ in range(2):
        consider(_least_squares(blocks, best_scale, best_zero, args, importance), best_zero)
    return best_scale, best_zero


def _least_squares(
    blocks: Tensor, scale: Tensor, zero: Tensor, args: QuantizationArgs, importance: Tensor | None
) -> Tensor:
    """The best scale for the codes that this scale leads to, as it is stored; this scale where there is none."""
    levels = nearest_codes(blocks, scale.float()[..., None], zero[..., None], args) - zero[..., None]
    weighted = levels if importance is None else levels * importance
    best = ((weighted * blocks).sum(dim=-1) / (weighted * levels).sum(dim=-1)).to(scale.dtype)
    return torch.where(torch.isfinite(best) & (best * scale > 0), best, scale)


def _from_range(
    blocks: Tensor, args: QuantizationArgs, dtype: torch.dtype, shrink: float, sign: float
) -> tuple[Tensor, Tensor]:
    if args.type == "float":
        scale = blocks.abs().amax(dim=-1) / FP8_MAX * shrink
        return _storable(scale, dtype), torch.zeros_like(scale)
    lowest, highest = args.code_range()
    if args.symmetric:
        # 4 bits: codes -8 to 7. The range is divided by 7.5 and the largest may be cut, or by 8 if the sign is right.
        scale = sign * blocks.abs().amax(dim=-1) * shrink / ((highest - lowest) / 2)
        return _storable(scale, dtype), torch.zeros_like(scale)
    low, high = blocks.amin(dim=-1).clamp_max(0) * shrink, blocks.amax(dim=-1).clamp_min(0) * shrink
    scale = _storable((high - low) / (highest - lowest), dtype)
    zero = (lowest - low / scale.float()).round().clamp(lowest, highest)
    return scale, zero


def _storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """In the dtype it is stored in; the smallest that this has where it would vanish, and 1 where the block is all zeros."""
    limits = torch.finfo(dtype)
    smallest = torch.full_like(scale, limits.smallest_normal * limits.eps)
    rounded = scale.to(dtype).float()
    stored = torch.where((rounded == 0) & (scale != 0), smallest.copysign(scale), rounded)
    return torch.where((stored == 0) | ~torch.isfinite(stored), 1.0, stored).to(dtype)


def _loss(
    blocks: Tensor, scale: Tensor, zero: Tensor, args: QuantizationArgs, importance: Tensor | None, values: Tensor
) -> Tensor:
    """Squared error of each block [R, G, E] -> [R, G]; `values` is memory of the shape of `blocks` to work in."""
    if args.type == "float":
        values.copy_(nearest_codes(blocks, scale, zero, args))
    else:
        torch.div(blocks, scale, out=values).add_(zero).round_().clamp_(*args.code_range()).sub_(zero)
    values.mul_(scale).sub_(blocks).square_()
    return (values if importance is None else values.mul_(importance)).sum(dim=-1)


def nearest_codes(values: Tensor, scale: Tensor, zero: Tensor, args: QuantizationArgs) -> Tensor:
    """The nearest code of each value, as float32."""
    scaled = values / scale + zero
    if args.type == "float":
        return scaled.clamp(-FP8_MAX, FP8_MAX).to(FP8).float()
    return scaled.round().clamp(*args.code_range())


def round_to(weight: Tensor, scale: Tensor, zero: Tensor | None, args: QuantizationArgs) -> Tensor:
    """Weight f32[N, K] -> codes [N, K] for these scales; `zero` int8, floating or none."""
    shape = (weight.shape[0], weight.shape[1])
    block = args.block(*shape)
    zeros = torch.zeros(1) if zero is None else spread(zero, block, shape)
    codes = nearest_codes(weight, spread(scale, block, shape), zeros, args)
    return codes.to(FP8 if args.type == "float" else torch.int8)


def spread(values: Tensor, block: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Scales or zero points of blocks of a matrix -> of each of its elements, f32[shape]."""
    tall = values.float().repeat_interleave(block[0], 0)[: shape[0]]
    return tall.repeat_interleave(block[1], 1)[:, : shape[1]]
