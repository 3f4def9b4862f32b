"""What makes the input of quantized linear layers, together with the rounding of that input to 8 bits.

    optc::rms_norm_a8(x, weight, eps, weight_offset, activation)                 codes, steps
    optc::add_rms_norm_a8(x, residual, weight, eps, weight_offset, activation)   codes, steps, and the sum
    optc::silu_mul_a8(gate, up, activation)                                      codes, steps
    optc::gelu_mul_a8(gate, up, tanh, activation)                                codes, steps

Each gives what the op without _a8 gives, in x's dtype, rounded as `activation` says: int8-token or int8-groupG, as in
`quantized.quantize_activations`. Codes are int8 [..., K] and steps f32 [..., groups]; codes * steps is the rounded value. So a
linear layer computes the same to the bit whether it or the op before it rounds. With the activation none, which the numeric
check of passes uses, codes are the numbers themselves in f32 and steps f32 [..., 1] are ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import LIBRARY
from .gated import gelu_mul_reference, silu_mul_reference
from .norm import add_rms_norm_reference, rms_norm_reference


def round_to_codes(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The codes and steps of x [..., K]. A group that holds NaN or an infinity has codes of zero and a step of NaN."""
    values, columns = x.float(), x.shape[-1]
    if activation == "none":
        return values.contiguous(), torch.ones(*x.shape[:-1], 1, device=x.device)
    size = _group_size(activation, columns)
    padded = torch.nn.functional.pad(values, (0, -columns % size)).unflatten(-1, (-1, size))
    steps = padded.abs().amax(dim=-1, keepdim=True) / 127.0
    steps = torch.where(steps == 0, 1.0, steps)
    steps = torch.where(steps.isfinite(), steps, torch.nan)
    codes = torch.where(steps.isfinite(), padded / steps, 0.0).clamp(-127, 127).round().to(torch.int8)
    return codes.flatten(-2)[..., :columns].contiguous(), steps[..., 0].contiguous()


def _group_size(activation: str, columns: int) -> int:
    """Columns that share a step."""
    kind, _, how = activation.partition("-")
    if kind != "int8" or not (how == "token" or how.startswith("group")):
        raise ValueError(f"activation {activation!r}, expected none, int8-token or int8-groupG")
    return max(1, columns) if how == "token" else int(how.removeprefix("group"))


def _fake_round(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Empty codes and steps for x [..., K]."""
    columns = x.shape[-1]
    size = columns if activation == "none" else _group_size(activation, columns)
    codes = x.new_empty(x.shape, dtype=torch.float32 if activation == "none" else torch.int8)
    return codes, x.new_empty(*x.shape[:-1], -(-columns // size), dtype=torch.float32)


LIBRARY.define(
    "rms_norm_a8(Tensor x, Tensor weight, float eps, float weight_offset, str activation) -> (Tensor codes, Tensor steps)"
)


def rms_norm_a8_reference(
    x: Tensor, weight: Tensor, eps: float, weight_offset: float, activation: str
) -> tuple[Tensor, Tensor]:
    """`rms_norm`, rounded."""
    return round_to_codes(rms_norm_reference(x, weight, eps, weight_offset), activation)


def _rms_norm_a8_fake(
    x: Tensor, weight: Tensor, eps: float, weight_offset: float, activation: str
) -> tuple[Tensor, Tensor]:
    return _fake_round(x, activation)


LIBRARY.impl("rms_norm_a8", rms_norm_a8_reference, "CompositeExplicitAutograd")
torch.library.register_fake("optc::rms_norm_a8", _rms_norm_a8_fake, lib=LIBRARY)


LIBRARY.define(
    "add_rms_norm_a8(Tensor x, Tensor residual, Tensor weight, float eps, float weight_offset, str activation) -> "
    "(Tensor codes, Tensor steps, Tensor sum)"
)


def add_rms_norm_a8_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`add_rms_norm`, its norm rounded."""
    normed, total = add_rms_norm_reference(x, residual, weight, eps, weight_offset)
    return *round_to_codes(normed, activation), total


def _add_rms_norm_a8_fake(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    return *_fake_round(x, activation), x.new_empty(x.shape)


LIBRARY.impl("add_rms_norm_a8", add_rms_norm_a8_reference, "CompositeExplicitAutograd")
torch.library.register_fake("optc::add_rms_norm_a8", _add_rms_norm_a8_fake, lib=LIBRARY)


LIBRARY.define("silu_mul_a8(Tensor gate, Tensor up, str activation) -> (Tensor codes, Tensor steps)")


def silu_mul_a8_reference(gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """`silu_mul`, rounded."""
    return round_to_codes(silu_mul_reference(gate, up), activation)


def _silu_mul_a8_fake(gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return _fake_round(gate, activation)


LIBRARY.impl("silu_mul_a8", silu_mul_a8_reference, "CompositeExplicitAutograd")
torch.library.register_fake("optc::silu_mul_a8", _silu_mul_a8_fake, lib=LIBRARY)


LIBRARY.define("gelu_mul_a8(Tensor gate, Tensor up, bool tanh, str activation) -> (Tensor codes, Tensor steps)")


def gelu_mul_a8_reference(gate: Tensor, up: Tensor, tanh: bool, activation: str) -> tuple[Tensor, Tensor]:
    """`gelu_mul`, rounded."""
    return round_to_codes(gelu_mul_reference(gate, up, tanh), activation)


def _gelu_mul_a8_fake(gate: Tensor, up: Tensor, tanh: bool, activation: str) -> tuple[Tensor, Tensor]:
    return _fake_round(gate, activation)


LIBRARY.impl("gelu_mul_a8", gelu_mul_a8_reference, "CompositeExplicitAutograd")
torch.library.register_fake("optc::gelu_mul_a8", _gelu_mul_a8_fake, lib=LIBRARY)
