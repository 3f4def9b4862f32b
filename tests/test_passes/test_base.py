"""The runner: what a pass may not do without being caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from optc.errors import PassError, VerificationError
from optc.passes.base import Pass, Result, run_passes
from optc.passes.canonicalize import Canonicalize
from optc.passes.gather_logits import GatherLogits
from optc.passes.graph import Program, call, get_weight
from optc.passes.kv_cache import KVCache
from optc.passes.paged_attention import PagedAttention
from optc.passes.verify import Probe

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Scale(Pass):
    """logits -> logits * factor"""

    factor: float = 1.0
    expected: int | None = 1

    def expected_matches(self, program: Program) -> int | None:
        return self.expected

    def apply(self, program: Program) -> Result:
        result = Result()
        output = program.graph.output_node()
        with program.graph.inserting_before(output):
            output.args = ((call(program.graph, aten.mul.Tensor, output.args[0][0], self.factor),),)
        result.matches = 1
        return result


@dataclass(frozen=True, kw_only=True)
class FindsNothing(Pass):
    """Nothing is found, and one candidate declined."""

    def expected_matches(self, program: Program) -> int:
        return 2

    def apply(self, program: Program) -> Result:
        result = Result()
        result.decline(program.graph.output_node(), "the moon is not full")
        return result


@dataclass(frozen=True, kw_only=True)
class Breaks(Pass):
    """Leaves a graph that cannot be computed: the logits times a matrix that does not fit."""

    def apply(self, program: Program) -> Result:
        output = program.graph.output_node()
        with program.graph.inserting_before(output):
            logits = output.args[0][0]
            output.args = ((call(program.graph, aten.mm.default, logits, logits),),)
        return Result()


@dataclass(frozen=True, kw_only=True)
class Needs(Pass):
    """Needs a fact and does nothing."""

    requires: ClassVar[frozenset[str]] = frozenset({"moonlight"})

    def apply(self, program: Program) -> Result:
        return Result()


@dataclass(frozen=True, kw_only=True)
class Provides(Pass):
    """Provides the fact and does nothing."""

    provides: ClassVar[frozenset[str]] = frozenset({"moonlight"})

    def apply(self, program: Program) -> Result:
        return Result()


PIPELINE: list[Pass] = [Canonicalize(), KVCache(), PagedAttention(), GatherLogits()]


def test_records(captured: Program, probe: Probe) -> None:
    before, seen = len(captured.graph.nodes), []
    records = run_passes(captured, [Scale(factor=1.0), Provides()], probe=probe, on_record=seen.append)
    assert records == seen
    assert [r.name for r in records] == ["scale", "provides"]
    assert (records[0].matches, records[0].node_delta, records[0].max_error) == (1, 1, 0.0)
    assert (records[1].matches, records[1].node_delta, records[1].declined) == (0, 0, ())
    assert len(captured.graph.nodes) == before + 1
    assert records[0].config_sha256 != Scale(factor=2.0).config_sha256() == Scale(factor=2.0).config_sha256()


def test_names() -> None:
    assert [item.name for item in PIPELINE] == ["canonicalize", "kv_cache", "paged_attention", "gather_logits"]


def test_without_a_probe_nothing_is_compared(captured: Program) -> None:
    (record,) = run_passes(captured, [Scale(factor=3.0)])
    assert record.max_error is None


@pytest.mark.parametrize("factor", [1.001, 2.0, 0.0, float("nan"), float("inf")])
def test_a_pass_that_changes_the_numbers(factor: float, captured: Program, probe: Probe) -> None:
    with pytest.raises(VerificationError, match=r"pass scale changed the logits by .*allowed 1e-04.*--dump"):
        run_passes(captured, [Scale(factor=factor)], probe=probe)


def test_a_change_within_the_tolerance(captured: Program, probe: Probe) -> None:
    (record,) = run_passes(captured, [Scale(factor=1 + 1e-5)], probe=probe)
    assert record.max_error == pytest.approx(1e-5, rel=0.05)


def test_zero_matches_where_some_are_expected(captured: Program) -> None:
    with pytest.raises(PassError, match=r"finds_nothing matched 0 times, expected 2 .*the moon is not full"):
        run_passes(captured, [FindsNothing()])


def test_more_matches_than_expected(captured: Program) -> None:
    with pytest.raises(PassError, match=r"scale matched 1 times, expected 0 .*no candidate was declined"):
        run_passes(captured, [Scale(expected=0)])


def test_a_pass_that_breaks_the_graph(captured: Program) -> None:
    with pytest.raises(PassError, match=r"pass breaks broke the graph, after \['scale'\]"):
        run_passes(captured, [Scale(), Breaks()])


def test_missing_requirements(captured: Program) -> None:
    with pytest.raises(PassError, match=r"pass needs needs \['moonlight'\]; passes run so far: \['scale'\]"):
        run_passes(captured, [Scale(), Needs()])
    run_passes(captured, [Provides(), Needs()])
    run_passes(captured, [Needs()], facts={"moonlight"})


@pytest.mark.parametrize("number", range(1, len(PIPELINE)))
def test_the_pipelines_passes_need_each_other(number: int, captured: Program) -> None:
    passes = [item for i, item in enumerate(PIPELINE) if i != number - 1]
    with pytest.raises(PassError, match=rf"pass {PIPELINE[number].name} needs"):
        run_passes(captured, passes)


def test_dumps_are_written_and_deterministic(_captured: Program, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        run_passes(_captured.copy(), PIPELINE, dump=tmp_path / folder)
    names = [f"{i:02d}_{item.name}.{when}.txt" for i, item in enumerate(PIPELINE) for when in ("after", "before")]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    texts = {name: (tmp_path / "a" / name).read_text() for name in names}
    for name, text in texts.items():
        assert text == (tmp_path / "b" / name).read_text()
        assert "0x" not in text
    for i in range(len(PIPELINE) - 1):
        after, before = f"{i:02d}_{PIPELINE[i].name}.after.txt", f"{i + 1:02d}_{PIPELINE[i + 1].name}.before.txt"
        assert texts[after] == texts[before]
    assert "optc.paged_attention" in texts["02_paged_attention.after.txt"]
    assert "float32[" in texts["00_canonicalize.before.txt"]


def test_dumps_show_the_graph_that_failed(captured: Program, tmp_path: Path, probe: Probe) -> None:
    with pytest.raises(VerificationError):
        run_passes(captured, [Scale(factor=2.0)], probe=probe, dump=tmp_path)
    assert "mul" in (tmp_path / "00_scale.after.txt").read_text()


def test_the_whole_pipeline(captured: Program, probe: Probe) -> None:
    """The step program computes what the model computes, for ragged batches in chunks."""
    records = run_passes(captured, PIPELINE, probe=probe)
    assert all(record.max_error is not None and record.max_error < 1e-5 for record in records)
    names = [spec.name for spec in captured.inputs]
    assert names == [
        *("input_ids", "positions", "slot_mapping", "kv_cache.0", "kv_cache.1"),
        *("block_table", "query_start_loc", "seq_lens", "logits_indices"),
    ]
    assert all("val" in node.meta for node in captured.graph.nodes)


def test_the_probe_sees_a_graph_that_mixes_sequences(canonical: Program, probe: Probe) -> None:
    """A mean over the tokens changes nothing shape-wise; over packed tokens it mixes sequences."""
    output = canonical.graph.output_node()
    with canonical.graph.inserting_before(output):
        logits = output.args[0][0]  # type: ignore[index]
        mean = call(canonical.graph, aten.mean.dim, logits, [1], True)
        output.args = ((call(canonical.graph, aten.add.Tensor, logits, mean),),)
    run_passes(canonical, [Scale()], probe=probe)
    with pytest.raises(VerificationError, match="paged_attention"):
        run_passes(canonical, PIPELINE[1:], facts={"canonical"}, probe=probe)


def test_copies_are_independent(captured: Program) -> None:
    before = len(captured.graph.nodes)
    other = captured.copy()
    run_passes(other, PIPELINE)
    assert len(captured.graph.nodes) == before
    assert [spec.name for spec in captured.inputs] == ["input_ids", "positions"]
    assert captured.kv_cache == []
    for name, weight in captured.weights().items():
        assert get_weight(other.module, name).data_ptr() == weight.data_ptr()


def test_the_captured_graph_is_the_model(captured: Program, model: nn.Module, probe: Probe) -> None:
    for tokens, found in zip(probe.sequences, probe.logits(captured), strict=True):
        expected = model(tokens[None], torch.arange(len(tokens))[None])[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_bfloat16_graphs_are_compared_in_float32(program_of: Callable[..., Program], probe: Probe) -> None:
    """A rewrite that is exact in real numbers passes, although bfloat16 rounding would differ by a per cent."""

    def build(graph: Any, ids: Any, positions: Any, table: Any, a: Any, b: Any) -> Any:
        hidden = call(graph, aten.embedding.default, table, ids)
        return call(graph, aten.linear.default, call(graph, aten.linear.default, hidden, a), b)

    generator = torch.Generator().manual_seed(0)
    sizes = {"table": (50, 16), "a": (64, 16), "b": (50, 64)}
    weights = {name: torch.randn(size, generator=generator).bfloat16() for name, size in sizes.items()}
    program = program_of(build, weights)

    @dataclass(frozen=True, kw_only=True)
    class Reassociate(Pass):
        """(x A) B -> x (A B), in float32"""

        def apply(self, program: Program) -> Result:
            first, second = program.graph.find_nodes(op="call_function", target=aten.linear.default)
            with program.graph.inserting_before(second):
                product = call(program.graph, aten.mm.default, second.args[1], first.args[1])
                new = call(program.graph, aten.linear.default, first.args[0], product)
            second.replace_all_uses_with(new)
            program.graph.erase_node(second)
            return Result(matches=1)

    (record,) = run_passes(program, [Reassociate()], probe=probe)
    assert record.max_error is not None
    assert record.max_error < 1e-5
