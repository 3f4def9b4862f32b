"""optc::linear_fp8: a linear layer whose weight is stored as FP8 E4M3 with one scale for each output."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import LIBRARY

LIBRARY.define("linear_fp8(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor")


def dequantize_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    """Weight float8_e4m3fn[N, K], scale f32[N] -> f32[N, K]: the stored weight, and the oracle of every FP8 kernel."""
    return weight.float() * scale[:, None]


def linear_fp8_reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """X [..., K] times the dequantized weight, rounded to x's dtype, plus bias [N] -> [..., N] in x's dtype."""
    return torch.nn.functional.linear(x, dequantize_fp8(weight, scale).to(x.dtype), bias)


def _linear_fp8_fake(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


LIBRARY.impl("linear_fp8", linear_fp8_reference, "CompositeExplicitAutograd")
torch.library.register_fake("optc::linear_fp8", _linear_fp8_fake, lib=LIBRARY)
