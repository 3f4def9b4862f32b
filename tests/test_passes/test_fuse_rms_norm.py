"""The pass that makes one op of an RMSNorm, and of the sum before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from optc.passes.fuse_rms_norm import FuseRmsNorm

from .exported import Function, export, fuse, ops

D = 24
RMS_NORM, ADD_RMS_NORM = "optc.rms_norm.default", "optc.add_rms_norm.default"
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class TorchNorm(nn.RMSNorm):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps=eps)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(
    ("kind", "offset"),
    [(LlamaRMSNorm, 0.0), (GemmaRMSNorm, 1.0), (Olmo2RMSNorm, 0.0), (Gemma3nRMSNorm, 0.0), (TorchNorm, 0.0)],
)
def test_every_spelling(kind: Callable[..., nn.Module], offset: float, dtype: torch.dtype) -> None:
    norm = kind(D, eps=1e-3).to(dtype)
    norm.weight.data = numbers(D, dtype=dtype, seed=1)  # type: ignore[union-attr]
    x = numbers(1, 5, D, dtype=dtype)
    program = export(norm, x)
    (expected,) = program.module(x)
    record = fuse(program, FuseRmsNorm())
    assert record.matches == 1 and not record.declined
    if kind is not TorchNorm or RMS_NORM in ops(program):
        assert ops(program) == {RMS_NORM: 1}
        (node,) = program.graph.find_nodes(op="call_function", target=torch.ops.optc.rms_norm.default)
        assert node.args[2:] == (1e-3, offset)
    (found,) = program.module(x)
    torch.testing.assert_close(found, expected, rtol=ROUNDING[dtype], atol=1e-6)


def test_heads() -> None:
    """Norms of queries and keys: over the last dimension, of heads."""
    norm = LlamaRMSNorm(8)
    x = numbers(1, 5, 24)
    module = Function(lambda self, x: norm(x.view(1, 5, 3, 8)).transpose(1, 2))
    module.norm = norm
    program = export(module, x)
    assert fuse(program, FuseRmsNorm()).matches == 1


@pytest.mark.parametrize("dtype", ROUNDING)
def test_sum(dtype: torch.dtype) -> None:
    """The sum that goes on and its norm are one op; a sum that two norms take is made once."""
    norm, other = LlamaRMSNorm(D).to(dtype), LlamaRMSNorm(D).to(dtype)

    def forward(self: Any, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        total = x + y
        return norm(total), total * 2, other(total)

    module = Function(forward)
    module.norm, module.other = norm, other
    x, y = numbers(1, 5, D, dtype=dtype), numbers(1, 5, D, dtype=dtype, seed=1)
    program = export(module, x, y)
    expected = program.module(x, y)
    assert fuse(program, FuseRmsNorm()).matches == 2
    found = ops(program)
    assert (found[ADD_RMS_NORM], found[RMS_NORM], found.get("aten.add.Tensor", 0)) == (1, 1, 0)
    for a, b in zip(program.module(x, y), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=ROUNDING[dtype], atol=1e-6)


def test_a_sum_that_spreads_is_left_alone() -> None:
    norm = LlamaRMSNorm(D)
    module = Function(lambda self, x, y: norm(x + y))
    module.norm = norm
    program = export(module, numbers(1, 5, D), numbers(D))
    assert fuse(program, FuseRmsNorm()).matches == 1
    assert ops(program) == {"aten.add.Tensor": 1, RMS_NORM: 1}


def spelled(f: Callable[[Tensor, Tensor], Any]) -> Callable[..., Any]:
    return lambda self, x: f(x, self.weight)


def rms(x: Tensor, dim: int = -1, eps: float = 1e-6) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(dim, keepdim=True) + eps)


OTHERS: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "LayerNorm": (lambda x, w: w * ((c := x - x.mean(-1, keepdim=True)) * rms(c)), "LayerNorm"),
    "LayerNorm in two": (lambda x, w: w * ((x - x.mean(-1, keepdim=True)) * rms(x)), "which was squared"),
    "another dimension": (lambda x, w: w * (x * rms(x, 1)), "other dimensions"),
    "no weight": (lambda x, w: x * rms(x) + 1, "no weight"),
    "computed weight": (lambda x, w: torch.sigmoid(w) * (x * rms(x)), "is no weight"),
    "weight from data": (lambda x, w: x[0, 0] * (x * rms(x)), "is no weight"),
    "one number": (lambda x, w: w[:1] * (x * rms(x)), "is no weight"),
    "used in between": (lambda x, w: (w * (y := x * rms(x)), y + 1), "used elsewhere"),
    "cube": (lambda x, w: w * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6)), "no square"),
    "eps from data": (lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + w[0])), "plus a number"),
    "another input": (lambda x, w: w * ((x + 1) * rms(x)), "which was squared"),
    "sum, not mean": (lambda x, w: w * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)), "no mean"),
    "double": (lambda x, w: (w * (x.double() * rms(x.double()))).float(), "float64"),
    "weight spreads": (lambda x, w: w * ((y := x[..., :1]) * rms(y)), "has shape"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_left_alone(name: str) -> None:
    f, reason = OTHERS[name]
    program = export(Function(spelled(f), weight=numbers(D, seed=1)), numbers(1, 5, D))
    before = ops(program)
    record = fuse(program, FuseRmsNorm())
    assert record.matches == 0 and ops(program) == before
    assert reason in record.declined[0], record.declined


HALVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "computed in 16 bits": lambda x, w: w * (x * rms(x)),
    "stays in float32": lambda x, w: w.float() * (x.float() * rms(x.float())),
    "weight rounded": lambda x, w: w.half().float() * (x.float() * rms(x.float())),
    "sum of the weight in 16 bits": lambda x, w: ((x.float() * rms(x.float())) * (1 + w)).to(x.dtype),
}


@pytest.mark.parametrize("name", HALVES)
def test_left_alone_in_16_bits(name: str) -> None:
    program = export(
        Function(spelled(HALVES[name]), weight=numbers(D, dtype=torch.bfloat16, seed=1)),
        numbers(1, 5, D, dtype=torch.bfloat16),
    )
    record = fuse(program, FuseRmsNorm())
    assert record.matches == 0 and len(record.declined) == 1
