"""Each rule where it holds, and every look-alike that it must leave alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from optc.passes.base import run_passes
from optc.passes.canonicalize import Canonicalize
from optc.passes.graph import Program, call, propagate
from optc.passes.verify import Probe
from optc.runtime.manifest import PassRecord, TensorSpec

aten, optc = torch.ops.aten, torch.ops.optc
Build = Callable[..., fx.Node]
X = [TensorSpec(name="x", dtype="float32", shape=(1, "T", 8))]
QKV = [
    TensorSpec(name=name, dtype="float32", shape=(1, heads, "T", 8)) for name, heads in (("q", 4), ("k", 2), ("v", 2))
]


def check(program: Program, *inputs: Tensor) -> PassRecord:
    """Run the pass; the results before and after must be equal, in value and dtype."""
    before = program.copy().module(*inputs)[0]
    (record,) = run_passes(program, [Canonicalize()])
    after = program.module(*inputs)[0]
    assert before.dtype == after.dtype
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    return record


def ops(program: Program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def test_the_captured_model(captured: Program, probe: Probe, count: Callable[..., int]) -> None:
    (record,) = run_passes(captured, [Canonicalize()], probe=probe)
    assert record.max_error == 0
    assert record.matches > 0
    assert count(captured, aten.dropout.default) == 0
    assert count(captured, optc.attention.default) == 2
    assert count(captured, aten.linear.default) == 9
    again = run_passes(captured, [Canonicalize()])[0]
    assert (again.matches, again.node_delta) == (0, 0)


REMOVED: dict[str, Build] = {
    "alias": lambda g, x: call(g, aten.alias.default, x),
    "detach": lambda g, x: call(g, aten.detach.default, x),
    "lift_fresh_copy": lambda g, x: call(g, aten.lift_fresh_copy.default, x),
    "dropout that is off": lambda g, x: call(g, aten.dropout.default, x, 0.5, False),
    "copy to the same dtype": lambda g, x: call(g, aten._to_copy.default, x, dtype=torch.float32),
    "times one": lambda g, x: call(g, aten.mul.Tensor, x, 1.0),
    "times integer one": lambda g, x: call(g, aten.mul.Tensor, x, 1),
    "whole slice": lambda g, x: call(g, aten.slice.Tensor, x, 1, 0, 2**63 - 1),
    "whole slice from None": lambda g, x: call(g, aten.slice.Tensor, x, 1, None, 2**63 - 1),
    "slice of nothing said": lambda g, x: call(g, aten.slice.Tensor, x),
    "chain": lambda g, x: call(g, aten.alias.default, call(g, aten.mul.Tensor, call(g, aten.detach.default, x), 1.0)),
}


@pytest.mark.parametrize("case", REMOVED)
def test_what_does_nothing_is_removed(case: str, program_of: Callable[..., Program]) -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        return call(graph, aten.neg.default, REMOVED[case](graph, x))

    program = program_of(build, inputs=X)
    record = check(program, torch.randn(1, 5, 8))
    assert ops(program) == ["aten.neg.default"]
    assert record.matches == (3 if case == "chain" else 1)
    assert record.declined == ()


KEPT: dict[str, Build] = {
    "copy to another dtype": lambda g, x: call(g, aten._to_copy.default, x, dtype=torch.bfloat16),
    "copy with a memory format": lambda g, x: call(
        g, aten._to_copy.default, x, dtype=torch.float32, memory_format=torch.contiguous_format
    ),
    "times two": lambda g, x: call(g, aten.mul.Tensor, x, 2.0),
    "times nearly one": lambda g, x: call(g, aten.mul.Tensor, x, 1.0000001),
    "times itself": lambda g, x: call(g, aten.mul.Tensor, x, x),
    "slice from one": lambda g, x: call(g, aten.slice.Tensor, x, 1, 1, 2**63 - 1),
    "slice up to three": lambda g, x: call(g, aten.slice.Tensor, x, 1, 0, 3),
    "slice but the last": lambda g, x: call(g, aten.slice.Tensor, x, 1, 0, -1),
    "every other": lambda g, x: call(g, aten.slice.Tensor, x, 1, 0, 2**63 - 1, 2),
    "slice from a named start": lambda g, x: call(g, aten.slice.Tensor, x, 1, start=2),
    "slice with a named step": lambda g, x: call(g, aten.slice.Tensor, x, dim=1, step=2),
    "clone": lambda g, x: call(g, aten.clone.default, x),
}


@pytest.mark.parametrize("case", KEPT)
def test_look_alikes_are_kept(case: str, program_of: Callable[..., Program]) -> None:
    program = program_of(KEPT[case], inputs=X)
    record = check(program, torch.randn(1, 5, 8))
    assert len(ops(program)) == 1
    assert record.matches == 0


def test_times_one_that_changes_the_dtype_is_kept(program_of: Callable[..., Program]) -> None:
    program = program_of(lambda g, ids, positions: call(g, aten.mul.Tensor, ids, 1.0))
    check(program, torch.arange(3)[None], torch.arange(3)[None])
    assert ops(program) == ["aten.mul.Tensor"]
    program = program_of(lambda g, ids, positions: call(g, aten.mul.Tensor, ids, True))
    check(program, torch.arange(3)[None], torch.arange(3)[None])


def test_times_a_weight_of_ones_is_kept(program_of: Callable[..., Program]) -> None:
    """It may widen the dtype or broadcast the shape."""
    program = program_of(lambda g, x, one: call(g, aten.mul.Tensor, x, one), {"one": torch.ones(3, 1, 1, 1)}, X)
    check(program, torch.randn(1, 5, 8))
    assert ops(program) == ["aten.mul.Tensor"]


def test_dropout_in_training_mode_is_kept_and_said(program_of: Callable[..., Program]) -> None:
    for build in (
        lambda g, x: call(g, aten.dropout.default, x, 0.5, True),
        lambda g, x: call(g, aten.dropout.default, x, p=0.5, train=True),
    ):
        program = program_of(build, inputs=X)
        (record,) = run_passes(program, [Canonicalize()])
        assert ops(program) == ["aten.dropout.default"]
        assert record.declined == ("dropout_default: dropout in training mode",)


def test_assertions_are_removed(program_of: Callable[..., Program]) -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        call(graph, aten._assert_tensor_metadata.default, x, dtype=torch.float32)
        return call(graph, aten.neg.default, x)

    program = program_of(build, inputs=X)
    assert check(program, torch.randn(1, 5, 8)).matches == 1
    assert ops(program) == ["aten.neg.default"]


# ------------------------------------------------------------------------------------------------- attention

SDPA = aten.scaled_dot_product_attention.default


def qkv(tokens: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, tokens, 8, generator=generator) for heads in (4, 2, 2)]


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"scale": None}])
def test_causal_attention(options: dict[str, Any], program_of: Callable[..., Program]) -> None:
    def build(graph: fx.Graph, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
        first = call(graph, SDPA, q, k, v, None, 0.0, True, enable_gqa=True, **options)
        return call(graph, SDPA, first, k, v, is_causal=True, enable_gqa=True, **options)

    program = program_of(build, inputs=QKV)
    assert check(program, *qkv()).matches == 2
    attentions = program.graph.find_nodes(op="call_function", target=optc.attention.default)
    assert [node.args[7] for node in attentions] == [0, 1]
    assert all(node.args[3] == pytest.approx(options.get("scale") or 8**-0.5) for node in attentions)
    assert all(node.args[4:7] == (0, 0.0, None) for node in attentions)


def mask(graph: fx.Graph, q: fx.Node) -> fx.Node:
    return call(graph, aten.ones.default, [1, 1, 1, 1], dtype=torch.bool)


OTHER_ATTENTION: dict[str, tuple[Build, str]] = {
    "not causal": (lambda g, q, k, v: call(g, SDPA, q, k, v, enable_gqa=True), "not causal"),
    "with a mask": (lambda g, q, k, v: call(g, SDPA, q, k, v, mask(g, q), enable_gqa=True), "explicit mask"),
    "over fewer keys": (
        lambda g, q, k, v: call(
            g, SDPA, q, *(call(g, aten.slice.Tensor, x, 2, 0, 3) for x in (k, v)), None, 0.0, True, enable_gqa=True
        ),
        "attention over",
    ),
}


@pytest.mark.parametrize("case", OTHER_ATTENTION)
def test_other_attention_is_declined(case: str, program_of: Callable[..., Program]) -> None:
    build, reason = OTHER_ATTENTION[case]
    program = program_of(build, inputs=QKV)
    record = check(program, *qkv())
    assert record.matches == 0
    assert len(record.declined) == 1
    assert reason in record.declined[0]
    assert str(SDPA) in ops(program)


def test_attention_with_dropout_is_declined(program_of: Callable[..., Program]) -> None:
    program = program_of(lambda g, q, k, v: call(g, SDPA, q, k, v, None, 0.5, True, enable_gqa=True), inputs=QKV)
    (record,) = run_passes(program, [Canonicalize()])
    assert record.matches == 0
    assert "dropout" in record.declined[0]


# ------------------------------------------------------------------------------------------------- addmm

ADDMM = aten.addmm.default
ROWS = [TensorSpec(name="x", dtype="float32", shape=("T", 8))]
WEIGHTS = {"w": torch.randn(8, 3, generator=torch.Generator().manual_seed(1)), "b": torch.arange(3.0)}


def test_addmm_becomes_linear(program_of: Callable[..., Program]) -> None:
    """As in GPT-2, whose weights are stored transposed. Two uses of a weight share its transposed form."""

    def build(graph: fx.Graph, x: fx.Node, w: fx.Node, b: fx.Node) -> fx.Node:
        return call(graph, aten.add.Tensor, call(graph, ADDMM, b, x, w), call(graph, ADDMM, b, x, w))

    program = program_of(build, WEIGHTS, ROWS)
    assert check(program, torch.randn(5, 8)).matches == 2
    assert ops(program) == ["aten.linear.default", "aten.linear.default", "aten.add.Tensor"]
    weights = {name: weight for name, weight in program.weights().items() if name != "b"}
    ((name, weight),) = weights.items()
    assert torch.equal(weight, WEIGHTS["w"].t())
    assert weight.is_contiguous()
    assert program.sources[name] == "w"


def test_addmm_of_a_weight_with_a_dotted_name(program_of: Callable[..., Program]) -> None:
    program = program_of(lambda g, x, w, b: call(g, ADDMM, b, x, w), WEIGHTS, ROWS)
    module = program.module
    module.layer = torch.nn.Module()
    module.layer.c_attn = torch.nn.Module()
    module.layer.c_attn.weight = torch.nn.Parameter(WEIGHTS["w"], requires_grad=False)
    (node,) = [node for node in program.graph.find_nodes(op="get_attr") if node.target == "w"]
    node.target = "layer.c_attn.weight"
    module.recompile()
    propagate(program)
    assert check(program, torch.randn(5, 8)).matches == 1
    assert ops(program) == ["aten.linear.default"]


OTHER_ADDMM: dict[str, Build] = {
    "computed weight": lambda g, x, w, b: call(g, ADDMM, b, x, call(g, aten.neg.default, w)),
    "alpha": lambda g, x, w, b: call(g, ADDMM, b, x, w, alpha=2.0),
    "beta": lambda g, x, w, b: call(g, ADDMM, b, x, w, beta=0.5),
    "bias with rows": lambda g, x, w, b: call(g, ADDMM, call(g, aten.unsqueeze.default, b, 0), x, w),
}


@pytest.mark.parametrize("case", OTHER_ADDMM)
def test_other_addmm_is_declined(case: str, program_of: Callable[..., Program]) -> None:
    program = program_of(OTHER_ADDMM[case], WEIGHTS, ROWS)
    record = check(program, torch.randn(5, 8))
    assert record.matches == 0
    assert record.declined == ("addmm_default: addmm of computed operands",)
    assert str(ADDMM) in ops(program)


# ------------------------------------------------------------------------------------------------- matmul

MATMUL, PERMUTE = aten.matmul.default, aten.permute.default


def test_matmul_with_a_transposed_weight_becomes_linear(program_of: Callable[..., Program]) -> None:
    """As in Falcon."""
    weight = {"w": torch.randn(3, 8, generator=torch.Generator().manual_seed(1))}
    program = program_of(lambda g, x, w: call(g, MATMUL, x, call(g, PERMUTE, w, [1, 0])), weight, X)
    assert check(program, torch.randn(1, 5, 8)).matches == 1
    assert ops(program) == ["aten.linear.default"]


OTHER_MATMUL: dict[str, Build] = {
    "as it is": lambda g, x, w: call(g, MATMUL, x, w),
    "not transposed": lambda g, x, w: call(g, MATMUL, x, call(g, PERMUTE, w, [0, 1])),
    "computed": lambda g, x, w: call(g, MATMUL, x, call(g, PERMUTE, call(g, aten.neg.default, w), [1, 0])),
    "two values": lambda g, x, w: call(g, MATMUL, x, call(g, aten.transpose.int, x, 1, 2)),
}


@pytest.mark.parametrize("case", OTHER_MATMUL)
def test_other_matmul_stays(case: str, program_of: Callable[..., Program]) -> None:
    weight = {"w": torch.randn(8, 8, generator=torch.Generator().manual_seed(1))}
    program = program_of(OTHER_MATMUL[case], weight, X)
    assert check(program, torch.randn(1, 5, 8)).matches == 0
    assert str(MATMUL) in ops(program)
