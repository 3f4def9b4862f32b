"""The native attention kernels against the reference implementations, which are called directly.

`OPTC_TEST_ISA` picks the instruction set; `test_other_isas` runs part of this file again under each one the host has.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from optc.errors import ArtifactError, LoweringError
from optc.optimizer.lowering.native import build_kernels
from optc.runtime.ops import kernels
from optc.runtime.ops.attention import (
    LARGEST_CODE,
    attention_reference,
    kv_cache_write_reference,
    paged_attention_reference,
    read_blocks,
)
from optc.runtime.ops.kernels import host_isa, kernels_loaded, load_kernels, supports

from .isas import ISA, run_again, under_other_isas

OPS = torch.ops.optc

# Half a unit in the last place of a 16-bit result, and what float32 arithmetic in another order adds.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8 + 1e-5, torch.float16: 2**-11 + 1e-5}

DTYPES = list(TOLERANCE)

QUANTIZED = [torch.int8, torch.float8_e4m3fn]


@pytest.fixture(scope="module", autouse=True)
def native() -> None:
    load_kernels(build_kernels(ISA))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


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

    Kernels for bfloat16 dot products round weights to bfloat16. Those for 8-bit dot products, which take an INT8 cache,
    round queries and weights to integers of 16 bits. All others compute in float32.
    """
    if case.dtype != torch.bfloat16:
        return 0.0
    if case.cache == torch.int8:
        return 2**-9 if ISA in ("avx512_bf16", "avx512_vnni") else 0.0
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


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.builds(
        Case,
        sequences=st.tuples(st.integers(1, 3), st.integers(0, 150)).map(lambda p: ((0, p[1]),) * p[0]),
        **GEOMETRY,
    )
)
def test_attention(case: Case) -> None:
    check_attention(case)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.builds(
        Case,
        sequences=sequences(70, 300),
        block_size=st.sampled_from([8, 16, 32, 5]),
        padding=st.integers(0, 3),
        cache=st.sampled_from([None, *QUANTIZED]),
        **GEOMETRY,
    )
)
def test_paged_attention(case: Case) -> None:
    check_paged(case)


