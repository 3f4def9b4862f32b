"""The native kernels over a paged KV cache: what is written to it, and what of it is not read or not hidden."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optc.optimizer.lowering.native import build_kernels
from optc.runtime.ops.attention import LARGEST_CODE, kv_cache_write_reference
from optc.runtime.ops.kernels import load_kernels

from .attention_cases import DTYPES, OPS, QUANTIZED, Case, check_write
from .isas import ISA


@pytest.fixture(scope="module", autouse=True)
def native() -> None:
    load_kernels(build_kernels(ISA))


@pytest.mark.parametrize("cache_dtype", [None, *QUANTIZED])
@pytest.mark.parametrize("queries", [1, 30])
def test_blocks_before_the_window_may_be_gone(queries: int, cache_dtype: torch.dtype | None) -> None:
    case = Case(sequences=((queries, 500),), window=100, block_size=8, cache=cache_dtype)
    q, cache, table, *rest = case.paged_args()
    expected = OPS.paged_attention(q, cache, table, *rest)
    gone = (500 - queries + 1 - case.window) // case.block_size
    cache.view(torch.int8)[table[0, :gone]] = -1  # NaN
    table[0, :gone] = -1
    assert torch.equal(OPS.paged_attention(q, cache, table, *rest), expected)


@pytest.mark.parametrize("cache", QUANTIZED)
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["key", "value"])
@pytest.mark.parametrize("queries", [4, 30])
def test_a_broken_token_is_not_hidden(cache: torch.dtype, broken: float, part: str, queries: int) -> None:
    """A key or value with NaN or an infinity has that as its scale: later tokens turn NaN, earlier ones keep their bits."""
    case = Case(sequences=((queries, 300),), kv_heads=1, dtype=torch.bfloat16, cache=cache, block_size=300)
    args = case.paged_args()
    out = OPS.paged_attention(*args)
    block, width, token = int(args[2][0, 0]), case.k_dim + case.v_dim, 298
    content = args[1].view(torch.int8)[block, 0].view(-1)
    content[token * width : (token + 1) * width] = 0
    scales = content[300 * width :].view(torch.float32).view(2, 300)
    scales[["key", "value"].index(part), token] = broken
    broken_out = OPS.paged_attention(*args)
    assert torch.equal(broken_out[:-2], out[:-2])
    assert broken_out[-2:].isnan().all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 60),
    kv_heads=st.integers(1, 4),
    dims=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    block_size=st.sampled_from([8, 16, 32]),
    strided=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    cache_dtype=st.sampled_from([None, *QUANTIZED]),
    seed=st.integers(0, 1000),
)
def test_kv_cache_write(**options: Any) -> None:
    check_write(**options)


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_every_16_bit_float_gets_the_same_codes(dtype: torch.dtype) -> None:
    """With a scale of one, so that ties and the numbers below the smallest normal one are among them."""
    largest = LARGEST_CODE[dtype]
    for bits in (torch.float16, torch.bfloat16):
        values = torch.arange(-(2**15), 2**15).to(torch.int16).view(bits).float()
        values = values[values.abs() <= largest]
        rows = torch.cat([values, values.new_zeros(-len(values) % 7)]).view(-1, 1, 7)
        k = torch.cat([rows, torch.full((len(rows), 1, 1), largest)], dim=-1)
        cache = torch.zeros(1, 1, len(k), 8 + 1 + 8, dtype=dtype)
        expected = cache.clone()
        where = torch.arange(len(k))
        kv_cache_write_reference(k, k[..., :1], expected, where)
        OPS.kv_cache_write(k, k[..., :1], cache, where)
        assert torch.equal(cache.view(torch.int8), expected.view(torch.int8))


def test_bad_writes_raise_and_write_nothing() -> None:
    k, v, cache = torch.randn(3, 2, 8), torch.randn(3, 2, 4), torch.zeros(5, 2, 8, 12)
    with pytest.raises(RuntimeError, match=r"slot_mapping\[2\] is 40, but kv_cache has 40 slots"):
        OPS.kv_cache_write(k, v, cache, torch.tensor([0, 1, 40]))
    with pytest.raises(RuntimeError, match="k has dtype Float, expected BFloat16"):
        OPS.kv_cache_write(k, v, cache.bfloat16(), torch.tensor([0, 1, 2]))
    with pytest.raises(RuntimeError, match=r"slot_mapping has shape \[2\], expected \[3\]"):
        OPS.kv_cache_write(k, v, cache, torch.tensor([0, 1]))
    codes = torch.zeros(5, 2, 8, 20, dtype=torch.int8)
    with pytest.raises(RuntimeError, match="v has dtype BFloat16, expected Float"):
        OPS.kv_cache_write(k, v.bfloat16(), codes, torch.tensor([0, 1, 2]))
    with pytest.raises(
        RuntimeError, match="kv_cache_write supports float32, bfloat16 and float16 on the CPU, not Double"
    ):
        OPS.kv_cache_write(k.double(), v.double(), codes, torch.tensor([0, 1, 2]))
    assert not cache.any() and not codes.any()
