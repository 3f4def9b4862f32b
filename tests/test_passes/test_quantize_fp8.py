"""linear -> optc.linear_fp8."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from optc.optimizer.capture import capture_module
from optc.passes.base import run_passes
from optc.passes.canonicalize import Canonicalize
from optc.passes.quantize_fp8 import QuantizeFp8, quantize_rows
from optc.passes.verify import Probe
from optc.runtime.ops.linear_fp8 import dequantize_fp8, linear_fp8_reference

TOKENS = torch.arange(7)[None]


class Model(nn.Module):
    """Attention, a tied head, one layer whose weight is used twice and one whose weight is computed."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Embedding(64, 32), nn.Linear(32, 96)
        self.twice, self.computed, self.head = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 64, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids) + positions[..., None] / 100
        q, k, v = (part.view(1, -1, 2, 16).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.twice(self.twice(x)) + F.linear(x, self.computed.weight * 2)
        return self.head(x)


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_quantized_and_what_is_left_alone(tied: bool) -> None:
    torch.manual_seed(0)
    program = capture_module(Model(tied), (TOKENS, TOKENS), 128)
    _, record = run_passes(program, [Canonicalize(), QuantizeFp8()], probe=Probe.random(64, 128))
    assert record.matches == 1  # qkv
    reasons = " ".join(record.declined)
    assert "also used elsewhere" in reasons and "computed" in reasons and "gives the logits" in reasons
    assert record.max_error is not None and 0 < record.max_error < 0.1
    stored = program.weights()
    assert stored["qkv.weight_fp8"].dtype == torch.float8_e4m3fn
    assert "qkv.weight" not in stored and program.sources["qkv.weight_fp8"] == "qkv.weight"


@given(st.integers(1, 9), st.integers(1, 40), st.sampled_from([1e-30, 1e-3, 1.0, 1e30]), st.integers(0, 99))
def test_rounding_is_to_the_nearest_code(rows: int, columns: int, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * size
    weight[0] = 0
    codes, scale = quantize_rows(weight)
    stored = dequantize_fp8(codes, scale)
    assert torch.isfinite(stored).all() and torch.equal(stored[0], weight[0])
    # E4M3 has 3 mantissa bits: within 2**-4 of a normal value, within 2**-10 of the scale below that.
    allowed = torch.maximum(weight.abs() * 2**-4, (scale * 2**-10)[:, None]) * 1.001
    assert bool(((stored - weight).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("leading", [(1,), (5,), (1, 7)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_op_is_the_linear_of_the_stored_weight(
    dtype: torch.dtype, leading: tuple[int, ...], with_bias: bool
) -> None:
    torch.manual_seed(0)
    codes, scale = quantize_rows(torch.randn(24, 40))
    x, bias = torch.randn(*leading, 40, dtype=dtype), torch.randn(24, dtype=dtype) if with_bias else None
    expected = F.linear(x, dequantize_fp8(codes, scale).to(dtype), bias)
    assert torch.equal(linear_fp8_reference(x, codes, scale, bias), expected)
    # torch's own schema test multiplies its inputs, which FP8 tensors cannot; the fake implementation is tested.
    torch.library.opcheck(torch.ops.optc.linear_fp8.default, (x, codes, scale, bias), test_utils="test_faketensor")
