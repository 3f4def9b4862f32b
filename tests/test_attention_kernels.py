"""The native attention kernels against the reference implementations, which are called directly.

`OPTC_TEST_ISA` picks the instruction set; `test_other_isas` runs part of this file again under each one the host has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from optc.optimizer.lowering.native import build_kernels
from optc.runtime.ops.attention import attention_reference, paged_attention_reference
from optc.runtime.ops.kernels import load_kernels

from .attention_cases import (
    DTYPES,
    GEOMETRY,
    OPS,
    QUANTIZED,
    TOLERANCE,
    Case,
    check_attention,
    check_paged,
    check_write,
    in_float32,
    sequences,
    weight_error,
)
from .isas import ISA, run_again, under_other_isas


@pytest.fixture(scope="module", autouse=True)
def native() -> None:
    load_kernels(build_kernels(ISA))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


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


@pytest.mark.parametrize("cache", [None, *QUANTIZED])
@pytest.mark.parametrize("dims", [(512, 512), (513, 64), (576, 512), (640, 640), (64, 1024)])
def test_fixed_wide_heads(dims: tuple[int, int], cache: torch.dtype | None) -> None:
    """Sums of 8-bit products would not fit 32 bits for keys of more than 512 elements."""
    case = Case(sequences=((1, 300), (9, 270), (40, 40)), k_dim=dims[0], v_dim=dims[1], window=280, cache=cache)
    for dtype in DTYPES:
        check_paged(replace(case, dtype=dtype))


@pytest.mark.parametrize(("k_dim", "v_dim"), [(512, 16), (640, 16), (16, 640)])
def test_fixed_largest_sums(k_dim: int, v_dim: int) -> None:
    """All codes are the largest: keys at even positions are like the queries, and the others their opposite."""
    case = Case(sequences=((1, 300), (20, 256)), k_dim=k_dim, v_dim=v_dim, dtype=torch.bfloat16, cache=torch.int8)
    q, cache, *rest = case.paged_args()
    rows = torch.full((len(cache), case.kv_heads, case.block_size, k_dim + v_dim), 3.0)
    rows[:, :, 1::2] *= -1
    found = OPS.paged_attention(torch.full_like(q, 3.0), case.quantized(rows), *rest)
    assert torch.equal(found, torch.full_like(found, 3.0))


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


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"dtype": torch.bfloat16, "cache": torch.int8}])
def test_nan_stays_visible(options: dict[str, Any]) -> None:
    """A broken query gives NaN, not a number that looks like an answer, and leaves the other rows alone."""
    args = Case(sequences=((4, 100), (1, 300)), sinks=True, **options).paged_args()
    q = args[0]
    q[2, 1] = float("nan")
    nan = OPS.paged_attention(*args).isnan().all(-1)
    assert nan.nonzero().tolist() == [[2, 1]]


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


def test_bad_attention_raises() -> None:
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(RuntimeError, match=r"v has shape \[1, 2, 4, 8\], expected \[1, 2, 5, 8\]"):
        OPS.attention(q, q, q[:, :, :4], 1.0, 0, 0.0, None, 0)
    with pytest.raises(RuntimeError, match="supports float32, bfloat16 and float16 on the CPU, not Double"):
        OPS.attention(q.double(), q.double(), q.double(), 1.0, 0, 0.0, None, 0)
    with pytest.raises(RuntimeError, match=r"sinks has shape \[3\], expected \[2\]"):
        OPS.attention(q, q, q, 1.0, 0, 0.0, torch.zeros(3), 0)