# A few cases that between them reach every path; they are also what `test_other_isas` runs.
FIXED = [
    Case(sequences=((1, 1), (1, 130), (70, 70), (5, 300), (0, 9)), padding=2, k_dim=64, v_dim=64),
    Case(sequences=((40, 290), (1, 700)), k_dim=80, v_dim=96, group=3, window=100, sinks=True),
    Case(sequences=((33, 33), (2, 515)), k_dim=13, v_dim=7, kv_heads=1, group=8, softcap=2.0, block_size=8),
    Case(sequences=((130, 130),), k_dim=128, v_dim=40, kv_heads=1, group=1, sinks=True, strided=True),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", FIXED)
def test_fixed(case: Case, dtype: torch.dtype) -> None:
    check_paged(replace(case, dtype=dtype))
    check_attention(replace(case, dtype=dtype))


@pytest.mark.parametrize("cache", QUANTIZED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fixed_quantized(dtype: torch.dtype, cache: torch.dtype) -> None:
    for case in FIXED:
        check_paged(replace(case, dtype=dtype, cache=cache))
    check_write(tokens=50, dims=(64, 13), dtype=dtype, cache_dtype=cache)


@under_other_isas
def test_other_isas(isa: str) -> None:
    run_again(__file__, isa, "test_fixed or test_same")


@pytest.mark.parametrize(
    "case", [Case(), Case(window=500), Case(sinks=True, softcap=20.0), *(Case(cache=cache) for cache in QUANTIZED)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_context(case: Case, dtype: torch.dtype) -> None:
    sequences = ((1, 5000), (3, 2048), (120, 4097), (1, 257))
    check_paged(replace(case, sequences=sequences, k_dim=64, v_dim=64, dtype=dtype))
    check_paged(replace(case, sequences=((600, 700),), kv_heads=8, dtype=dtype))  # enough items without splitting keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [0.0, 50.0])
def test_extreme_scores(softcap: float, dtype: torch.dtype) -> None:
    """Scores in the tens of thousands, exact because queries and keys are small integers."""
    case = Case(sequences=((90, 400), (1, 300)), k_dim=64, softcap=softcap, window=350, dtype=dtype)
    args = case.paged_args()
    q, cache = args[0], args[1]
    q.mul_(10).round_()
    cache[..., :64].mul_(10).round_()
    exact = (q, cache, *args[2:6], 1.0, *args[7:])
    out = OPS.paged_attention(*exact)
    assert out.isfinite().all()
    expected = paged_attention_reference(*in_float32(exact))
    tolerance = TOLERANCE[dtype] + 2 * weight_error(case)
    torch.testing.assert_close(out.float(), expected, atol=1e-5 + 3 * weight_error(case), rtol=tolerance)


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


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"dtype": torch.bfloat16, "cache": torch.int8}])
def test_nan_stays_visible(options: dict[str, Any]) -> None:
    """A broken query gives NaN, not a number that looks like an answer, and leaves the other rows alone."""
    args = Case(sequences=((4, 100), (1, 300)), sinks=True, **options).paged_args()
    q = args[0]
    q[2, 1] = float("nan")
    nan = OPS.paged_attention(*args).isnan().all(-1)
    assert nan.nonzero().tolist() == [[2, 1]]


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 90, "sinks": True},
        {"k_dim": 20, "v_dim": 12, "softcap": 5.0},
        {"group": 8, "k_dim": 64, "v_dim": 64},
        {"cache": torch.int8, "window": 90},
        {"cache": torch.int8, "group": 7, "k_dim": 64, "v_dim": 128},
        {"cache": torch.float8_e4m3fn, "k_dim": 20},
    ],
)
def test_same_bits(options: dict[str, Any], dtype: torch.dtype) -> None:
    """A token's attention does not depend on the other sequences, the threads, or how its sequence is cut in chunks."""
    case = replace(Case(sequences=((1, 900), (70, 600), (37, 37), (1, 1)), group=3, dtype=dtype), **options)
    q, cache, table, starts, lengths, *rest = case.paged_args()
    torch.set_num_threads(2)
    together = OPS.paged_attention(q, cache, table, starts, lengths, *rest)
    start = 0
    for threads in (1, 2):
        torch.set_num_threads(threads)
        start = 0
        for b, (queries, length) in enumerate(case.sequences):
            for chunk in (queries, 13, 1):
                for first in range(0, queries, chunk):
                    last = min(first + chunk, queries)
                    alone = OPS.paged_attention(
                        q[start + first : start + last],
                        cache,
                        table[b : b + 1],
                        torch.tensor([0, last - first], dtype=torch.int32),
                        torch.tensor([length - queries + last], dtype=torch.int32),
                        *rest,
                    )
                    assert torch.equal(alone, together[start + first : start + last])
            start += queries


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    case=st.builds(
        Case,
        sequences=sequences(60, 600),
        block_size=st.sampled_from([1, 5, 16, 24, 64]),
        padding=st.integers(0, 3),
        cache=st.sampled_from([None, *QUANTIZED]),
        **GEOMETRY,
    ),
    data=st.data(),
)
def test_same_bits_anywhere(case: Case, data: st.DataObject) -> None:
    """Any token alone, its keys in other blocks of another size of batch, has the bits it has in the batch."""
    q, cache, table, starts, lengths, *rest = case.paged_args()
    torch.set_num_threads(2)
    together = OPS.paged_attention(q, cache, table, starts, lengths, *rest)
    moved = torch.randperm(len(cache))
    elsewhere = cache.view(torch.int8)[moved.argsort()].view(cache.dtype) if case.cache else cache[moved.argsort()]
    table = torch.where(table >= 0, moved[table.long().clamp_min(0)], -1).int()
    for b, (queries, length) in enumerate(case.sequences):
        if queries == 0:
            continue
        first = data.draw(st.integers(0, queries - 1))
        count = data.draw(st.sampled_from([1, queries - first]) | st.integers(1, queries - first))
        torch.set_num_threads(data.draw(st.integers(1, 2)))
        alone = OPS.paged_attention(
            q[int(starts[b]) + first :][:count],
            elsewhere,
            table[b : b + 1],
            torch.tensor([0, count], dtype=torch.int32),
            torch.tensor([length - queries + first + count], dtype=torch.int32),
            *rest,
        )
        assert torch.equal(alone, together[int(starts[b]) + first :][:count])


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


