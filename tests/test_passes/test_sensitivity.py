"""Sensitivities: each figure is that of the model with one group of weights changed, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from optc.optimizer.budget import _groups, _round, with_rules
from optc.passes.graph import Program
from optc.passes.quantize.calibrate import Statistics
from optc.passes.quantize.mix import Mix, Option
from optc.passes.quantize.recipe import KEEP, Assignment, Recipe, Rule, assign
from optc.passes.quantize.roles import find_candidates
from optc.passes.quantize.rtn import rtn
from optc.passes.quantize.sensitivity import Group, measure_sensitivity, tied_groups
from optc.runtime.ops.quantized import quantize_activations
from optc.runtime.scheme import find_scheme

aten = torch.ops.aten
SCHEMES = ("w3a16-channel", "w4a16-channel", "w8a16", "w8a8", KEEP)


@pytest.fixture
def samples() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randint(0, 50, (n,), generator=generator) for n in (9, 14, 5))


def minmax(program: Program) -> Callable[[str, Assignment, Statistics], tuple[Tensor, int]]:
    """Rounds a weight, whatever its input is, so that the test can do the same."""

    def quantize(name: str, assignment: Assignment, _: Statistics) -> tuple[Tensor, int]:
        found = rtn(program.weights()[name].detach().float(), assignment.scheme.weights, torch.float16, mse=False)
        return found.dequantize(), found.pack().num_bytes()

    return quantize


@torch.no_grad()
def directly(model: nn.Module, weights: tuple[str, ...], scheme: str, samples: tuple[Tensor, ...]) -> tuple[float, int]:
    """The divergence and the bytes of a model whose named layers are replaced, by running it as a module, in float64."""
    changed, size = copy.deepcopy(model), 0
    for name in weights:
        weight = changed.get_parameter(name)
        if scheme == KEEP:
            size += weight.numel() * 4
            continue
        found = find_scheme(scheme)
        rounded = rtn(weight.detach(), found.weights, torch.float16, mse=False)
        weight.copy_(rounded.dequantize())
        size += rounded.pack().num_bytes()
        if (kind := found.activation) != "none":
            changed.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
                lambda _, args, kind=kind: (quantize_activations(args[0], kind, None),)
            )
    total, tokens = 0.0, 0
    for sample in samples:
        positions = torch.arange(len(sample))[None]
        first, second = (m(sample[None], positions)[0].double().log_softmax(-1) for m in (model, changed))
        total += float((first.exp() * (first - second)).sum())
        tokens += len(sample)
    return total / tokens, size


def test_each_figure_is_that_of_the_model_with_one_group_changed(
    canonical: Program, model: nn.Module, samples: tuple[Tensor, ...]
) -> None:
    recipe = Recipe(default="w4a16-channel", rules=(Rule(role="lm_head", scheme="w8a16"),))
    groups = _groups(canonical, recipe)
    fractions: list[float] = []
    found = measure_sensitivity(
        canonical, groups, samples, lambda group: SCHEMES, minmax(canonical), on_progress=fractions.append
    )
    assert len(found) == 5 and fractions == [0.2, 0.4, 0.6, 0.8, 1.0]
    for group, options in zip(groups, found, strict=True):
        assert [option.scheme for option in options] == list(SCHEMES)
        for option in options:
            divergence, size = directly(model, group.weights, option.scheme, samples)
            assert option.divergence == pytest.approx(divergence, rel=1e-2, abs=2e-7), (group.weights, option.scheme)
            assert option.num_bytes == size
        three, four, eight, rounded, kept = (option.divergence for option in options)
        assert three > four > eight > kept == 0.0
        assert rounded > eight, "8-bit activations cost something too"


def test_measuring_changes_nothing(canonical: Program, model: nn.Module, samples: tuple[Tensor, ...]) -> None:
    before = {name: weight.clone() for name, weight in canonical.weights().items()}
    groups = _groups(canonical, Recipe(default="w4a16-channel"))
    once, again = (
        measure_sensitivity(canonical, groups, samples, lambda _: ("w4a16-channel",), minmax(canonical))
        for _ in range(2)
    )
    assert once == again
    assert all(torch.equal(weight, before[name]) for name, weight in canonical.weights().items())


def test_groups_share_an_input(canonical: Program) -> None:
    groups = _groups(canonical, Recipe(default="w4a16-channel"))
    names = [[canonical.sources.get(name, name) for name in group.weights] for group in groups]
    layers = [f"layers.{number}" for number in (0, 1)]
    expected = [
        found
        for layer in layers
        for found in ([f"{layer}.{part}_proj.weight" for part in "qkv"], [f"{layer}.o_proj.weight"])
    ]
    assert names == expected, "no embedding and no head: no rule names them"
    assert [(group.size, group.columns) for group in groups[:2]] == [(16 * (32 + 16 + 16), 16), (32 * 16, 32)]
    assert {role for group in groups for role in group.roles} == {"attention"}


def test_a_rule_keeps_weights_out_and_brings_the_head_in(canonical: Program) -> None:
    rules = (Rule(name="layers.0.*", scheme=KEEP), Rule(role="lm_head", scheme="w8a16"))
    groups = _groups(canonical, Recipe(default="w4a16-channel", rules=rules))
    assert [group.roles for group in groups] == [("attention",) * 3, ("attention",), ("lm_head",)]
    assert all("layers.0" not in name for group in groups for name in group.weights)


def test_a_tied_head_keeps_its_place(program_of: Any, samples: tuple[Tensor, ...]) -> None:
    """Its weight is used first, as the embedding, and its input comes last: options are in the order of the groups."""

    def build(graph: fx.Graph, ids: fx.Node, positions: fx.Node, table: fx.Node, inner: fx.Node) -> fx.Node:
        x = graph.call_function(aten.embedding.default, (table, ids))
        y = graph.call_function(aten.linear.default, (x, inner))
        added = graph.call_function(aten.add.Tensor, (x, y))
        return graph.call_function(aten.linear.default, (added, table))

    torch.manual_seed(3)
    program = program_of(build, {"table": torch.randn(50, 16), "inner": torch.randn(16, 16)})
    groups = tied_groups(find_candidates(program)[0])
    assert [group.weights for group in groups] == [("table",), ("inner",)]
    (head,), (inner,) = measure_sensitivity(program, groups, samples, lambda _: ("w4a16-channel",), minmax(program))
    assert head.num_bytes == 50 * 8 + 50 * 2 and inner.num_bytes == 16 * 8 + 16 * 2
    assert head.divergence > 0 < inner.divergence


def test_groups_of_several_roles_remember_each(program_of: Any) -> None:
    """Attention and MLP beside each other, on the same input, as in Phi."""

    def build(graph: fx.Graph, ids: fx.Node, positions: fx.Node, **weights: fx.Node) -> fx.Node:
        def linear(x: fx.Node, name: str) -> fx.Node:
            return graph.call_function(aten.linear.default, (x, weights[name]))

        x = graph.call_function(aten.embedding.default, (weights["table"], ids))
        q = graph.call_function(aten.reshape.default, (linear(x, "q_proj"), [1, -1, 2, 8]))
        q = graph.call_function(aten.transpose.int, (q, 1, 2))
        out = graph.call_function(torch.ops.optc.attention.default, (q, q, q, 0.5, 0, 0.0, None, 0))
        out = graph.call_function(aten.reshape.default, (out, [1, -1, 16]))
        mlp = linear(graph.call_function(aten.relu.default, (linear(x, "up"),)), "down")
        added = graph.call_function(aten.add.Tensor, (x, graph.call_function(aten.add.Tensor, (out, mlp))))
        return linear(added, "head")

    shapes = {"table": (50, 16), "q_proj": (16, 16), "up": (24, 16), "down": (16, 24), "head": (50, 16)}
    program = program_of(build, {name: torch.randn(shape) for name, shape in shapes.items()})
    recipe = Recipe(default="w4a16-channel")
    groups = _groups(program, recipe)
    assert [(group.weights, group.roles) for group in groups] == [
        (("q_proj", "up"), ("attention", "mlp")),
        (("down",), ("mlp",)),
    ]
    mix = Mix((Option("w8a16", 0, 0.0), Option("w4a16-channel", 0, 0.0)))
    candidates = find_candidates(program)[0]
    assigned = assign(with_rules(recipe, program, groups, mix), candidates, {c.name: c.name for c in candidates})
    found = {name: assignment.scheme_name for name, assignment in assigned.items()}
    assert found == {"q_proj": "w8a16", "up": "w8a16", "down": "w4a16-channel"}


def test_the_bytes_are_those_stored(canonical: Program, samples: tuple[Tensor, ...]) -> None:
    candidates = {candidate.name: candidate for candidate in find_candidates(canonical)[0]}

    def quantize(name: str, assignment: Assignment, statistics: Statistics) -> tuple[Tensor, int]:
        return _round(canonical, candidates[name], assignment, statistics)

    groups: list[Group] = _groups(canonical, Recipe(default="w4a16-channel"))
    for group, options in zip(
        groups, measure_sensitivity(canonical, groups, samples, lambda _: SCHEMES, quantize), strict=True
    ):
        rows = group.size // group.columns
        scales = 2 * rows
        expected = {"w8a16": group.size + scales, "w8a8": group.size + scales, KEEP: 4 * group.size}
        expected["w4a16-channel"] = group.size // 2 + scales
        found = {option.scheme: option.num_bytes for option in options}
        assert {scheme: found[scheme] for scheme in expected} == expected
