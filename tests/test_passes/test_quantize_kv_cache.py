"""The pass that stores keys and values in 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch

from optc.errors import PassError
from optc.passes.base import run_passes
from optc.passes.gather_logits import GatherLogits
from optc.passes.graph import Program, call, input_node, value_of
from optc.passes.kv_cache import KVCache
from optc.passes.paged_attention import PagedAttention
from optc.passes.quantize_kv_cache import QuantizeKVCache
from optc.passes.verify import Probe
from optc.runtime.manifest import TensorSpec

aten, optc = torch.ops.aten, torch.ops.optc
PASSES = [KVCache(), PagedAttention(), GatherLogits()]


@pytest.fixture
def step(canonical: Program) -> Program:
    run_passes(canonical, PASSES, facts={"canonical"})
    return canonical


@pytest.mark.parametrize(("dtype", "stored"), [("int8", "int8"), ("fp8", "float8_e4m3fn")])
def test_structure(step: Program, dtype: Literal["int8", "fp8"], stored: str) -> None:
    nodes = [(node.name, node.target) for node in step.graph.nodes]
    (record,) = run_passes(step, [QuantizeKVCache(dtype=dtype)], facts={"paged"})
    assert (record.name, record.matches, record.declined, record.node_delta) == ("quantize_kv_cache", 2, (), 0)
    assert [(node.name, node.target) for node in step.graph.nodes] == nodes
    assert [(spec.k_dim, spec.v_dim, spec.row_size, spec.dtype) for spec in step.kv_cache] == [(8, 8, 24, stored)] * 2
    caches = {spec.name: (spec.dtype, spec.shape) for spec in step.inputs if spec.name.startswith("kv_cache.")}
    assert caches == {f"kv_cache.{layer}": (stored, ("N", 2, "S", 24)) for layer in range(2)}
    assert value_of(input_node(step, "kv_cache.1")).dtype == getattr(torch, stored)


# Half a step of 1/127 of the largest key, and of 1/16 of each key.
@pytest.mark.parametrize(("dtype", "error"), [("int8", 0.01), ("fp8", 0.06)])
def test_numbers(step: Program, probe: Probe, dtype: Literal["int8", "fp8"], error: float) -> None:
    """The logits move, but little: the check runs over quantized caches."""
    (record,) = run_passes(step, [QuantizeKVCache(dtype=dtype)], facts={"paged"}, probe=probe)
    assert record.max_error is not None
    assert 0 < record.max_error < error


def test_other_programs_keep_their_caches(step: Program) -> None:
    other = step.copy()
    run_passes(step, [QuantizeKVCache(dtype="int8")], facts={"paged"})
    assert {spec.dtype for spec in other.kv_cache} == {"float32"}
    assert other.inputs != step.inputs


def test_layers_of_different_shapes(program_of: Callable[..., Program]) -> None:
    """Keys wider than values, in bfloat16, and another number of heads in the second layer."""
    shapes = {"q": (4, 8), "k": (2, 8), "v": (2, 4), "q2": (3, 5), "k2": (1, 5), "v2": (1, 5)}
    inputs = [
        TensorSpec(name="input_ids", dtype="int64", shape=(1, "T")),
        TensorSpec(name="positions", dtype="int64", shape=(1, "T")),
        *(
            TensorSpec(name=name, dtype="bfloat16", shape=(1, shape[0], "T", shape[1]))
            for name, shape in shapes.items()
        ),
    ]

    def build(g: torch.fx.Graph, ids: torch.fx.Node, positions: torch.fx.Node, *x: torch.fx.Node) -> torch.fx.Node:
        first = call(g, optc.attention.default, *x[:3], 1.0, 5, 0.0, None, 0)
        second = call(g, optc.attention.default, *x[3:], 1.0, 0, 0.0, None, 1)
        return call(g, aten.add.Tensor, call(g, aten.sum.default, first), call(g, aten.sum.default, second))

    program = program_of(build, inputs=inputs)
    run_passes(program, [*PASSES[:2], QuantizeKVCache(dtype="int8")], facts={"canonical"})
    assert [spec.shape for spec in program.inputs if spec.name.startswith("kv_cache.")] == [
        ("N", 2, "S", 20),
        ("N", 1, "S", 18),
    ]
    assert [spec.window for spec in program.kv_cache] == [5, 0]


def test_a_program_without_a_cache(program_of: Callable[..., Program]) -> None:
    program = program_of(lambda g, ids, positions: call(g, aten.add.Tensor, ids, positions))
    (record,) = run_passes(program, [QuantizeKVCache(dtype="int8")], facts={"paged"})
    assert record.matches == 0


def test_a_cache_is_quantized_once(step: Program) -> None:
    with pytest.raises(PassError, match=r"kv_cache\.0 is quantized already, to float8_e4m3fn"):
        run_passes(step, [QuantizeKVCache(dtype="fp8"), QuantizeKVCache(dtype="int8")], facts={"paged"})


def test_a_cache_that_something_else_reads_is_refused(step: Program) -> None:
    output = step.graph.output_node()
    with step.graph.inserting_before(output):
        read = call(step.graph, aten.clone.default, input_node(step, "kv_cache.1"))
    output.args = ((*output.args[0], read),)  # type: ignore[misc]
    with pytest.raises(PassError, match=r"kv_cache\.1 is used by clone.* which does not read quantized caches"):
        run_passes(step, [QuantizeKVCache(dtype="int8")], facts={"paged"})


def test_the_attention_must_read_the_cache(canonical: Program) -> None:
    with pytest.raises(PassError, match=r"quantize_kv_cache needs \['paged'\]"):
        run_passes(canonical, [KVCache(), QuantizeKVCache(dtype="int8")], facts={"canonical"})
