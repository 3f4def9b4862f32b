"""Where factors can be folded: proved on small models of many families, and refused at every look-alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

from optc.optimizer.capture import capture
from optc.optimizer.checkpoint import load_checkpoint
from optc.passes.base import run_passes
from optc.passes.canonicalize import Canonicalize
from optc.passes.graph import Program, call, get_weight
from optc.passes.quantize.fold import Site, find_sites, fold
from optc.passes.verify import Probe
from optc.runtime.manifest import TensorSpec

from ..families import MAX_LEN, VOCAB_SIZE, save_model

aten, optc = torch.ops.aten, torch.ops.optc

# Sites in a model of two layers, without the one before lm_head, and the inputs that must not be folded.
EXPECTED = {
    "llama": {"input_layernorm": 2, "v_proj": 2, "post_attention_layernorm": 2, "up_proj": 2},
    "gemma": {"input_layernorm": 2, "v_proj": 2, "post_attention_layernorm": 2, "up_proj": 2},
    "qwen3": {"input_layernorm": 2, "v_proj": 2, "post_attention_layernorm": 2, "up_proj": 2},
    "phi3": {"input_layernorm": 2, "qkv_proj": 2, "post_attention_layernorm": 2, "gate_up_proj": 2},
    "phi": {"input_layernorm": 2, "v_proj": 2},  # GELU before fc2
    "gpt2": {"ln_1": 2, "c_attn": 2, "ln_2": 2},  # GELU before c_proj
    "opt": {"self_attn_layer_norm": 2, "v_proj": 2, "final_layer_norm": 2, "fc1": 2},  # ReLU
    "gpt_neox": {"input_layernorm": 2, "query_key_value": 2, "post_attention_layernorm": 2},
    "olmo2": {"v_proj": 2, "up_proj": 2},  # the residual stream itself is the input
    "mixtral": {"input_layernorm": 2, "v_proj": 2},  # the experts are not linear layers
    "falcon": {"input_layernorm": 2},  # one norm for attention and MLP, GELU between its layers
}


def program_of_family(name: str, folder: Path) -> Program:
    checkpoint = load_checkpoint(str(save_model(name, folder)))
    program, _ = capture(checkpoint.model, checkpoint.max_model_len)
    run_passes(program, [Canonicalize()])
    return program


def random_factors(site: Site, generator: torch.Generator) -> Tensor:
    return torch.exp(torch.randn(int(site.producer.node.meta["val"].shape[-1]), generator=generator))


@pytest.mark.parametrize("name", EXPECTED)
def test_logits_stay_when_every_site_of_a_family_takes_random_factors(name: str, tmp_path: Path) -> None:
    program = program_of_family(name, tmp_path / name)
    probe, generator = Probe.random(VOCAB_SIZE, MAX_LEN), torch.Generator().manual_seed(0)
    before = probe.logits(program)
    sites, declined = find_sites(program)
    found: dict[str, int] = {}
    for site in sites:
        fold(program, site, random_factors(site, generator))
        if not any("lm_head" in weight or "project_out" in weight for weight in site.names):
            module = site.producer.weights[0][0].removesuffix("_transposed").split(".")[-2]
            found[module] = found.get(module, 0) + 1
    assert found == EXPECTED[name]
    assert probe.error(before, probe.logits(program)) < 1e-5
    linears = program.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert {*declined, *(linear for site in sites for linear in site.linears)} == set(linears)


def test_grouped_query_attention_ties_the_query_heads_of_a_key_value_head(canonical: Program) -> None:
    sites, _ = find_sites(canonical)
    site = next(site for site in sites if "v_proj" in site.producer.weights[0][0])
    # 4 query heads of 8 channels over 2 key-value heads: 0 and 1 read the first, 2 and 3 the second.
    assert site.index.view(4, 8).tolist() == [[*range(8)], [*range(8)], [*range(8, 16)], [*range(8, 16)]]
    reduced = site.per_channel(torch.arange(32.0), "amax")
    assert reduced.tolist() == [float(max(c for c in range(32) if site.index[c] == n)) for n in range(16)]


def test_what_is_folded_is_recorded_and_a_copy_keeps_its_weights(canonical: Program) -> None:
    copy = canonical.copy()
    sites, _ = find_sites(canonical)
    site = sites[0]
    name, column = site.producer.weights[0][0], site.names[0]
    before = get_weight(canonical.module, name).clone(), get_weight(canonical.module, column).clone()
    factors = torch.full((before[0].shape[0],), 2.0)
    fold(canonical, site, factors)
    assert torch.equal(get_weight(canonical.module, name), before[0] / 2)
    assert torch.equal(get_weight(canonical.module, column), before[1] * 2)
    assert {canonical.layouts[name], canonical.layouts[column]} == {"folded"}
    assert torch.equal(get_weight(copy.module, name), before[0])


X = [TensorSpec(name="x", dtype="float32", shape=(1, "T", 8))]
WEIGHTS = {
    "norm": torch.rand(8) + 0.5,
    "bias": torch.rand(8),
    "w1": torch.randn(8, 8),
    "w2": torch.randn(8, 8),
    "other": torch.rand(8) + 0.5,
}
Build = Callable[..., fx.Node]


def _linear(g: fx.Graph, x: fx.Node, w: fx.Node, *bias: fx.Node) -> fx.Node:
    return call(g, aten.linear.default, x, w, *bias)


def _mul(g: fx.Graph, a: object, b: object) -> fx.Node:
    return call(g, aten.mul.Tensor, a, b)


def _layer_norm(g: fx.Graph, x: fx.Node, *weights: fx.Node) -> fx.Node:
    return call(g, aten.layer_norm.default, x, [8], *weights)


# Each gives a graph over x and WEIGHTS where exactly the producer named first can be divided.
FOLDABLE: dict[str, tuple[tuple[str, ...], Build]] = {
    "a product with a weight": (("norm",), lambda g, x, **w: _linear(g, _mul(g, x, w["norm"]), w["w1"])),
    "the weight on the left": (("norm",), lambda g, x, **w: _linear(g, _mul(g, w["norm"], x), w["w1"])),
    "1 + weight": (
        ("norm",),
        lambda g, x, **w: _linear(g, _mul(g, x, call(g, aten.add.Tensor, w["norm"], 1.0)), w["w1"]),
    ),
    "a layer norm with bias": (
        ("norm", "bias"),
        lambda g, x, **w: _linear(g, _layer_norm(g, x, w["norm"], w["bias"]), w["w1"]),
    ),
    "an RMS norm": (
        ("norm",),
        lambda g, x, **w: _linear(g, call(g, aten.rms_norm.default, x, [8], w["norm"], 1e-6), w["w1"]),
    ),
    "a linear layer with bias": (
        ("w1", "bias"),
        lambda g, x, **w: _linear(g, _linear(g, x, w["w1"], w["bias"]), w["w2"]),
    ),
    "through ReLU, a cast and a constant": (
        ("w1",),
        lambda g, x, **w: _linear(g, _mul(g, call(g, aten.relu.default, _linear(g, x, w["w1"])), 3.0), w["w2"]),
    ),
    "through a gate": (
        ("w1",),
        lambda g, x, **w: _linear(g, _mul(g, call(g, aten.silu.default, x), _linear(g, x, w["w1"])), w["w2"]),
    ),
    "over a divisor": (
        ("w1",),
        lambda g, x, **w: _linear(g, call(g, aten.div.Tensor, _linear(g, x, w["w1"]), w["other"]), w["w2"]),
    ),
    "through views that permute channels": (
        ("w1",),
        lambda g, x, **w: _linear(
            g,
            call(
                g,
                aten.flatten.using_ints,
                call(g, aten.transpose.int, call(g, aten.unflatten.int, _linear(g, x, w["w1"]), 2, [2, 4]), 2, 3),
                2,
            ),
            w["w2"],
        ),
    ),
}


@pytest.mark.parametrize("case", FOLDABLE)
def test_each_producer_that_can_be_divided(case: str, program_of: Callable[..., Program]) -> None:
    names, build = FOLDABLE[case]
    program = program_of(build, weights=dict(WEIGHTS), inputs=X)
    x, factors = torch.randn(1, 5, 8), torch.exp(torch.randn(8))
    before = program.copy().module(x)[0]
    site = next(site for site in find_sites(program)[0] if tuple(name for name, _ in site.producer.weights) == names)
    fold(program, site, factors)
    for name in names:
        assert not torch.equal(get_weight(program.module, name), WEIGHTS[name])
    torch.testing.assert_close(program.module(x)[0], before, rtol=1e-5, atol=1e-5)


def _norm_used_twice(g: fx.Graph, x: fx.Node, **w: fx.Node) -> fx.Node:
    negative = call(g, aten.neg.default, x)
    first = _linear(g, _mul(g, x, w["norm"]), w["w1"])
    return call(g, aten.add.Tensor, first, _linear(g, _mul(g, negative, w["norm"]), w["w2"]))


def _input_used_elsewhere(g: fx.Graph, x: fx.Node, **w: fx.Node) -> fx.Node:
    normed = _mul(g, x, w["norm"])
    return call(g, aten.add.Tensor, _linear(g, normed, w["w1"]), normed)


def _weight_used_elsewhere(g: fx.Graph, x: fx.Node, **w: fx.Node) -> fx.Node:
    return call(g, aten.add.Tensor, _linear(g, _mul(g, x, w["norm"]), w["w1"]), _linear(g, x, w["w1"]))


def _two_orders(g: fx.Graph, x: fx.Node, **w: fx.Node) -> fx.Node:
    normed = _mul(g, x, w["norm"])
    left, right = (call(g, aten.slice.Tensor, normed, 2, a, b) for a, b in ((0, 4), (4, 8)))
    turned = call(g, aten.cat.default, [right, left], -1)
    return call(g, aten.add.Tensor, _linear(g, normed, w["w1"]), _linear(g, turned, w["w2"]))


def _partly(g: fx.Graph, x: fx.Node, **w: fx.Node) -> fx.Node:
    halves = [call(g, aten.slice.Tensor, value, 2, 0, 4) for value in (_mul(g, x, w["norm"]), x)]
    return _linear(g, call(g, aten.cat.default, halves, -1), w["w1"])


def _times_itself(g: fx.Graph, x: fx.Node, **w: fx.Node) -> fx.Node:
    normed = _mul(g, x, w["norm"])
    return _linear(g, _mul(g, normed, normed), w["w1"])


def _as_divisor(g: fx.Graph, x: fx.Node, **w: fx.Node) -> fx.Node:
    return _linear(g, call(g, aten.div.Tensor, x, _mul(g, x, w["norm"])), w["w1"])


def _mixed_over_tokens(g: fx.Graph, x: fx.Node, **w: fx.Node) -> fx.Node:
    """A view that takes tokens for channels."""
    normed = call(g, aten.slice.Tensor, _mul(g, x, w["norm"]), 1, 0, 2)
    turned = call(g, aten.reshape.default, call(g, aten.transpose.int, normed, 1, 2), [1, 2, 8])
    return _linear(g, turned, w["w1"])


def _added_to_the_stream(g: fx.Graph, x: fx.Node, **w: fx.Node) -> fx.Node:
    return _linear(g, call(g, aten.add.Tensor, x, _mul(g, x, w["norm"])), w["w1"])


def _without_its_bias(g: fx.Graph, x: fx.Node, **w: fx.Node) -> fx.Node:
    shifted = call(g, aten.add.Tensor, _mul(g, x, w["norm"]), w["bias"])
    return _linear(g, shifted, w["w1"])


def _bias_computed(g: fx.Graph, x: fx.Node, **w: fx.Node) -> fx.Node:
    return _linear(g, _layer_norm(g, x, w["norm"], call(g, aten.neg.default, w["bias"])), w["w1"])


def _attention_keys(g: fx.Graph, x: fx.Node, **w: fx.Node) -> fx.Node:
    """The same projection as key and value: linear in the value alone."""
    kv = call(g, aten.unsqueeze.default, _linear(g, x, w["w1"]), 1)
    out = call(g, optc.attention.default, call(g, aten.unsqueeze.default, x, 1), kv, kv, 1.0, 0, 0.0, None, 0)
    return _linear(g, call(g, aten.flatten.using_ints, out, 2), w["w2"])


NOT_FOLDABLE: dict[str, tuple[str, Build]] = {
    "a norm weight that two layers share": ("used more than once", _norm_used_twice),
    "an input that something else uses": ("also goes to add", _input_used_elsewhere),
    "a weight that something else uses": ("w1 is also used by", _weight_used_elsewhere),
    "two orders of channels": ("in different orders", _two_orders),
    "half of the channels": ("only some of the inputs", _partly),
    "a square": ("no weights of its own", _times_itself),
    "a divisor": ("no weights of its own", _as_divisor),
    "channels made of tokens": ("no weights of its own", _mixed_over_tokens),
    "a sum with the stream": ("no weights of its own", _added_to_the_stream),
    "a bias added later": ("no weights of its own", _without_its_bias),
    "a bias that is computed": ("no weights of its own", _bias_computed),
    "a key": ("also goes to attention", _attention_keys),
    "GELU": (
        "no weights of its own",
        lambda g, x, **w: _linear(g, call(g, aten.gelu.default, _linear(g, x, w["w1"])), w["w2"]),
    ),
}


@pytest.mark.parametrize("case", NOT_FOLDABLE)
def test_look_alikes_are_declined_with_the_reason(case: str, program_of: Callable[..., Program]) -> None:
    reason, build = NOT_FOLDABLE[case]
    program = program_of(build, weights=dict(WEIGHTS), inputs=X)
    sites, declined = find_sites(program)
    assert sites == []
    assert any(reason in found for found in declined.values()), declined


@pytest.mark.parametrize(("dtype", "largest"), [("float16", 256.0), ("bfloat16", 1e4), ("float32", 1e4)])
def test_factors_are_bounded_by_what_the_dtype_can_hold(
    dtype: str, largest: float, program_of: Callable[..., Program]
) -> None:
    _, build = FOLDABLE["a product with a weight"]
    kind = getattr(torch, dtype)
    weights = {"norm": torch.full((8,), 200.0, dtype=kind), "w1": torch.full((8, 8), 200.0, dtype=kind)}
    program = program_of(build, weights=weights, inputs=[X[0].model_copy(update={"dtype": dtype})])
    (site,), _ = find_sites(program)
    factors = site.centred(torch.logspace(-8, 8, 8))
    torch.testing.assert_close(factors[[0, -1]], torch.tensor([1 / largest, largest]), rtol=2e-3, atol=0.0)
    fold(program, site, factors)
    assert all(get_weight(program.module, name).isfinite().all() for name in ("norm", "w1"))


def test_the_rounding_of_a_norm_weight_is_made_up_for(program_of: Callable[..., Program]) -> None:
    """In bfloat16 only the columns' own rounding remains: the product of the two stays within one rounding."""
    _, build = FOLDABLE["a product with a weight"]
    weights = {"norm": (torch.rand(8) + 0.5).bfloat16(), "w1": torch.randn(8, 8).bfloat16()}
    program = program_of(build, weights=dict(weights), inputs=[X[0].model_copy(update={"dtype": "bfloat16"})])
    (site,), _ = find_sites(program)
    fold(program, site, torch.exp(torch.randn(8)))
    product = get_weight(program.module, "norm").float() * get_weight(program.module, "w1").float()
    expected = weights["norm"].float() * weights["w1"].float()
    assert ((product - expected).abs() <= expected.abs() * 2**-8).all()
