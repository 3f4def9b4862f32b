"""The pass that gives each attention layer a cache."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from optc.errors import PassError
from optc.passes.base import run_passes
from optc.passes.graph import Program, call
from optc.passes.kv_cache import KVCache
from optc.passes.verify import Probe
from optc.runtime.manifest import TensorSpec

aten, optc = torch.ops.aten, torch.ops.optc


def test_structure(canonical: Program, count: Callable[..., int]) -> None:
    (record,) = run_passes(canonical, [KVCache()], facts={"canonical"})
    assert (record.matches, record.declined) == (2, ())
    assert count(canonical, optc.kv_cache_write.default) == count(canonical, optc.attention.default) == 2
    assert [(s.layer, s.kv_heads, s.k_dim, s.v_dim, s.window, s.dtype) for s in canonical.kv_cache] == [
        (0, 2, 8, 8, 0, "float32"),
        (1, 2, 8, 8, 0, "float32"),
    ]
    assert [(s.name, s.dtype, s.shape) for s in canonical.inputs[2:]] == [
        ("slot_mapping", "int64", ("T",)),
        ("kv_cache.0", "float32", ("N", 2, "S", 16)),
        ("kv_cache.1", "float32", ("N", 2, "S", 16)),
    ]
    assert {"N", "S"} <= canonical.symbols.keys()


def test_numbers(canonical: Program, probe: Probe) -> None:
    (record,) = run_passes(canonical, [KVCache()], facts={"canonical"}, probe=probe)
    assert record.max_error == 0


def test_each_write_comes_before_its_attention_and_takes_its_keys(canonical: Program) -> None:
    run_passes(canonical, [KVCache()], facts={"canonical"})
    order = list(canonical.graph.nodes)
    writes = canonical.graph.find_nodes(op="call_function", target=optc.kv_cache_write.default)
    attentions = canonical.graph.find_nodes(op="call_function", target=optc.attention.default)
    for write, attention in zip(writes, attentions, strict=True):
        assert order.index(write) < order.index(attention)
        for written, attended in zip(write.args[:2], attention.args[1:3], strict=True):
            assert written.args[0].args[0] is attended  # type: ignore[union-attr]
    assert [write.args[2].name for write in writes] == ["kv_cache_0", "kv_cache_1"]  # type: ignore[union-attr]


def test_the_keys_and_values_are_in_their_slots(canonical: Program) -> None:
    """Slots out of order, one of them padding: each row of the cache is a token's key and then its value."""
    run_passes(canonical, [KVCache()], facts={"canonical"})
    caches = [torch.zeros(3, 2, 4, 16) for _ in range(2)]
    slots = torch.tensor([9, 2, -1, 4])
    attention = canonical.graph.find_nodes(op="call_function", target=optc.attention.default)[0]
    canonical.graph.output_node().args = ((attention.args[1], attention.args[2]),)
    canonical.module.recompile()
    key, value = canonical.module(torch.tensor([[3, 1, 4, 1]]), torch.arange(4)[None], slots, *caches)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            row = caches[0][slot // 4, :, slot % 4]
            assert torch.equal(row, torch.cat([key[0, :, token], value[0, :, token]], -1))
    assert caches[0].abs().sum((1, 3)).count_nonzero() == 3


def attention_of(program_of: Callable[..., Program], dtypes: tuple[str, str], window: int, v_dim: int) -> Program:
    inputs = [
        TensorSpec(name=name, dtype=dtype, shape=(1, heads, "T", dim))
        for name, heads, dim, dtype in (("q", 4, 8, dtypes[0]), ("k", 2, 8, dtypes[0]), ("v", 2, v_dim, dtypes[1]))
    ]
    return program_of(
        lambda g, q, k, v: call(g, optc.attention.default, q, k, v, 1.0, window, 0.0, None, 0), inputs=inputs
    )


def test_geometry_is_read_from_the_layer(program_of: Callable[..., Program]) -> None:
    program = attention_of(program_of, ("bfloat16", "bfloat16"), 5, 4)
    run_passes(program, [KVCache()], facts={"canonical"})
    (spec,) = program.kv_cache
    assert (spec.kv_heads, spec.k_dim, spec.v_dim, spec.window, spec.dtype) == (2, 8, 4, 5, "bfloat16")
    assert program.inputs[-1].shape == ("N", 2, "S", 12)


def test_keys_and_values_of_two_dtypes_are_refused(program_of: Callable[..., Program]) -> None:
    with pytest.raises(PassError, match=r"layer 0 has keys in .*float32 and values in .*bfloat16"):
        run_passes(attention_of(program_of, ("float32", "bfloat16"), 0, 8), [KVCache()], facts={"canonical"})


def test_a_graph_without_attention(program_of: Callable[..., Program]) -> None:
    program = program_of(lambda g, ids, positions: call(g, aten.add.Tensor, ids, positions))
    (record,) = run_passes(program, [KVCache()], facts={"canonical"})
    assert record.matches == 0
    assert program.kv_cache == []
