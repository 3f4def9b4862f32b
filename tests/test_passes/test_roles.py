"""What each weight is for, on the graphs of real models, and on small ones by hand."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable

import pytest
import torch
from torch import fx
from transformers import AutoModelForCausalLM

from optc.optimizer.capture import capture
from optc.passes.base import run_passes
from optc.passes.canonicalize import Canonicalize
from optc.passes.graph import Program, call
from optc.passes.quantize.roles import Candidate, find_candidates

from ..families import MAX_LEN, make_config

aten, optc = torch.ops.aten, torch.ops.optc

_QKVO = {"q_proj", "k_proj", "v_proj", "o_proj"}
_GATED = {"gate_proj", "up_proj", "down_proj"}
_LATENT = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
_SHARED = {f"shared_experts.{name}" for name in _GATED}
_EXPERTS = {"experts.gate_up_proj", "experts.down_proj"}
_MIXED = _GATED | _SHARED | _EXPERTS
_UNTIED = {"embedding": {"embed_tokens"}, "lm_head": {"lm_head"}}
_TIED = {"lm_head": {"embed_tokens"}}

# Of each family, the last parts of the names of the weights of each role; nothing else may be there.
EXPECTED: dict[str, dict[str, set[str]]] = {
    "llama": {**_UNTIED, "attention": _QKVO, "mlp": _GATED},
    "gemma2": {**_TIED, "attention": _QKVO, "mlp": _GATED},  # tied, a soft cap behind the head
    "olmo2": {**_UNTIED, "attention": _QKVO, "mlp": _GATED},  # norms behind q and k, and behind the layers
    "phi": {  # attention and MLP beside each other
        **_UNTIED,
        "attention": {"q_proj", "k_proj", "v_proj", "dense"},
        "mlp": {"fc1", "fc2"},
    },
    "gpt2": {
        "lm_head": {"wte"},
        "embedding": {"wpe"},
        "attention": {"c_attn", "attn.c_proj"},
        "mlp": {"c_fc", "mlp.c_proj"},
    },
    "gpt_neox": {
        "lm_head": {"lm_head"},
        "embedding": {"embed_in"},
        "attention": {"query_key_value", "dense"},
        "mlp": {"dense_h_to_4h", "dense_4h_to_h"},
    },
    "opt": {  # projections around the embedding
        **_TIED,
        "embedding": {"embed_positions"},
        "attention": {"q_proj", "k_proj", "v_proj", "out_proj"},
        "mlp": {"project_in", "project_out", "fc1", "fc2"},
    },
    "falcon": {  # products with a transposed weight
        "lm_head": {"word_embeddings"},
        "attention": {"query_key_value", "dense"},
        "mlp": {"dense_h_to_4h", "dense_4h_to_h"},
    },
    "mixtral": {**_UNTIED, "attention": _QKVO, "mlp": _EXPERTS, "router": {"mlp.gate"}},
    "gpt_oss": {**_UNTIED, "attention": _QKVO, "mlp": _EXPERTS, "router": {"mlp.router"}},  # experts as [G, K, n]
    "qwen2_moe": {
        **_UNTIED,
        "attention": _QKVO,
        "mlp": _EXPERTS | {f"shared_expert.{name}" for name in _GATED},
        "router": {"mlp.gate", "mlp.shared_expert_gate"},
    },
    "deepseek_v2": {**_UNTIED, "attention": _LATENT, "mlp": _MIXED, "router": {"mlp.gate"}},
    "deepseek_v3": {**_UNTIED, "attention": _LATENT, "mlp": _MIXED, "router": {"mlp.gate"}},
    "afmoe": {  # attention's result is gated
        **_UNTIED,
        "attention": {f"self_attn.{name}" for name in (*_QKVO, "gate_proj")},
        "mlp": {f"mlp.{name}" for name in _GATED} | _SHARED | _EXPERTS,
        "router": {"router.gate"},
    },
    "diffllama": {**_UNTIED, "attention": _QKVO, "mlp": _GATED},  # the difference of two attentions
}
TIED = ("gemma2", "gpt2", "opt", "falcon")
EVERY_TIME = ("gpt2", "opt", "falcon", "gpt_oss", "qwen2_moe", "deepseek_v2", "diffllama")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in EVERY_TIME else pytest.mark.slow) for name in EXPECTED]
)
def test_roles_of_a_family(name: str) -> None:
    attention = "eager" if name in ("gemma2", "gpt_oss") else "sdpa"
    model = AutoModelForCausalLM.from_config(make_config(name), attn_implementation=attention)
    program, _ = capture(model.eval().requires_grad_(False), MAX_LEN)
    run_passes(program, [Canonicalize()])
    candidates, declined = find_candidates(program)
    assert not declined
    expected = EXPECTED[name]
    seen = set()
    for candidate in candidates:
        source = program.sources[candidate.name].removesuffix(".weight")
        fitting = [role for role, ends in expected.items() for end in ends if re.search(rf"(^|\.){end}$", source)]
        assert candidate.role in fitting, f"{source} is {candidate.role}"
        seen |= {end for end in expected[candidate.role] if re.search(rf"(^|\.){end}$", source)}
        stored = model.get_parameter(program.sources[candidate.name]).shape
        if candidate.experts is not None:
            assert stored[0] == candidate.experts and candidate.transposed == (name == "gpt_oss")
            rows, columns = stored[:0:-1] if candidate.transposed else stored[1:]
            stored = torch.Size([stored[0] * rows, columns])
        assert candidate.shape == (stored[::-1] if program.layouts.get(candidate.name) == "transposed" else stored)
    assert seen == set().union(*expected.values())
    assert [candidate.role for candidate in candidates if candidate.is_tied] == ["lm_head"] * (name in TIED)


def roles(program: Program) -> dict[str, str]:
    return {candidate.name: candidate.role for candidate in find_candidates(program)[0]}


def weights(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape, generator=torch.Generator().manual_seed(0)) for name, shape in shapes.items()}


def linear(graph: fx.Graph, x: fx.Node, weight: fx.Node) -> fx.Node:
    return call(graph, aten.linear.default, x, weight)


def embed(graph: fx.Graph, table: fx.Node, ids: fx.Node) -> fx.Node:
    return call(graph, aten.embedding.default, table, ids)


def test_a_tied_weight_is_one_candidate(program_of: Callable[..., Program]) -> None:
    program = program_of(
        lambda g, ids, positions, table: linear(g, embed(g, table, ids), table), weights(table=(50, 16))
    )
    (candidate,) = find_candidates(program)[0]
    assert candidate.is_tied and candidate.role == "lm_head" and candidate.shape == (50, 16)
    assert (len(candidate.linears), len(candidate.embeddings)) == (1, 1)


def test_a_head_whose_result_has_several_users(program_of: Callable[..., Program]) -> None:
    """A soft cap that is switched between two values still leads nowhere but to the output."""

    def build(g: fx.Graph, ids: fx.Node, positions: fx.Node, table: fx.Node, head: fx.Node) -> fx.Node:
        logits = linear(g, embed(g, table, ids), head)
        return call(g, aten.add.Tensor, call(g, aten.tanh.default, logits), call(g, aten.mul.Tensor, logits, 0.5))

    assert roles(program_of(build, weights(table=(50, 16), head=(50, 16)))) == {"table": "embedding", "head": "lm_head"}


def test_a_weight_that_two_layers_use_comes_once(program_of: Callable[..., Program]) -> None:
    def build(g: fx.Graph, ids: fx.Node, positions: fx.Node, table: fx.Node, w: fx.Node, head: fx.Node) -> fx.Node:
        return linear(g, linear(g, linear(g, embed(g, table, ids), w), w), head)

    program = program_of(build, weights(table=(50, 16), w=(16, 16), head=(50, 16)))
    (shared,) = [candidate for candidate in find_candidates(program)[0] if candidate.name == "w"]
    assert shared.role == "mlp" and len(shared.linears) == 2


def test_a_gate_of_few_numbers_is_a_router(program_of: Callable[..., Program]) -> None:
    def build(g: fx.Graph, ids: fx.Node, positions: fx.Node, **w: fx.Node) -> fx.Node:
        x = embed(g, w["table"], ids)
        gated = call(g, aten.mul.Tensor, linear(g, x, w["up"]), linear(g, x, w["gate"]))
        return linear(g, gated, w["head"])

    found = roles(program_of(build, weights(table=(50, 16), up=(16, 16), gate=(1, 16), head=(50, 16))))
    assert found == {"table": "embedding", "up": "mlp", "gate": "router", "head": "lm_head"}


def test_what_is_chosen_from_makes_a_router_and_no_layer_behind_it(program_of: Callable[..., Program]) -> None:
    def build(g: fx.Graph, ids: fx.Node, positions: fx.Node, **w: fx.Node) -> fx.Node:
        x = linear(g, embed(g, w["table"], ids), w["before"])
        chosen = call(g, aten.sort.default, linear(g, x, w["router"]))
        return linear(g, g.call_function(operator.getitem, (chosen, 0)), w["head"])

    program = program_of(build, weights(table=(50, 16), before=(16, 16), router=(16, 16), head=(50, 16)))
    assert roles(program) == {"table": "embedding", "before": "mlp", "router": "router", "head": "lm_head"}


def test_other_uses_are_declined_by_name(program_of: Callable[..., Program]) -> None:
    def build(g: fx.Graph, ids: fx.Node, positions: fx.Node, **w: fx.Node) -> fx.Node:
        x = embed(g, w["table"], ids)
        x = linear(g, x, call(g, aten.neg.default, w["computed"]))
        x = call(g, aten.add.Tensor, linear(g, x, w["both"]), call(g, aten.sum.default, w["both"]))
        return linear(g, x, w["head"])

    shapes = weights(table=(50, 16), computed=(16, 16), both=(16, 16), head=(50, 16))
    program = program_of(build, shapes)
    candidates, declined = find_candidates(program)
    assert [candidate.name for candidate in candidates] == ["table", "head"]
    assert [reason for _, reason in declined] == ["its weight is computed", "its weight is also used by sum_default"]


def experts(graph: fx.Graph, x: fx.Node, weight: fx.Node, *, turned: bool) -> fx.Node:
    """Rows [T, K] times one matrix for all of them, as the only expert of so many that has rows."""
    offsets = call(graph, aten.full.default, [3], 5, dtype=torch.int32)
    return call(graph, optc.grouped_mm.default, x, turn(graph, weight) if turned else weight, offsets)


def turn(graph: fx.Graph, weight: fx.Node) -> fx.Node:
    return call(graph, aten.transpose.int, weight, -2, -1)


def rows_of(graph: fx.Graph, table: fx.Node, ids: fx.Node) -> fx.Node:
    return call(graph, aten.select.int, embed(graph, table, ids), 0, 0)


@pytest.mark.parametrize("turned", [True, False])
def test_experts_are_a_matrix_with_theirs_one_below_the_other(turned: bool, program_of: Callable[..., Program]) -> None:
    def build(g: fx.Graph, ids: fx.Node, positions: fx.Node, **w: fx.Node) -> fx.Node:
        return linear(g, experts(g, rows_of(g, w["table"], ids), w["up"], turned=turned), w["head"])

    shape = (3, 24, 16) if turned else (3, 16, 24)
    program = program_of(build, weights(table=(50, 16), up=shape, head=(50, 24)))
    found, declined = find_candidates(program)
    (up,) = [candidate for candidate in found if candidate.name == "up"]
    assert not declined
    assert (up.role, up.shape, up.experts, up.transposed) == ("mlp", (72, 16), 3, not turned)
    weight = torch.randn(shape)
    matrix = up.as_matrix(weight)
    assert torch.equal(matrix[24:48], weight[1] if turned else weight[1].t())
    assert torch.equal(up.from_matrix(matrix), weight) and up.from_matrix(matrix).is_contiguous()


def test_experts_whose_weights_are_used_otherwise_are_declined(program_of: Callable[..., Program]) -> None:
    def build(g: fx.Graph, ids: fx.Node, positions: fx.Node, **w: fx.Node) -> fx.Node:
        x = rows_of(g, w["table"], ids)
        x = experts(g, x, call(g, aten.neg.default, w["computed"]), turned=False)
        x = experts(g, x, call(g, aten.permute.default, w["other_order"], [1, 0, 2]), turned=False)
        x = experts(g, experts(g, x, w["both_ways"], turned=True), w["both_ways"], turned=False)
        x = call(g, aten.add.Tensor, experts(g, x, w["summed"], turned=True), call(g, aten.sum.default, w["summed"]))
        viewed = turn(g, w["viewed"])
        x = call(g, optc.grouped_mm.default, x, viewed, call(g, aten.full.default, [3], 5, dtype=torch.int32))
        return linear(g, call(g, aten.add.Tensor, x, call(g, aten.amax.default, viewed)), w["head"])

    cube = dict.fromkeys(("computed", "both_ways", "summed", "viewed"), (3, 16, 16))
    program = program_of(build, weights(table=(50, 16), **cube, other_order=(16, 3, 16), head=(50, 16)))
    candidates, declined = find_candidates(program)
    assert [candidate.name for candidate in candidates] == ["table", "head"]
    assert [reason for _, reason in declined] == [
        "its weight is computed",
        "its weight is computed",
        "its weight is used both turned and as it is",
        "its weight is also used by sum_default",
        "its weight is also used by amax_default",
    ]


def test_the_captured_model(canonical: Program) -> None:
    candidates: list[Candidate] = find_candidates(canonical)[0]
    by_role = {role: [c.name for c in candidates if c.role == role] for role in {c.role for c in candidates}}
    assert set(by_role) == {"embedding", "attention", "lm_head"}
    assert len(by_role["attention"]) == 8
