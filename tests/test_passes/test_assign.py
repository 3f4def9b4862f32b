"""Which scheme and rounding each weight gets from a recipe: precedence, adapted groups, tied weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from optc.errors import UsageError
from optc.passes.graph import Program, call
from optc.passes.quantize.recipe import Recipe, assign
from optc.passes.quantize.roles import find_candidates
from optc.runtime.manifest import TensorSpec

aten = torch.ops.aten

WEIGHTS = {
    "embed_tokens.weight": (50, 192),
    "layers.0.mlp.up_proj.weight": (192, 192),
    "layers.1.mlp.up_proj.weight": (192, 192),
    "layers.1.mlp.router.weight": (4, 192),
    "lm_head.weight": (50, 192),
}


@pytest.fixture
def program(program_of: Callable[..., Program]) -> Program:
    """An embedding, two MLP layers, a gate and a head, which the tests of recipes choose from."""

    def build(g: fx.Graph, ids: fx.Node, positions: fx.Node, **w: fx.Node) -> fx.Node:
        x = call(g, aten.embedding.default, w["w0"], ids)
        for name in ("w1", "w2"):
            x = call(g, aten.linear.default, x, w[name])
        gate = call(g, aten.mean.dim, call(g, aten.linear.default, x, w["w3"]), [-1], True)
        return call(g, aten.linear.default, call(g, aten.mul.Tensor, x, gate), w["w4"])

    values = {f"w{i}": torch.zeros(shape) for i, shape in enumerate(WEIGHTS.values())}
    program = program_of(build, values)
    program.sources = {f"w{i}": name for i, name in enumerate(WEIGHTS)}
    return program


def schemes(program: Program, **recipe: object) -> dict[str, str]:
    """The scheme that each weight gets, by its name in the checkpoint."""
    found = assign(Recipe.model_validate(recipe), find_candidates(program)[0], program.sources)
    return {program.sources[name]: assignment.scheme_name for name, assignment in found.items()}


UP = "layers.{}.mlp.up_proj.weight"


def test_the_default_is_for_layers_and_not_for_embedding_head_and_router(program: Program) -> None:
    assert schemes(program, default="w8a8") == {UP.format(0): "w8a8", UP.format(1): "w8a8"}


def test_role_and_name_before_role_before_name_before_default(program: Program) -> None:
    both = {"role": "mlp", "name": "layers.0.*", "scheme": "w8a8"}
    role = {"role": "mlp", "scheme": "w8a16"}
    name = {"name": "layers.*", "scheme": "fp8-weight"}
    assert schemes(program, default="w8a8-static", rules=[name, role, both]) == {
        UP.format(0): "w8a8",
        UP.format(1): "w8a16",
    }
    assert schemes(program, default="w8a8", rules=[name]) == {UP.format(i): "fp8-weight" for i in (0, 1)}
    first = {"name": "layers.0.*", "scheme": "none"}
    assert schemes(program, default="w8a8", rules=[first, name]) == {UP.format(1): "fp8-weight"}


def test_rules_name_the_head_and_the_embedding(program: Program) -> None:
    rules = [{"role": "embedding", "scheme": "w8a16"}, {"name": "lm_head", "scheme": "w8a8"}]
    assert schemes(program, rules=rules) == {"embed_tokens.weight": "w8a16", "lm_head.weight": "w8a8"}


def test_a_router_stays_in_full_precision_whatever_its_name_matches(program: Program) -> None:
    found = schemes(program, rules=[{"name": "layers.*", "scheme": "w8a8"}])
    assert "layers.1.mlp.router.weight" not in found and len(found) == 2
    with pytest.raises(
        UsageError, match=r"rule for name \*router\* matches only routers, which stay in full precision"
    ):
        schemes(program, default="w8a8", rules=[{"name": "*router*", "scheme": "w8a8"}])
    kept = {"name": "*router*", "scheme": "none"}
    assert len(schemes(program, default="w8a8", rules=[kept])) == 2


def test_rounding_by_bits_by_recipe_and_by_rule(program: Program) -> None:
    rules = [{"name": "layers.0.*", "scheme": "w8a8", "rounding": "hqq"}, {"role": "embedding", "scheme": "w4a16-g64"}]

    def roundings(**recipe: object) -> list[str]:
        found = assign(Recipe.model_validate(recipe), find_candidates(program)[0], program.sources)
        return [assignment.rounding for assignment in found.values()]

    assert roundings(default="w4a16-g64", rules=rules) == ["rtn", "hqq", "gptq"]  # an embedding has no input to measure
    assert roundings(default="w8a8", rules=rules) == ["rtn", "hqq", "rtn"]
    assert roundings(default="fp8-weight", rounding="gptq", rules=rules) == ["rtn", "hqq", "rtn"]


def test_the_group_of_a_preset_adapts_and_that_of_a_scheme_does_not(program: Program) -> None:
    assert set(schemes(program, default="w4a16-g128", adapt=True).values()) == {"w4a16-g64"}
    with pytest.raises(UsageError, match=r"layers\.0\.mlp\.up_proj\.weight has 192 inputs.*groups of 128.*g32, g64"):
        schemes(program, default="w4a16-g128")


def test_a_tied_weight_gets_one_scheme(program_of: Callable[..., Program]) -> None:
    def build(g: fx.Graph, ids: fx.Node, positions: fx.Node, table: fx.Node) -> fx.Node:
        return call(g, aten.linear.default, call(g, aten.embedding.default, table, ids), table)

    program = program_of(build, {"table": torch.zeros(50, 192)})
    same = [{"role": role, "scheme": "w8a16"} for role in ("lm_head", "embedding")]
    assert schemes(program, rules=same) == {"table": "w8a16"}
    assert schemes(program, rules=[{"name": "table", "scheme": "w8a16"}]) == {"table": "w8a16"}
    with pytest.raises(UsageError, match=r"table is both lm_head and embedding .*give both roles the same scheme"):
        schemes(program, rules=same[:1])


def test_a_rule_that_matches_nothing_lists_near_names(program: Program) -> None:
    with pytest.raises(UsageError, match=r"name layers\.\*\.mlp\.upproj\* matches no weight.*layers\.\*\.mlp\.up_proj"):
        schemes(program, rules=[{"name": "layers.*.mlp.upproj*", "scheme": "w8a8"}])
    with pytest.raises(UsageError, match=r"role attention matches nothing.*embedding, lm_head, mlp, router"):
        schemes(program, rules=[{"role": "attention", "scheme": "w8a8"}])


def test_nothing_to_quantize_is_an_error(program_of: Callable[..., Program]) -> None:
    spec = [TensorSpec(name="x", dtype="float32", shape=("T", 8))]
    program = program_of(lambda g, x, w: call(g, aten.linear.default, x, w), {"w": torch.zeros(50, 8)}, spec)
    with pytest.raises(UsageError, match=r"none to quantize.*lm_head"):
        schemes(program, default="w8a8")