def test_columns_that_are_not_adjacent() -> None:
    """A last dimension with a stride is copied, not misread."""
    q, k, v = (torch.randn(2, 4, 16, 9).transpose(2, 3) for _ in range(3))
    torch.testing.assert_close(
        OPS.attention(q, k, v, 0.25, 0, 0.0, None, 0),
        attention_reference(q, k, v, 0.25, 0, 0.0, None, 0),
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("group", [1, 4])
def test_reference_is_sdpa(group: int) -> None:
    q, k, v = torch.randn(2, 2 * group, 50, 32), torch.randn(2, 2, 50, 32), torch.randn(2, 2, 50, 24)
    expected = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True).transpose(1, 2)
    out = attention_reference(q, k, v, 0.3, 0, 0.0, None, 0)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    tests = ("test_schema", "test_faketensor")
    case = Case(sequences=((4, 20), (1, 20)), v_dim=24, sinks=True, dtype=dtype)
    args = list(case.paged_args())
    args[1] = args[1].nan_to_num()  # the schema check compares inputs before and after, and NaN differs from itself
    torch.library.opcheck(OPS.paged_attention.default, tuple(args), test_utils=tests)
    torch.library.opcheck(OPS.attention.default, case.attention_args(), test_utils=tests)
    k, v, cache = (torch.randn(shape).to(dtype) for shape in [(3, 2, 8), (3, 2, 4), (5, 2, 8, 12)])
    torch.library.opcheck(OPS.kv_cache_write.default, (k, v, cache, torch.tensor([7, -1, 39])), test_utils=tests)
    codes = torch.zeros(5, 2, 8, 20, dtype=torch.int8)
    torch.library.opcheck(OPS.kv_cache_write.default, (k, v, codes, torch.tensor([7, -1, 39])), test_utils=tests)
    args[1] = torch.zeros(*args[1].shape[:3], args[1].shape[3] + 8, dtype=torch.int8)
    torch.library.opcheck(OPS.paged_attention.default, tuple(args), test_utils=tests)


PAGED_ARGS = ("q", "kv_cache", "block_table", "query_start_loc", "seq_lens", "v_dim")


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("block_table", torch.tensor([[0, 99]], dtype=torch.int32), r"block_table\[0, 1\] is 99, but kv_cache has 4"),
        ("block_table", torch.tensor([[-1, 0]], dtype=torch.int32), r"block_table\[0, 0\] is -1"),
        ("block_table", torch.tensor([[0]], dtype=torch.int32), r"seq_lens\[0\] is 20"),
        ("block_table", torch.tensor([[0, 1]]), "block_table has dtype Long, expected Int"),
        ("seq_lens", torch.tensor([49], dtype=torch.int32), r"seq_lens\[0\] is 49.*at most the 48 slots"),
        ("seq_lens", torch.tensor([3], dtype=torch.int32), "at least its 4 query tokens"),
        ("query_start_loc", torch.tensor([0, 5], dtype=torch.int32), "but q has 4 tokens"),
        ("query_start_loc", torch.tensor([3, 1], dtype=torch.int32), r"query_start_loc\[0:2\] is \[3, 1\]"),
        ("query_start_loc", torch.tensor([-1, 1], dtype=torch.int32), r"query_start_loc\[0\] is -1"),
        ("q", torch.randn(4, 4, 16).bfloat16(), "kv_cache has dtype Float, expected BFloat16"),
        ("q", torch.randn(4, 3, 16), "3 query heads cannot share 2 KV heads evenly"),
        ("v_dim", 15, r"kv_cache has shape \[4, 2, 16, 32\], expected \[\*, 2, 16, 31\]"),
        ("kv_cache", torch.zeros(4, 2, 16, 32, dtype=torch.int8), r"kv_cache has shape .*, expected \[\*, 2, 16, 40\]"),
        ("kv_cache", torch.zeros(4, 2, 16, 32, dtype=torch.uint8), "kv_cache has dtype Byte, expected Float"),
        ("kv_cache", torch.zeros(4, 16, 2, 40, dtype=torch.int8).transpose(1, 2), "kv_cache must be contiguous"),
    ],
)
def test_bad_batches_raise(argument: str, value: object, message: str) -> None:
    args = list(Case(sequences=((4, 20),)).paged_args())
    args[PAGED_ARGS.index(argument)] = value
    with pytest.raises(RuntimeError, match=message):
        OPS.paged_attention(*args)


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


