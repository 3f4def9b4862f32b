"""The pass that turns one sequence into packed tokens of many."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from optc.errors import PassError
from optc.passes.base import run_passes
from optc.passes.graph import Program, call, value_of
from optc.passes.kv_cache import KVCache
from optc.passes.paged_attention import PagedAttention
from optc.passes.verify import Probe
from optc.runtime.manifest import TensorSpec

aten, optc = torch.ops.aten, torch.ops.optc
PASSES = [KVCache(), PagedAttention()]


def test_structure(canonical: Program, count: Callable[..., int]) -> None:
    _, record = run_passes(canonical, PASSES, facts={"canonical"})
    assert (record.matches, record.declined) == (2, ())
    assert count(canonical, optc.attention.default) == 0
    assert count(canonical, optc.paged_attention.default) == count(canonical, optc.kv_cache_write.default) == 2
    specs = {spec.name: (spec.dtype, spec.shape) for spec in canonical.inputs}
    assert specs["input_ids"] == specs["positions"] == ("int64", ("T",))
    assert specs["block_table"] == ("int32", ("B", "P"))
    assert specs["query_start_loc"] == ("int32", ("Q",))
    assert specs["seq_lens"] == ("int32", ("B",))
    assert {"B", "P", "Q", "T", "N", "S"} == canonical.symbols.keys()
    placeholders = canonical.graph.find_nodes(op="placeholder")
    assert [node.name for node in placeholders] == [spec.name.replace(".", "_") for spec in canonical.inputs]
    assert list(value_of(canonical.graph.output_node().args[0][0]).shape)[::2] == [1, 50]  # type: ignore[index]


def test_numbers(canonical: Program, probe: Probe) -> None:
    """Ragged sequences, packed, in two chunks, over blocks dealt out in turns."""
    _, record = run_passes(canonical, PASSES, facts={"canonical"}, probe=probe)
    assert record.max_error is not None
    assert record.max_error < 1e-6


def test_each_layer_reads_its_own_cache(canonical: Program) -> None:
    run_passes(canonical, PASSES, facts={"canonical"})
    writes = canonical.graph.find_nodes(op="call_function", target=optc.kv_cache_write.default)
    reads = canonical.graph.find_nodes(op="call_function", target=optc.paged_attention.default)
    assert [write.args[2] for write in writes] == [read.args[1] for read in reads]
    assert len({read.args[1] for read in reads}) == 2


def test_everything_of_the_layer_is_kept(program_of: Callable[..., Program]) -> None:
    """Scale, window, soft cap, sinks and the width of the values."""
    inputs = [
        TensorSpec(name="input_ids", dtype="int64", shape=(1, "T")),
        TensorSpec(name="positions", dtype="int64", shape=(1, "T")),
        *(
            TensorSpec(name=name, dtype="float32", shape=(1, heads, "T", dim))
            for name, heads, dim in (("q", 4, 8), ("k", 2, 8), ("v", 2, 6))
        ),
    ]
    program = program_of(
        lambda g, ids, positions, q, k, v, sinks: call(g, optc.attention.default, q, k, v, 0.7, 3, 30.0, sinks, 0),
        {"sinks": torch.randn(4)},
        inputs,
    )
    run_passes(program, PASSES, facts={"canonical"})
    (node,) = program.graph.find_nodes(op="call_function", target=optc.paged_attention.default)
    assert node.args[5:9] == (6, 0.7, 3, 30.0)
    assert node.args[9].target == "sinks"  # type: ignore[union-attr]
    assert list(value_of(node).shape)[1:] == [4, 6]


def test_padding_is_written_nowhere_and_changes_nothing(canonical: Program) -> None:
    run_passes(canonical, PASSES, facts={"canonical"})
    results = []
    for padding in (0, 3):
        caches = [torch.zeros(4, 2, 4, 16) for _ in range(2)]
        tokens = torch.tensor([3, 1, 4, 1, 5] + [0] * padding)
        values = {
            "input_ids": tokens,
            "positions": torch.tensor([0, 1, 2, 0, 1] + [0] * padding),
            "slot_mapping": torch.tensor([8, 9, 10, 4, 5] + [-1] * padding),
            "kv_cache.0": caches[0],
            "kv_cache.1": caches[1],
            "block_table": torch.tensor([[2], [1]], dtype=torch.int32),
            "query_start_loc": torch.tensor([0, 3, 5], dtype=torch.int32),
            "seq_lens": torch.tensor([3, 2], dtype=torch.int32),
        }
        logits = canonical.module(*(values[spec.name] for spec in canonical.inputs))[0]
        results.append((logits[0, :5], *caches))
    for plain, padded in zip(*results, strict=True):
        torch.testing.assert_close(plain, padded, rtol=0, atol=1e-6)


def test_attention_that_got_no_cache_is_an_error(canonical: Program) -> None:
    """The pass expects as many layers as there are caches."""
    run_passes(canonical, [KVCache()], facts={"canonical"})
    canonical.kv_cache.pop()
    with pytest.raises(PassError, match="paged_attention"):
        run_passes(canonical, [PagedAttention()], facts={"kv_cache"})
