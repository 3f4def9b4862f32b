"""The pass that makes one op of the gate of a gated MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from optc.passes.fuse_silu_mul import FuseSiluMul

from .exported import Function, export, fuse, ops

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


GATES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "silu": (lambda gate, up: silu(gate) * up, "optc.silu_mul.default"),
    "turned round": (lambda gate, up: up * silu(gate), "optc.silu_mul.default"),
    "gelu": (lambda gate, up: gelu(gate) * up, "optc.gelu_mul.default"),
    "gelu with tanh": (lambda gate, up: gelu(gate, approximate="tanh") * up, "optc.gelu_mul.default"),
}


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", GATES)
def test_gates(name: str, dtype: torch.dtype) -> None:
    f, op = GATES[name]
    gate, up = numbers(1, 5, 24, dtype=dtype), numbers(1, 5, 24, dtype=dtype, seed=1)
    program = export(Function(lambda self, gate, up: f(gate, up)), gate, up)
    (expected,) = program.module(gate, up)
    assert fuse(program, FuseSiluMul()).matches == 1
    assert ops(program) == {op: 1}
    (found,) = program.module(gate, up)
    torch.testing.assert_close(found, expected, rtol=ROUNDING[dtype], atol=1e-6)


def test_halves_of_one_projection() -> None:
    """The halves are views; nothing copies them."""
    both = numbers(1, 5, 48)
    program = export(Function(lambda self, x: silu(x[..., :24]) * x[..., 24:]), both)
    (expected,) = program.module(both)
    assert fuse(program, FuseSiluMul()).matches == 1
    assert ops(program) == {"aten.slice.Tensor": 2, "optc.silu_mul.default": 1}
    torch.testing.assert_close(program.module(both)[0], expected, rtol=1e-6, atol=1e-6)


OTHERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "no gate": lambda gate, up: silu(gate) + up,
    "by a number": lambda gate, up: silu(gate) * 2.0,
    "used twice": lambda gate, up: (silu(gate) * up, silu(gate).sum()),
    "squared": lambda gate, up: (y := silu(gate)) * y,
    "spread": lambda gate, up: silu(gate) * up[..., :1],
    "another dtype": lambda gate, up: silu(gate) * up.bfloat16(),
    "double": lambda gate, up: silu(gate.double()) * up.double(),
    "relu": lambda gate, up: torch.relu(gate) * up,
}


@pytest.mark.parametrize("name", OTHERS)
def test_left_alone(name: str) -> None:
    def f(self: Any, gate: Tensor, up: Tensor) -> Any:
        if name == "used twice":
            activated = silu(gate)
            return activated * up, activated + 1
        return OTHERS[name](gate, up)

    program = export(Function(f), numbers(1, 5, 24), numbers(1, 5, 24, seed=1))
    before = ops(program)
    record = fuse(program, FuseSiluMul())
    assert record.matches == 0 and ops(program) == before
    assert bool(record.declined) == (name in ("used twice", "squared", "spread", "another dtype", "double"))
