"""RMSNorm in one op, alone and together with the sum that it normalizes.

    optc::rms_norm(x, weight, eps, weight_offset)                  x / rms(x) * (weight_offset + weight)
    optc::add_rms_norm(x, residual, weight, eps, weight_offset)    the same of x + residual, and that sum

Everything is float32 until the result is rounded, once, to x's dtype. Modelling files round in between too, so that in 16
bits the ops may differ from them in the last bit, on the accurate side. The sum is rounded to x's dtype first, as it goes on
that way, and the norm is of the rounded sum: `add_rms_norm` gives to the bit what `rms_norm` gives for x + residual.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import LIBRARY

LIBRARY.define("rms_norm(Tensor x, Tensor weight, float eps, float weight_offset) -> Tensor")


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> Tensor:
    """Float x [..., D], float weight [D] -> [..., D] in x's dtype. `weight_offset` is 1 for norms that multiply by 1 + w."""
    values = x.float()
    values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
    return (values * (weight.float() + weight_offset)).to(x.dtype).contiguous()


def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> Tensor:
    return x.new_empty(x.shape)


LIBRARY.impl("rms_norm", rms_norm_reference, "CompositeExplicitAutograd")
torch.library.register_fake("optc::rms_norm", _rms_norm_fake, lib=LIBRARY)


LIBRARY.define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, float weight_offset) -> (Tensor normed, Tensor sum)"
)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    """X and residual [..., D] of one float dtype, float weight [D] -> the norm and the sum, both [..., D] in that dtype."""
    total = (x + residual).contiguous()
    return rms_norm_reference(total, weight, eps, weight_offset), total


def _add_rms_norm_fake(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


LIBRARY.impl("add_rms_norm", add_rms_norm_reference, "CompositeExplicitAutograd")
torch.library.register_fake("optc::add_rms_norm", _add_rms_norm_fake, lib=LIBRARY)
