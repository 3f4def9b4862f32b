"""The native kernels of fused ops against the reference implementations, which are called directly.

`OPTC_TEST_ISA` picks the instruction set; `test_other_isas` runs part of this file again under each one the host has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optc.optimizer.lowering.native import build_kernels
from optc.runtime.ops.attention import LARGEST_CODE
from optc.runtime.ops.gated import gelu_mul_reference, silu_mul_reference
from optc.runtime.ops.kernels import load_kernels
from optc.runtime.ops.norm import add_rms_norm_reference, rms_norm_reference
from optc.runtime.ops.quantized import quantize_activations
from optc.runtime.ops.rope import rope_kv_write_reference, rope_reference
from optc.runtime.ops.rounded import (
    add_rms_norm_a8_reference,
    gelu_mul_a8_reference,
    rms_norm_a8_reference,
    round_to_codes,
    silu_mul_a8_reference,
)

from .isas import ISA, run_again, under_other_isas

OPS = torch.ops.optc

# Half a unit in the last place of a 16-bit result, and what float32 arithmetic in another order adds.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8 + 2e-6, torch.float16: 2**-11 + 2e-6}
DTYPES = list(TOLERANCE)
dtypes = st.sampled_from(DTYPES)
CACHES = [None, *LARGEST_CODE]


@pytest.fixture(scope="module", autouse=True)
def native() -> None:
    load_kernels(build_kernels(ISA))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def near(found: Tensor, expected: Tensor, *, absolute: float = 2e-6) -> None:
    """Both are rounded to the result's dtype: to neighbours of each other at most."""
    assert found.dtype == expected.dtype and found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=2 * TOLERANCE[found.dtype], atol=absolute)


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, strided: bool = False) -> Tensor:
    """Normal numbers; if `strided`, the middle part of the rows of a larger tensor."""
    generator = torch.Generator().manual_seed(seed)
    if not strided:
        return torch.randn(*shape, generator=generator).to(dtype)
    wide = torch.randn(*shape[:-1], 2 * shape[-1] + 3, generator=generator).to(dtype)
    return wide[..., 2 : 2 + shape[-1]]


shapes = st.one_of(
    st.tuples(st.integers(1, 300)),
    st.tuples(st.integers(0, 5), st.integers(1, 300)),
    st.tuples(st.integers(1, 2), st.integers(0, 4), st.integers(1, 3), st.integers(1, 70)),
)


@given(shape=shapes, dtype=dtypes, wide_weight=st.booleans(), strided=st.booleans(), offset=st.sampled_from([0.0, 1.0]))
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, wide_weight: bool, strided: bool, offset: float) -> None:
    x, residual = (numbers(*shape, dtype=dtype, seed=seed, strided=strided) for seed in (1, 2))
    weight = numbers(shape[-1], dtype=torch.float32 if wide_weight else dtype, seed=3)
    near(OPS.rms_norm(x, weight, 1e-5, offset), rms_norm_reference(x, weight, 1e-5, offset))
    normed, total = OPS.add_rms_norm(x, residual, weight, 1e-5, offset)
    assert torch.equal(total, add_rms_norm_reference(x, residual, weight, 1e-5, offset)[1])
    assert torch.equal(normed, OPS.rms_norm(x + residual, weight, 1e-5, offset))


def test_norm_of_a_transposed_tensor() -> None:
    x, weight = numbers(2, 5, 3, 24).transpose(1, 2), numbers(24, seed=1)
    near(OPS.rms_norm(x, weight, 1e-6, 0.0), rms_norm_reference(x, weight, 1e-6, 0.0))
    odd = numbers(2, 5, 3, 4, 24).permute(2, 1, 0, 3, 4)  # lies in three steps, which is copied
    near(OPS.rms_norm(odd, weight, 1e-6, 0.0), rms_norm_reference(odd, weight, 1e-6, 0.0))
    columns = numbers(24, 7).t()
    near(OPS.rms_norm(columns, weight, 1e-6, 0.0), rms_norm_reference(columns, weight, 1e-6, 0.0))


