"""Sequential calibration: what is measured, what later layers see, and that memory is bounded."""

from __future__ import annotations

import errno
import operator
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from optc.errors import UsageError
from optc.passes.graph import Program, get_weight
from optc.passes.quantize.calibrate import Calibration, Statistics, Walk, calibrate
from optc.passes.quantize.roles import find_candidates

LENGTHS = (5, 12, 7)


@pytest.fixture
def samples() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randint(0, 50, (n,), generator=generator) for n in LENGTHS)


def inputs_of(program: Program) -> dict[fx.Node, list[str]]:
    """The inputs of the linear layers in order, each with the names of the weights it meets."""
    found: dict[fx.Node, list[str]] = {}
    for candidate in find_candidates(program)[0]:
        for linear in candidate.linears:
            found.setdefault(linear.all_input_nodes[0], []).append(candidate.name)
    return found


def seen_by_modules(
    model: torch.nn.Module, samples: tuple[Tensor, ...]
) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """What each linear module of the model gets for all samples, and the logits."""
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0][0]))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        logits = [model(sample[None], torch.arange(len(sample))[None]) for sample in samples]
    for hook in hooks:
        hook.remove()
    return seen, logits


def test_statistics_are_those_of_the_models_inputs(
    canonical: Program, model: torch.nn.Module, samples: tuple[Tensor, ...]
) -> None:
    inputs = inputs_of(canonical)
    seen, logits = seen_by_modules(model, samples)
    with Walk(canonical, samples, list(inputs)) as walk:
        for node in walk.run():
            found = walk.statistics()
            for name in inputs[node]:
                x = torch.cat(seen[name.removesuffix(".weight")])
                assert found.tokens == sum(LENGTHS)
                torch.testing.assert_close(found.hessian, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(found.largest, x.abs().amax(0))
                torch.testing.assert_close(found.mean, x.abs().mean(0))
            for output, expected in zip(walk.outputs({}), logits, strict=True):
                torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory_limit", [0, 300, 2**20])
def test_activations_past_the_limit_lie_in_files(
    canonical: Program, samples: tuple[Tensor, ...], memory_limit: int
) -> None:
    inputs = inputs_of(canonical)
    with Walk(canonical, samples, list(inputs)) as walk:
        expected = [walk.statistics().hessian for _ in walk.run()]
    with Walk(canonical, samples, list(inputs), memory_limit=memory_limit) as walk:
        for hessian, _ in zip(expected, walk.run(), strict=True):
            assert torch.equal(walk.statistics().hessian, hessian)
            assert walk._environments[0]._budget.used <= memory_limit


def test_later_layers_see_replaced_weights_and_earlier_ones_do_not(
    canonical: Program, model: torch.nn.Module, samples: tuple[Tensor, ...]
) -> None:
    inputs = inputs_of(canonical)
    first = next(iter(inputs.values()))[0]
    zeros = torch.zeros_like(get_weight(canonical.module, first))
    plain: list[Tensor] = []
    replaced: list[Tensor] = []

    def visit(into: list[Tensor], weights: dict[str, Tensor]) -> Callable[[fx.Node, Any], dict[str, Tensor]]:
        def collect(node: fx.Node, statistics: Any) -> dict[str, Tensor]:
            into.append(statistics.hessian)
            return weights if len(into) == 1 else {}

        return collect

    calibration = Calibration(samples, "test", 0)
    calibrate(canonical, calibration, list(inputs), visit(plain, {}))
    calibrate(canonical, calibration, list(inputs), visit(replaced, {first: zeros}))
    assert torch.equal(plain[0], replaced[0])
    assert not torch.allclose(plain[-1], replaced[-1])
    weight = model.get_parameter(first)
    saved = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
        expected = seen_by_modules(model, samples)[0]
        weight.copy_(saved)
    last = list(inputs.values())[-1][0].removesuffix(".weight")
    x = torch.cat(expected[last])
    torch.testing.assert_close(replaced[-1], x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_the_original_goes_beside(canonical: Program, model: torch.nn.Module, samples: tuple[Tensor, ...]) -> None:
    inputs = inputs_of(canonical)
    first = next(iter(inputs.values()))[0]
    halved = get_weight(canonical.module, first) / 2
    seen = seen_by_modules(model, samples)[0]
    with Walk(canonical, samples, list(inputs), with_original=list(inputs)) as walk:
        nodes = walk.run()
        next(nodes)
        unchanged = walk.statistics()
        assert unchanged.cross is not None
        torch.testing.assert_close(unchanged.cross, unchanged.hessian)
        walk.replace({first: halved})
        for node in nodes:
            found = walk.statistics()
            original = torch.cat(seen[inputs[node][0].removesuffix(".weight")])
            assert found.cross is not None
            assert not torch.allclose(found.cross, found.hessian)
    # x^T x' of the last layer, with x from a model that has the halved weight
    weight = model.get_parameter(first)
    with torch.no_grad():
        weight.div_(2)
        x = torch.cat(seen_by_modules(model, samples)[0][inputs[node][0].removesuffix(".weight")])
        weight.mul_(2)
    torch.testing.assert_close(found.cross, x.T @ original / len(x), rtol=1e-4, atol=1e-5)


def test_only_what_is_compared_with_the_original_costs_it(canonical: Program, samples: tuple[Tensor, ...]) -> None:
    inputs = list(inputs_of(canonical))
    with Walk(canonical, samples, inputs, with_original=inputs[1:2]) as walk:
        crosses = [walk.statistics().cross for _ in walk.run()]
        assert [cross is not None for cross in crosses] == [node is inputs[1] for node in inputs]
        assert not walk._originals[0]._values


def test_two_inputs_as_one() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(5, 8, generator=generator), torch.randn(11, 8, generator=generator)

    def of(x: Tensor) -> Statistics:
        return Statistics(x.T @ x / len(x), x.abs().amax(0), x.abs().mean(0), len(x), 2 * x.T @ x / len(x))

    found, expected = of(first).together_with(of(second)), of(torch.cat([first, second]))
    assert found.tokens == 16
    for name in ("hessian", "largest", "mean", "cross"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


def test_a_full_disk_is_an_error_of_one_sentence(
    canonical: Program, samples: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def full(**_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    inputs = list(inputs_of(canonical))
    with pytest.raises(
        UsageError, match=rf"{tmp_path} has no room for \d+ bytes .* No space left on device; set TMPDIR"
    ):
        calibrate(canonical, Calibration(samples, "test", 0), inputs, lambda *_: {}, memory_limit=0)
    assert not list(tmp_path.iterdir())


def test_temporary_files_are_gone_after_an_error(
    canonical: Program, samples: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def visit(*_: Any) -> dict[str, Tensor]:
        assert list(tmp_path.iterdir())
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        calibrate(canonical, Calibration(samples, "test", 0), list(inputs_of(canonical)), visit, memory_limit=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("memory_limit", [0, 2**20])
def test_values_of_several_tensors_count_and_move_as_well(memory_limit: int, program_of: Any) -> None:
    def build(graph: fx.Graph, ids: fx.Node, positions: fx.Node, table: fx.Node, weight: fx.Node) -> fx.Node:
        x = graph.call_function(torch.ops.aten.embedding.default, (table, ids))
        halves = graph.call_function(torch.ops.aten.split.Tensor, (x, 8, -1))
        left, right = (graph.call_function(operator.getitem, (halves, i)) for i in (0, 1))
        y = graph.call_function(torch.ops.aten.linear.default, (left, weight))
        z = graph.call_function(torch.ops.aten.add.Tensor, (y, right))
        return graph.call_function(torch.ops.aten.linear.default, (z, weight))

    torch.manual_seed(0)
    program = program_of(build, {"table": torch.randn(50, 16), "weight": torch.randn(8, 8)})
    sample = torch.arange(11)
    linears = program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    (halves,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.split.Tensor)
    (split,) = (user for user in halves.users if user.args[1] == 0)
    with Walk(program, [sample], [split, linears[1].all_input_nodes[0]], memory_limit=memory_limit) as walk:
        for node in walk.run():
            if node is split:
                assert walk._environments[0]._budget.used == (
                    2 * 11 * 16 * 4 // 2 + 11 * 16 * 4 // 2 if memory_limit else 0
                )
            outputs = list(walk.outputs({}))
    torch.testing.assert_close(outputs[0], program.module(sample[None], sample[None])[0])


def test_progress_goes_from_nothing_to_all(canonical: Program, samples: tuple[Tensor, ...]) -> None:
    fractions: list[float] = []
    inputs = list(inputs_of(canonical))
    calibrate(canonical, Calibration(samples, "test", 0), inputs, lambda *_: {}, on_progress=fractions.append)
    assert fractions == sorted(fractions) and fractions[0] > 0 and fractions[-1] == pytest.approx(1.0)
    assert len(fractions) == len(inputs) * len(samples)


@pytest.mark.parametrize(
    ("window", "softcap", "with_sinks"), [(0, 0.0, False), (3, 0.0, False), (0, 5.0, False), (0, 0.0, True)]
)
def test_attention_of_every_kind_is_the_reference(
    program_of: Any, window: int, softcap: float, with_sinks: bool
) -> None:
    def build(
        graph: fx.Graph, ids: fx.Node, positions: fx.Node, table: fx.Node, weight: fx.Node, sinks: fx.Node
    ) -> fx.Node:
        x = graph.call_function(torch.ops.aten.embedding.default, (table, ids))
        heads = graph.call_function(torch.ops.aten.reshape.default, (x, [1, -1, 2, 8]))
        q = graph.call_function(torch.ops.aten.transpose.int, (heads, 1, 2))
        out = graph.call_function(
            torch.ops.optc.attention.default, (q, q, q, 0.5, window, softcap, sinks if with_sinks else None, 0)
        )
        flat = graph.call_function(torch.ops.aten.reshape.default, (out, [1, -1, 16]))
        return graph.call_function(torch.ops.aten.linear.default, (flat, weight))

    torch.manual_seed(0)
    weights = {"table": torch.randn(50, 16), "weight": torch.randn(9, 16), "sinks": torch.randn(2)}
    program = program_of(build, weights)
    sample = torch.arange(11)
    (linear,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    expected = program.module(sample[None], sample[None])[0]
    with Walk(program, [sample], [linear.all_input_nodes[0]]) as walk:
        for _ in walk.run():
            (found,) = walk.outputs({})
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_record_tells_data_apart(samples: tuple[Tensor, ...]) -> None:
    record = Calibration(samples, "text.txt", 3).record()
    assert (record.source, record.num_samples, record.sequence_length, record.seed) == ("text.txt", 3, 12, 3)
    assert record.sha256 != Calibration(samples[::-1], "text.txt", 3).record().sha256