def test_bad_attention_raises() -> None:
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(RuntimeError, match=r"v has shape \[1, 2, 4, 8\], expected \[1, 2, 5, 8\]"):
        OPS.attention(q, q, q[:, :, :4], 1.0, 0, 0.0, None, 0)
    with pytest.raises(RuntimeError, match="supports float32, bfloat16 and float16 on the CPU, not Double"):
        OPS.attention(q.double(), q.double(), q.double(), 1.0, 0, 0.0, None, 0)
    with pytest.raises(RuntimeError, match=r"sinks has shape \[3\], expected \[2\]"):
        OPS.attention(q, q, q, 1.0, 0, 0.0, torch.zeros(3), 0)


def test_the_first_library_stays(tmp_path: Path) -> None:
    assert kernels_loaded()
    load_kernels(build_kernels("generic"))
    with pytest.raises(ArtifactError, match=r"cannot read the kernels library .*missing\.so: No such file"):
        load_kernels(tmp_path / "missing.so")


def test_a_broken_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_loaded_digest", None)
    (tmp_path / "kernels.so").write_bytes(b"not a library")
    with pytest.raises(
        ArtifactError, match=r"cannot load the kernels library .*kernels\.so: .*compile the model again"
    ):
        load_kernels(tmp_path / "kernels.so")


def test_build_is_cached() -> None:
    first = build_kernels("generic")
    written = first.stat().st_mtime_ns
    assert build_kernels("generic") == first and first.stat().st_mtime_ns == written


def test_two_builders_compile_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler is a script that notes its calls and takes a while."""
    compiler, calls = tmp_path / "compiler", tmp_path / "calls"
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exit\necho "$@" >> {calls}\nsleep 0.1\n'
        'while [ $# -gt 1 ]; do [ "$1" = -o ] && echo library > "$2"; shift; done\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("OPTC_CACHE", str(tmp_path / "cache"))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(build_kernels, ["generic", "generic"])
    assert first == second and first.exists()
    assert sum(" -shared " in f" {call} " for call in calls.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("compiler", "message"),
    [("no-such-compiler", "cannot run the C.. compiler 'no-such-compiler'.*eager"), ("false", "'false' failed.*eager")],
)
def test_build_without_compiler(compiler: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(LoweringError, match=message):
        build_kernels("generic")


def test_build_for_unknown_isa() -> None:
    with pytest.raises(
        LoweringError, match="unknown instruction set 'sse9', expected one of avx512_bf16, avx512_vnni, avx512"
    ):
        build_kernels("sse9")
    assert not supports("sse9")
    assert supports(host_isa()) and supports("generic")


def test_loader_imports_no_compiler() -> None:
    script = (
        "import sys, torch; before = set(sys.modules); import optc.runtime.ops.kernels;"
        "print([m for m in set(sys.modules) - before if m.split('.')[0] in ('sympy', 'transformers')"
        " or m.startswith(('torch._inductor', 'torch._dynamo'))])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
