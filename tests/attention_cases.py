"""Batches for the attention kernels, and the reference implementations that they are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from optc.runtime.ops.attention import (
    attention_reference,
    kv_cache_write_reference,
    paged_attention_reference,
    read_blocks,
)

from .isas import ISA

OPS = torch.ops.optc

# Half a unit in the last place of a 16-bit result, and what float32 arithmetic in another order adds.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8 + 1e-5, torch.float16: 2**-11 + 1e-5}

DTYPES = list(TOLERANCE)

QUANTIZED = [torch.int8, torch.float8_e4m3fn]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A batch of sequences, each of `length` tokens of which the last `queries` are attended for."""

    sequences: tuple[tuple[int, int], ...] = ((3, 7),)  # (queries, length)
    kv_heads: int = 2
    group: int = 2
    k_dim: int = 16
    v_dim: int = 16
    block_size: int = 16
    padding: int = 0
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    strided: bool = False
    dtype: torch.dtype = torch.float32
    cache: torch.dtype | None = None  # of the KV cache, if it is quantized
    seed: int = 0

    @property
    def options(self) -> tuple[float, int, float]:
        return self.k_dim**-0.5, self.window, self.softcap

    def random(self, *shape: int) -> Tensor:
        """Normal numbers; if `strided`, not contiguous but with adjacent elements in the last dimension."""
        if self.strided:
            *rest, tokens, heads, dim = shape
            return torch.randn(*rest, heads, tokens, dim + 3)[..., :dim].to(self.dtype).transpose(-2, -3)
        return torch.randn(shape).to(self.dtype)

    def random_sinks(self) -> Tensor | None:
        return torch.randn(self.kv_heads * self.group).to(self.dtype) if self.sinks else None

    def attention_args(self) -> tuple[Any, ...]:
        """For optc::attention: as many sequences, all as long as the first."""
        torch.manual_seed(self.seed)
        batch, tokens = len(self.sequences), self.sequences[0][1]
        q = self.random(batch, self.kv_heads * self.group, tokens, self.k_dim)
        k = self.random(batch, self.kv_heads, tokens, self.k_dim)
        v = self.random(batch, self.kv_heads, tokens, self.v_dim)
        return q, k, v, *self.options, self.random_sinks(), 0

    def quantized(self, cache: Tensor) -> Tensor:
        """The same keys and values as codes; slots that hold NaN get NaN for their scales."""
        rows = cache.transpose(1, 2).flatten(0, 1)
        slots = torch.arange(len(rows)).masked_fill(rows[:, 0, 0].isnan(), -1)
        codes = torch.full((*cache.shape[:3], cache.shape[3] + 8), -1, dtype=torch.int8).view(self.cache)
        kv_cache_write_reference(rows[..., : self.k_dim], rows[..., self.k_dim :], codes, slots)
        return codes

    def paged_args(self) -> tuple[Any, ...]:
        """For optc::paged_attention. Cache slots of no token hold NaN, entries of block_table past a sequence -1."""
        torch.manual_seed(self.seed)
        needed = [-(-length // self.block_size) for _, length in self.sequences]
        num_blocks = sum(needed) + 2
        free = torch.randperm(num_blocks, dtype=torch.int32).tolist()
        cache = torch.full((num_blocks, self.kv_heads, self.block_size, self.k_dim + self.v_dim), float("nan"))
        table = torch.full((len(self.sequences), max(needed, default=0) + 1), -1, dtype=torch.int32)
        for b, (_, length) in enumerate(self.sequences):
            for i in range(needed[b]):
                table[b, i] = block = free.pop()
                used = min(self.block_size, length - i * self.block_size)
                cache[block, :, :used] = torch.randn(self.kv_heads, used, self.k_dim + self.v_dim)
        starts = torch.tensor([0, *(queries for queries, _ in self.sequences)]).cumsum(0).int()
        lengths = torch.tensor([length for _, length in self.sequences], dtype=torch.int32)
        q = self.random(int(starts[-1]) + self.padding, self.kv_heads * self.group, self.k_dim)
        cache = cache.to(self.dtype) if self.cache is None else self.quantized(cache)
        return q, cache, table, starts, lengths, self.v_dim, *self.options, self.random_sinks()


def in_float32(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.float() if isinstance(a, Tensor) and a.dtype in DTYPES else a for a in args)


def weight_error(case: Case) -> float:
    """How far a kernel may round attention weights, relative to the values they are for.

    Kernels for bfloat16 dot products round weights to bfloat16. Those for 8-bit dot products, which take an INT8 cache with
    keys of up to 512 elements, round queries and weights to integers of 16 bits. All others compute in float32.
    """
    if case.dtype != torch.bfloat16:
        return 0.0
    if case.cache == torch.int8:
        return 2**-9 if ISA in ("avx512_bf16", "avx512_vnni") and case.k_dim <= 512 else 0.0
    return 2**-8 if ISA == "avx512_bf16" else 0.0


def magnitudes(values: Tensor, case: Case) -> Tensor:
    """What `weight_error` is relative to: of integer weights, the largest element of each row of values [..., D]."""
    values = values.abs()
    return values.amax(-1, keepdim=True).expand_as(values) if case.cache == torch.int8 else values


def check_close(case: Case, out: Tensor, expected: Tensor, attended_magnitudes: Tensor) -> None:
    """Errors of weights w_j move a result o by the sum of these errors times (v_j - o)."""
    assert out.dtype == case.dtype
    bound = 1e-5 + TOLERANCE[case.dtype] * expected.abs()
    bound = bound + weight_error(case) * (attended_magnitudes + expected.abs())
    error = (out.float() - expected).abs()
    assert (error <= bound).all(), f"{(error / bound).max()} times the tolerance"


def check_attention(case: Case) -> None:
    args = case.attention_args()
    q, k, v, *rest = in_float32(args)
    expected = attention_reference(q, k, v, *rest)
    check_close(case, OPS.attention(*args), expected, attention_reference(q, k, magnitudes(v, case), *rest))


def check_paged(case: Case) -> None:
    args = case.paged_args()
    q, cache, *rest = in_float32(args)
    expected = paged_attention_reference(q, cache, *rest)
    rows = read_blocks(cache, torch.arange(len(cache)), case.k_dim, case.v_dim)
    rows[..., case.k_dim :] = magnitudes(rows[..., case.k_dim :], case)
    out = OPS.paged_attention(*args)
    check_close(case, out, expected, paged_attention_reference(q, rows, *rest))
    assert not out[out.shape[0] - case.padding :].any()


HEAD_DIMS = st.sampled_from([8, 16, 40, 64, 80, 96, 128, 256]) | st.integers(1, 50)

GEOMETRY = {
    "kv_heads": st.integers(1, 3),
    "group": st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 16]),
    "k_dim": HEAD_DIMS,
    "v_dim": HEAD_DIMS,
    "window": st.just(0) | st.integers(1, 200),
    "softcap": st.sampled_from([0.0, 1.0, 30.0]),
    "sinks": st.booleans(),
    "strided": st.booleans(),
    "dtype": st.sampled_from(DTYPES),
    "seed": st.integers(0, 1000),
}