def test_norm_of_zeros_and_of_what_is_no_number() -> None:
    weight = torch.ones(20)
    assert torch.equal(OPS.rms_norm(torch.zeros(2, 20), weight, 1e-6, 0.0), torch.zeros(2, 20))
    x = torch.ones(2, 20, dtype=torch.bfloat16)
    x[0, 19] = torch.nan
    found = OPS.rms_norm(x, weight, 1e-6, 0.0)
    assert found[0].isnan().all() and not found[1].isnan().any()


@given(shape=shapes, dtype=dtypes, strided=st.booleans())
def test_gates(shape: tuple[int, ...], dtype: torch.dtype, strided: bool) -> None:
    gate, up = (4 * numbers(*shape, dtype=dtype, seed=seed, strided=strided) for seed in (1, 2))
    near(OPS.silu_mul(gate, up), silu_mul_reference(gate, up))
    for tanh in (True, False):
        # 1 + tanh(x), or 1 + erf(x), cancels where x is negative; what is left is multiplied by numbers of about 10.
        near(OPS.gelu_mul(gate, up, tanh), gelu_mul_reference(gate, up, tanh), absolute=1e-5)


def test_gates_far_from_zero() -> None:
    gate = torch.tensor([-1e30, -200.0, -90.0, -60.0, 0.0, -0.0, 60.0, 90.0, 1e30, torch.nan])
    up = torch.ones_like(gate)
    for found, expected in (
        (OPS.silu_mul(gate, up), silu_mul_reference(gate, up)),
        (OPS.gelu_mul(gate, up, True), gelu_mul_reference(gate, up, True)),
        (OPS.gelu_mul(gate, up, False), gelu_mul_reference(gate, up, False)),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7, equal_nan=True)


def test_halves_of_one_tensor() -> None:
    """As the projections of gate and up lie when they are one."""
    both = numbers(7, 2 * 100, dtype=torch.bfloat16)
    near(OPS.silu_mul(both[:, :100], both[:, 100:]), silu_mul_reference(both[:, :100], both[:, 100:]))


