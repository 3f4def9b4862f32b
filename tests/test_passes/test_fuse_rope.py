"""The pass that makes one op of the rotary embedding of queries and keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from optc.passes.fuse_rope import FuseRope
from optc.runtime import ops as _ops  # noqa: F401  the ops must be defined before they are traced

from .exported import Function, export, fuse, ops

T, H, KV, D = 5, 4, 2, 8
ROPE = "optc.rope.default"
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}
Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def llama(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos.unsqueeze(1) + rotate_half(x) * sin.unsqueeze(1)


def partly(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = cos.shape[-1]
    return torch.cat([llama(x[..., :width], cos, sin), x[..., width:]], dim=-1)


def turned_round(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return sin.unsqueeze(1) * rotate_half(x) + cos.unsqueeze(1) * x


def in_float32(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return llama(x.float(), cos, sin).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, layer: int = 0) -> Tensor:
    return torch.ops.optc.attention(q, k, v, D**-0.5, 0, 0.0, None, layer)


def model(rotate: Rotate, other: Rotate | None = None) -> Function:
    """One attention layer of heads that are rotated."""

    def forward(self: Any, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attend(rotate(q, cos, sin), (other or rotate)(k, cos, sin), v)

    return Function(forward)


def inputs(dtype: torch.dtype = torch.float32, rotary: int = D, angles: torch.dtype | None = None) -> list[Tensor]:
    heads = [numbers(1, T, count, D, dtype=dtype, seed=seed) for seed, count in enumerate((H, KV, KV))]
    phase = numbers(1, T, rotary, seed=9)  # all columns differ, so that mixing them up shows
    return [*heads, phase.cos().to(angles or dtype), phase.sin().to(angles or dtype)]


SPELLINGS = (llama, partly, turned_round, in_float32)
CASES = [(rotate, dtype, None) for rotate in SPELLINGS for dtype in ROUNDING]
CASES += [(in_float32, dtype, torch.float32) for dtype in ROUNDING]  # the others would give float32


@pytest.mark.parametrize(("rotate", "dtype", "angles"), CASES)
def test_spellings(rotate: Rotate, dtype: torch.dtype, angles: torch.dtype | None) -> None:
    given = inputs(dtype, D // 2 if rotate is partly else D, angles)
    program = export(model(rotate), *given)
    (expected,) = program.module(*given)
    record = fuse(program, FuseRope())
    assert record.matches == 1 and not record.declined
    assert set(ops(program)) == {
        "aten.transpose.int",
        ROPE,
        "<built-in function getitem>",
        "optc.attention.default",
    }
    torch.testing.assert_close(program.module(*given)[0], expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


def test_all_columns_spelled_as_a_part() -> None:
    given = inputs()
    program = export(model(partly), *given)
    (expected,) = program.module(*given)
    assert fuse(program, FuseRope()).matches == 1
    assert "aten.cat.default" not in ops(program)
    torch.testing.assert_close(program.module(*given)[0], expected, rtol=1e-6, atol=1e-6)


def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


def other_way(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos.unsqueeze(1) + torch.cat((x[..., half:], -x[..., :half]), dim=-1) * sin.unsqueeze(1)


def uneven(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos.unsqueeze(1) + torch.cat((-x[..., 2:], x[..., :2]), dim=-1) * sin.unsqueeze(1)


def of_another(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos.unsqueeze(1) + rotate_half(x + 1) * sin.unsqueeze(1)


def difference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos.unsqueeze(1) - rotate_half(x) * sin.unsqueeze(1)


def per_head(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos.unsqueeze(1).expand_as(x) + rotate_half(x) * sin.unsqueeze(1).expand_as(x)


def end_first(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.cat([x[..., 4:], llama(x[..., :4], cos[..., :4], sin[..., :4])], dim=-1)


def rest_of_another(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.cat([llama(x[..., :4], cos[..., :4], sin[..., :4]), (x + 1)[..., 4:]], dim=-1)


OTHERS = [interleaved, other_way, uneven, of_another, difference, per_head, end_first, rest_of_another]


@pytest.mark.parametrize("rotate", OTHERS)
def test_left_alone(rotate: Rotate) -> None:
    program = export(model(rotate), *inputs())
    before = ops(program)
    record = fuse(program, FuseRope())
    assert record.matches == 0 and ops(program) == before
    assert len(record.declined) == 1


def test_only_one_of_both() -> None:
    program = export(model(llama, interleaved), *inputs())
    record = fuse(program, FuseRope())
    assert record.matches == 0 and record.declined[0].startswith("attention: ")


def test_different_angles() -> None:
    program = export(model(llama, lambda x, cos, sin: llama(x, sin, cos)), *inputs())
    record = fuse(program, FuseRope())
    assert record.matches == 0 and "different angles" in record.declined[0]


def test_no_positions() -> None:
    """A layer without rotation is no candidate."""
    program = export(model(lambda x, cos, sin: x), *inputs())
    record = fuse(program, FuseRope())
    assert record.matches == 0 and not record.declined


def test_keys_that_two_layers_share() -> None:
    """The second layer takes the rotated keys of the first; its queries are rotated as before."""

    def forward(self: Any, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        keys = llama(k, cos, sin)
        first = attend(llama(q, cos, sin), keys, v)
        return attend(llama(first.transpose(1, 2), cos, sin), keys, v, layer=1)

    given = inputs()
    program = export(Function(forward), *given)
    (expected,) = program.module(*given)
    record = fuse(program, FuseRope())
    assert record.matches == 1 and len(record.declined) == 1
    torch.testing.assert_close(program.module(*given)[0], expected, rtol=1e-5, atol=1e-5)


def test_queries_that_are_used_before_the_keys_are_there() -> None:
    def forward(self: Any, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, v = q.transpose(1, 2), v.transpose(1, 2)
        queries = llama(q, cos, sin)
        keys = llama(k.transpose(1, 2) + queries.mean(), cos, sin)
        return attend(queries, keys, v)

    program = export(Function(forward), *inputs())
    record = fuse(program, FuseRope())
    assert record.matches == 0 and "before" in record.declined[0]