def sequences(max_queries: int, max_context: int) -> st.SearchStrategy[tuple[tuple[int, int], ...]]:
    """Prompts, chunks of prompts with a context before them, single tokens and sequences that skip this step."""
    queries = st.sampled_from([0, 1, 1, 2]) | st.integers(1, max_queries)
    pair = st.tuples(queries, st.just(0) | st.integers(0, max_context)).map(lambda p: (p[0], p[0] + p[1]))
    return st.lists(pair, min_size=0, max_size=5).map(tuple)


def check_write(
    *,
    tokens: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None,
    kv_heads: int = 2,
    block_size: int = 16,
    strided: bool = False,
    seed: int = 0,
) -> None:
    """The kernel writes the reference's bits, codes and scales too, and nothing else."""
    torch.manual_seed(seed)
    case = Case(strided=strided, dtype=dtype)
    k, v = (case.random(tokens, kv_heads, dim) * 10.0 ** torch.randint(-6, 4, (tokens, kv_heads, 1)) for dim in dims)
    k, v = k.to(dtype), v.to(dtype)
    v[:1], k[1:2], v[2:3, 0, 0], k[2:3, 0, -1] = 0, torch.inf, torch.nan, -torch.inf
    num_blocks = tokens // block_size + 2
    row = sum(dims) if cache_dtype is None else sum(dims) + 8
    cache = torch.randint(-128, 128, (num_blocks, kv_heads, block_size, row), dtype=torch.int8)
    cache = cache.to(dtype) if cache_dtype is None else cache.view(cache_dtype)
    slots = torch.randperm(num_blocks * block_size)[:tokens]
    slots[torch.rand(tokens) < 0.2] = -1
    expected = cache.clone()
    kv_cache_write_reference(k, v, expected, slots)
    OPS.kv_cache_write(k, v, cache, slots)
    if cache_dtype is None:
        assert torch.equal(cache.nan_to_num(), expected.nan_to_num())
    else:
        assert torch.equal(cache.view(torch.int8), expected.view(torch.int8))