def angles(tokens: int, rotary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [tokens, rotary]; the halves differ, so that mixing them up shows."""
    phase = torch.arange(tokens)[:, None] * torch.linspace(0.1, 1.3, rotary)
    return phase.cos().to(dtype), phase.sin().to(dtype)


@given(
    batch=st.integers(1, 2),
    tokens=st.integers(0, 5),
    heads=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    half=st.integers(1, 40),
    rest=st.integers(0, 20),
    dtype=dtypes,
    wide_angles=st.booleans(),
    transposed=st.booleans(),
)
def test_rope(
    batch: int,
    tokens: int,
    heads: tuple[int, int],
    half: int,
    rest: int,
    dtype: torch.dtype,
    wide_angles: bool,
    transposed: bool,
) -> None:
    dim = 2 * half + rest

    def make(count: int, seed: int) -> Tensor:
        if transposed:
            return numbers(batch, tokens, count, dim, dtype=dtype, seed=seed).transpose(1, 2)
        return numbers(batch, count, tokens, dim, dtype=dtype, seed=seed)

    q, k = make(heads[0], 1), make(heads[1], 2)
    cos, sin = (
        x.expand(batch, -1, -1).contiguous() for x in angles(tokens, 2 * half, torch.float32 if wide_angles else dtype)
    )
    for found, expected in zip(OPS.rope(q, k, cos, sin), rope_reference(q, k, cos, sin), strict=True):
        near(found, expected)


@dataclass(frozen=True, kw_only=True)
class Step:
    """The arguments of `rope_kv_write`."""

    tokens: int = 5
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    v_dim: int = 16
    rotary: int = 16
    block_size: int = 4
    normed: bool = False
    merged: bool = True
    dtype: torch.dtype = torch.float32
    cache: torch.dtype | None = None
    seed: int = 0

    def arguments(self) -> list[Any]:
        """q, k and v are slices of one tensor if `merged`; the cache holds ones; the second token is padding."""
        widths = [self.heads * self.dim, self.kv_heads * self.dim, self.kv_heads * self.v_dim]
        parts = numbers(self.tokens, sum(widths), dtype=self.dtype, seed=self.seed).split(widths, dim=1)
        q, k, v = (
            (part if self.merged else part.contiguous()).unflatten(1, (count, -1))
            for part, count in zip(parts, (self.heads, self.kv_heads, self.kv_heads), strict=True)
        )
        cos, sin = angles(self.tokens, self.rotary, self.dtype)
        weights = [numbers(self.dim, dtype=self.dtype, seed=seed) if self.normed else None for seed in (7, 8)]
        blocks = self.tokens // self.block_size + 2
        generator = torch.Generator().manual_seed(self.seed)
        slots = torch.randperm(blocks * self.block_size, generator=generator)[: self.tokens]
        if self.tokens > 1:
            slots[1] = -1
        width = self.dim + self.v_dim + (8 if self.cache else 0)
        kv_cache = torch.ones(blocks, self.kv_heads, self.block_size, width).to(self.cache or self.dtype)
        return [q, k, v, cos, sin, *weights, 1e-5, 1.0, kv_cache, slots]


def as_bytes(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


def check_step(step: Step) -> None:
    """To the bit what the ops give that it stands for, and near the reference."""
    arguments = step.arguments()
    q, k, v, cos, sin, q_weight, k_weight, eps, offset, kv_cache, slots = arguments
    found_cache, expected_cache, reference_cache = (kv_cache.clone() for _ in range(3))
    found = OPS.rope_kv_write(*arguments[:9], found_cache, slots)

    if step.normed:
        q, k = OPS.rms_norm(q, q_weight, eps, offset), OPS.rms_norm(k, k_weight, eps, offset)
    rotated = OPS.rope(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])
    q, k = (x[0].transpose(0, 1) for x in rotated)
    OPS.kv_cache_write(k, v, expected_cache, slots)
    assert torch.equal(found, q.contiguous())
    assert torch.equal(as_bytes(found_cache), as_bytes(expected_cache))

    # A head that is rounded the other way between norm and rotation is off by that much, times a norm of about three.
    absolute = 10 * TOLERANCE[step.dtype] if step.normed else 1e-5
    near(found, rope_kv_write_reference(*arguments[:9], reference_cache, slots), absolute=absolute)
    if step.cache is None:
        near(found_cache, reference_cache, absolute=absolute)


@given(
    tokens=st.integers(0, 9),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    half=st.integers(1, 20),
    rest=st.integers(0, 9),
    v_dim=st.integers(1, 40),
    normed=st.booleans(),
    merged=st.booleans(),
    dtype=dtypes,
    cache=st.sampled_from(CACHES),
)
def test_rope_kv_write(
    tokens: int,
    kv_heads: int,
    group: int,
    half: int,
    rest: int,
    v_dim: int,
    normed: bool,
    merged: bool,
    dtype: torch.dtype,
    cache: torch.dtype | None,
) -> None:
    check_step(
        Step(
            tokens=tokens,
            heads=group * kv_heads,
            kv_heads=kv_heads,
            dim=2 * half + rest,
            rotary=2 * half,
            v_dim=v_dim,
            normed=normed,
            merged=merged,
            dtype=dtype,
            cache=cache,
        )
    )


@pytest.mark.parametrize("cache", CACHES)
def test_heads_as_models_have_them(cache: torch.dtype | None) -> None:
    for dim, rotary in ((64, 64), (128, 128), (80, 32), (256, 256), (1024, 1024)):
        check_step(Step(dim=dim, v_dim=dim, rotary=rotary, normed=True, dtype=torch.bfloat16, cache=cache))


activations = st.one_of(
    st.just("int8-token"), st.integers(1, 80).map(lambda size: f"int8-group{size}"), st.just("none")
)


@given(shape=shapes, dtype=dtypes, strided=st.booleans(), activation=activations)
def test_rounded(shape: tuple[int, ...], dtype: torch.dtype, strided: bool, activation: str) -> None:
    """To the bit the codes of what the op without rounding gives."""
    x, y = (numbers(*shape, dtype=dtype, seed=seed, strided=strided) for seed in (1, 2))
    weight = numbers(shape[-1], dtype=dtype, seed=3)
    *found, total = OPS.add_rms_norm_a8(x, y, weight, 1e-5, 1.0, activation)
    normed, expected_total = OPS.add_rms_norm(x, y, weight, 1e-5, 1.0)
    assert torch.equal(total, expected_total)
    cases = [
        (OPS.rms_norm_a8(x, weight, 1e-5, 0.0, activation), OPS.rms_norm(x, weight, 1e-5, 0.0)),
        (found, normed),
        (OPS.silu_mul_a8(x, y, activation), OPS.silu_mul(x, y)),
        (OPS.gelu_mul_a8(x, y, True, activation), OPS.gelu_mul(x, y, True)),
        (OPS.gelu_mul_a8(x, y, False, activation), OPS.gelu_mul(x, y, False)),
    ]
    for (codes, steps), value in cases:
        expected_codes, expected_steps = round_to_codes(value, activation)
        assert codes.dtype == expected_codes.dtype and steps.shape == expected_steps.shape
        assert torch.equal(codes, expected_codes) and torch.equal(steps, expected_steps)


@pytest.mark.parametrize("activation", ["int8-token", "int8-group32", "int8-group24"])
def test_codes_mean_what_a_linear_layer_would_round_to(activation: str) -> None:
    x = numbers(5, 100, dtype=torch.bfloat16)
    x[2] = 0
    codes, steps = round_to_codes(x, activation)
    size = 100 if activation == "int8-token" else int(activation[10:])
    values = codes.float() * steps.repeat_interleave(size, -1)[..., :100]
    assert torch.equal(values, quantize_activations(x, activation, None))


def test_codes_of_what_is_no_number() -> None:
    x = numbers(3, 40)
    x[0, 3], x[1, 39] = torch.nan, torch.inf
    codes, steps = OPS.silu_mul_a8(x, torch.ones_like(x), "int8-group32")
    expected = silu_mul_a8_reference(x, torch.ones_like(x), "int8-group32")
    assert steps.isnan().tolist() == [[True, False], [False, True], [False, False]]
    assert torch.equal(codes, expected[0]) and torch.equal(steps.isnan(), expected[1].isnan())


ROW_WISE: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "rms_norm": lambda x, y, w: (OPS.rms_norm(x, w, 1e-5, 0.0),),
    "add_rms_norm": lambda x, y, w: OPS.add_rms_norm(x, y, w, 1e-5, 0.0),
    "silu_mul": lambda x, y, w: (OPS.silu_mul(x, y),),
    "gelu_mul": lambda x, y, w: (OPS.gelu_mul(x, y, True),),
    "add_rms_norm_a8": lambda x, y, w: OPS.add_rms_norm_a8(x, y, w, 1e-5, 0.0, "int8-token"),
    "silu_mul_a8": lambda x, y, w: OPS.silu_mul_a8(x, y, "int8-group32"),
}


@pytest.mark.parametrize("name", ROW_WISE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_alone(name: str, dtype: torch.dtype) -> None:
    x, y = (numbers(200, 1027, dtype=dtype, seed=seed) for seed in (1, 2))
    weight = numbers(1027, dtype=dtype, seed=3)
    alone = [ROW_WISE[name](x[i : i + 1], y[i : i + 1], weight) for i in (0, 77, 199)]
    for count in (1, 2):
        torch.set_num_threads(count)
        together = ROW_WISE[name](x, y, weight)
        for row, i in zip(alone, (0, 77, 199), strict=True):
            for part, whole in zip(row, together, strict=True):
                assert torch.equal(part[0], whole[i])


@pytest.mark.parametrize("cache", CACHES)
def test_a_token_has_the_same_bits_alone(cache: torch.dtype | None) -> None:
    step = Step(
        tokens=150, heads=8, kv_heads=4, dim=64, v_dim=64, rotary=64, normed=True, dtype=torch.bfloat16, cache=cache
    )
    q, k, v, cos, sin, *weights, kv_cache, slots = step.arguments()
    one_by_one, rows = kv_cache.clone(), []
    for t in range(step.tokens):
        one = slice(t, t + 1)
        rows.append(OPS.rope_kv_write(q[one], k[one], v[one], cos[one], sin[one], *weights, one_by_one, slots[one]))
    for count in (1, 2):
        torch.set_num_threads(count)
        together = kv_cache.clone()
        assert torch.equal(OPS.rope_kv_write(q, k, v, cos, sin, *weights, together, slots), torch.cat(rows))
        assert torch.equal(as_bytes(together), as_bytes(one_by_one))


def test_wrong_arguments() -> None:
    x, weight = torch.ones(2, 8), torch.ones(8)
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("weight has shape", lambda: OPS.rms_norm(x, torch.ones(7), 1e-5, 0.0)),
        ("weight has dtype", lambda: OPS.rms_norm(x, weight.half(), 1e-5, 0.0)),
        ("no tensors of Double", lambda: OPS.rms_norm(x.double(), weight, 1e-5, 0.0)),
        ("different shapes", lambda: OPS.add_rms_norm(x, x[:1], weight, 1e-5, 0.0)),
        ("one shape", lambda: OPS.silu_mul(x, x[:, :4])),
        ("up has dtype", lambda: OPS.silu_mul(x, x.half())),
        ("unknown activation", lambda: OPS.silu_mul_a8(x, x, "fp8-token")),
        ("groups of no columns", lambda: OPS.silu_mul_a8(x, x, "int8-group0")),
        ("are rotated", lambda: OPS.rope(x[None, None], x[None, None], torch.ones(1, 2, 10), torch.ones(1, 2, 10))),
        ("slots", lambda: OPS.rope_kv_write(*Step().arguments()[:10], torch.full((5,), 99))),
    ]
    for message, run in cases:
        with pytest.raises(RuntimeError, match=message):
            run()


def test_schemas_and_fakes() -> None:
    """What torch.export and Inductor go by."""
    x, y, weight = numbers(3, 24), numbers(3, 24, seed=1), numbers(24, seed=2)
    q, k = numbers(1, 2, 3, 8), numbers(1, 1, 3, 8, seed=1)
    cos, sin = (part[None] for part in angles(3, 8, torch.float32))
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (OPS.rms_norm, (x, weight, 1e-5, 0.0)),
        (OPS.add_rms_norm, (x, y, weight, 1e-5, 0.0)),
        (OPS.silu_mul, (x, y)),
        (OPS.gelu_mul, (x, y, True)),
        (OPS.rope, (q, k, cos, sin)),
        (OPS.rope_kv_write, tuple(Step(normed=True).arguments())),
        (OPS.rms_norm_a8, (x, weight, 1e-5, 0.0, "int8-group16")),
        (OPS.add_rms_norm_a8, (x, y, weight, 1e-5, 0.0, "int8-token")),
        (OPS.silu_mul_a8, (x, y, "int8-group5")),
        (OPS.gelu_mul_a8, (x, y, True, "none")),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_references_of_rounded_ops() -> None:
    x, y, weight = numbers(3, 24), numbers(3, 24, seed=1), numbers(24, seed=2)
    for (codes, _), exact in (
        (rms_norm_a8_reference(x, weight, 1e-5, 0.0, "none"), rms_norm_reference(x, weight, 1e-5, 0.0)),
        (add_rms_norm_a8_reference(x, y, weight, 1e-5, 0.0, "none")[:2], rms_norm_reference(x + y, weight, 1e-5, 0.0)),
        (silu_mul_a8_reference(x, y, "none"), silu_mul_reference(x, y)),
        (gelu_mul_a8_reference(x, y, True, "none"), gelu_mul_reference(x, y, True)),
    ):
        assert torch.equal(codes, exact)


@under_other_isas
def test_other_isas(isa: str) -> None:
    run_again(__file__, isa, "same_bits or as_models_have or halves or no_number or zero")
