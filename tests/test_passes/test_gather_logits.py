"""The pass that computes logits for the wanted rows only."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from optc.passes.base import run_passes
from optc.passes.gather_logits import GatherLogits
from optc.passes.graph import Program, call, value_of
from optc.passes.kv_cache import KVCache
from optc.passes.paged_attention import PagedAttention
from optc.passes.quantize.quantize import Quantize
from optc.passes.quantize.recipe import Recipe, Rule
from optc.passes.verify import Probe
from optc.runtime.manifest import PassRecord

aten = torch.ops.aten
Build = Callable[..., fx.Node]
GENERATOR = torch.Generator().manual_seed(0)
WEIGHTS = {
    "table": torch.randn(50, 8, generator=GENERATOR),
    "head": torch.randn(50, 8, generator=GENERATOR),
    "scale": torch.randn(50, generator=GENERATOR),
}
IDS, ROWS = torch.tensor([[3, 1, 4, 1, 5, 9]]), torch.tensor([5, 0, 2, 2])


def gather(program: Program) -> PassRecord:
    (record,) = run_passes(program, [GatherLogits()], facts={"paged"})
    return record


def model(after: Build) -> Build:
    """embedding, head, and `after(graph, logits, scale)`."""

    def build(
        graph: fx.Graph, ids: fx.Node, positions: fx.Node, table: fx.Node, head: fx.Node, scale: fx.Node
    ) -> fx.Node:
        hidden = call(graph, aten.embedding.default, table, ids)
        return after(graph, call(graph, aten.linear.default, hidden, head), scale)

    return build


def check(program: Program) -> PassRecord:
    """The chosen rows are those of all the logits, in float32."""
    before: Tensor = program.copy().module(IDS, torch.arange(6)[None])[0]
    record = gather(program)
    after: Tensor = program.module(IDS, torch.arange(6)[None], ROWS)[0]
    assert after.dtype == torch.float32
    torch.testing.assert_close(after, before[0, ROWS].float(), rtol=1e-5, atol=1e-5)
    assert program.outputs == ("logits",)
    assert (program.inputs[-1].name, program.inputs[-1].dtype, program.inputs[-1].shape) == (
        "logits_indices",
        "int64",
        ("L",),
    )
    return record


ROW_WISE: dict[str, Build] = {
    "plain": lambda g, x, s: x,
    "soft cap": lambda g, x, s: call(
        g, aten.mul.Tensor, call(g, aten.tanh.default, call(g, aten.div.Tensor, x, 30.0)), 30.0
    ),
    "to float": lambda g, x, s: call(g, aten._to_copy.default, x, dtype=torch.float64),
    "scaled by column": lambda g, x, s: call(g, aten.mul.Tensor, x, s),
    "shifted by column": lambda g, x, s: call(g, aten.add.Tensor, x, s),
    "clone": lambda g, x, s: call(g, aten.clone.default, x),
}


@pytest.mark.parametrize("case", ROW_WISE)
def test_the_head_runs_on_the_wanted_rows(case: str, program_of: Callable[..., Program]) -> None:
    program = program_of(model(ROW_WISE[case]), WEIGHTS)
    record = check(program)
    assert (record.matches, record.declined) == (1, ())
    (head,) = program.graph.find_nodes(op="call_function", target=aten.linear.default)
    (select,) = program.graph.find_nodes(op="call_function", target=aten.index_select.default)
    assert head.args[0] is select
    assert value_of(head).shape[1] == value_of(program.graph.find_nodes(op="placeholder")[-1]).shape[0]


NOT_ROW_WISE: dict[str, Build] = {
    "softmax over the tokens": lambda g, x, s: call(g, aten.softmax.int, x, 1),
    "cumulative": lambda g, x, s: call(g, aten.cumsum.default, x, 1),
    "less the mean over tokens": lambda g, x, s: call(
        g, aten.add.Tensor, x, call(g, aten.neg.default, call(g, aten.mean.dim, x, [1], True))
    ),
    "times itself": lambda g, x, s: call(g, aten.mul.Tensor, x, x),
    "times the sum of all rows": lambda g, x, s: call(g, aten.mul.Tensor, x, call(g, aten.sum.dim_IntList, x, [0, 1])),
    "times the last row": lambda g, x, s: call(
        g, aten.mul.Tensor, x, call(g, aten.select.int, call(g, aten.select.int, x, 0, 0), 0, -1)
    ),
    "reordered": lambda g, x, s: call(g, aten.flip.default, x, [1]),
    "sum of two heads": lambda g, x, s: call(g, aten.sub.Tensor, x, call(g, aten.tanh.default, x)),
}


@pytest.mark.parametrize("case", NOT_ROW_WISE)
def test_what_mixes_rows_is_gathered_at_the_end(case: str, program_of: Callable[..., Program]) -> None:
    program = program_of(model(NOT_ROW_WISE[case]), WEIGHTS)
    record = check(program)
    assert record.matches == 0
    assert len(record.declined) == 1
    assert "not from a linear layer; rows are taken at the end" in record.declined[0]


def test_logits_that_come_from_no_linear_layer(program_of: Callable[..., Program]) -> None:
    """A head written as a matrix product with a computed weight."""

    def build(
        graph: fx.Graph, ids: fx.Node, positions: fx.Node, table: fx.Node, head: fx.Node, scale: fx.Node
    ) -> fx.Node:
        hidden = call(graph, aten.embedding.default, table, ids)
        return call(graph, aten.matmul.default, hidden, call(graph, aten.t.default, head))

    record = check(program_of(build, WEIGHTS))
    assert "aten.matmul" in record.declined[0]


def test_hidden_states_that_others_use_stay_whole(program_of: Callable[..., Program]) -> None:
    """The head's input is gathered for the head alone."""

    def build(
        graph: fx.Graph, ids: fx.Node, positions: fx.Node, table: fx.Node, head: fx.Node, scale: fx.Node
    ) -> fx.Node:
        hidden = call(graph, aten.embedding.default, table, ids)
        mean = call(graph, aten.mean.dim, hidden, [1], True)
        return call(graph, aten.linear.default, call(graph, aten.add.Tensor, hidden, mean), head)

    assert check(program_of(build, WEIGHTS)).declined == ()


def test_bfloat16_logits_come_out_in_float32(program_of: Callable[..., Program]) -> None:
    program = program_of(model(ROW_WISE["plain"]), {name: weight.bfloat16() for name, weight in WEIGHTS.items()})
    check(program)


def test_a_quantized_head_runs_on_the_wanted_rows(canonical: Program, probe: Probe, count: Callable[..., int]) -> None:
    recipe = Recipe(rules=(Rule(role="lm_head", scheme="w8a16"),))
    passes = [Quantize(recipe=recipe), KVCache(), PagedAttention(), GatherLogits()]
    record = run_passes(canonical, passes, facts={"canonical"}, probe=probe)[-1]
    assert (record.matches, record.declined) == (1, ()) and record.max_error < 1e-6
    (head,) = canonical.graph.find_nodes(op="call_function", target=torch.ops.optc.linear_quantized.default)
    assert head.args[0].target is aten.index_select.default


def test_in_the_pipeline(canonical: Program, probe: Probe, count: Callable[..., int]) -> None:
    passes = [KVCache(), PagedAttention(), GatherLogits()]
    record = run_passes(canonical, passes, facts={"canonical"}, probe=probe)[-1]
    assert (record.matches, record.max_error, record.declined) == (1, 0, ())
    assert count(canonical, aten.index_select.default) == 1
    assert len(value_of(canonical.graph.output_node().args[0][0]).shape) == 2  # type: ignore[index]
