"""The gate of a gated MLP: activation(gate) * up in one op.

    optc::silu_mul(gate, up)          gate * sigmoid(gate) * up
    optc::gelu_mul(gate, up, tanh)    gelu(gate) * up, with tanh in place of erf or not

Everything is float32 until the result is rounded, once, to the inputs' dtype. `gate` and `up` may be two halves of the rows of
one tensor: the kernels read them where they lie.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from .attention import LIBRARY

LIBRARY.define("silu_mul(Tensor gate, Tensor up) -> Tensor")


def silu_mul_reference(gate: Tensor, up: Tensor) -> Tensor:
    """Gate and up [..., D] of one float dtype -> [..., D] in that dtype, contiguous."""
    return (silu(gate.float()) * up.float()).to(gate.dtype).contiguous()


def _silu_mul_fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


LIBRARY.impl("silu_mul", silu_mul_reference, "CompositeExplicitAutograd")
torch.library.register_fake("optc::silu_mul", _silu_mul_fake, lib=LIBRARY)


LIBRARY.define("gelu_mul(Tensor gate, Tensor up, bool tanh) -> Tensor")


def gelu_mul_reference(gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
    """Gate and up [..., D] of one float dtype -> [..., D] in that dtype, contiguous."""
    activated = gelu(gate.float(), approximate="tanh" if tanh else "none")
    return (activated * up.float()).to(gate.dtype).contiguous()


def _gelu_mul_fake(gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
    return gate.new_empty(gate.shape)


LIBRARY.impl("gelu_mul", gelu_mul_reference, "CompositeExplicitAutograd")
torch.library.register_fake("optc::gelu_mul", _gelu_mul_fake, lib=LIBRARY)
