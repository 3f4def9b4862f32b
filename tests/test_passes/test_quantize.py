"""The pass that stores weights as codes: what it rewrites, what it declines, and what it records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from optc.errors import UsageError, VerificationError
from optc.passes.base import run_passes
from optc.passes.graph import Program, call, get_weight
from optc.passes.quantize import quantize as module
from optc.passes.quantize.calibrate import Calibration, Statistics
from optc.passes.quantize.quantize import Quantize, round_weight, scale_dtype
from optc.passes.quantize.recipe import Assignment, Recipe, Rule
from optc.passes.quantize.rtn import rtn
from optc.passes.verify import Probe
from optc.runtime.manifest import PassRecord, QuantizedLayer
from optc.runtime.ops.quantized import StoredWeight
from optc.runtime.scheme import find_scheme

aten, optc = torch.ops.aten, torch.ops.optc

V, K, N = 40, 64, 48
SCHEMES = ["w8a16", "w8a8", "w4a16-g32", "w4a16-g32-asym", "w3a16-g64", "w4a8-channel", "fp8-weight", "fp8-block"]


def weights(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(*shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def two_layers(
    graph: fx.Graph,
    input_ids: fx.Node,
    positions: fx.Node,
    *,
    table: fx.Node,
    up: fx.Node,
    bias: fx.Node,
    down: fx.Node,
) -> fx.Node:
    """Embedding -> linear with bias -> silu -> linear, and the tied head."""
    x = call(graph, aten.embedding.default, table, input_ids)
    hidden = call(graph, aten.silu.default, call(graph, aten.linear.default, x, up, bias))
    x = call(graph, aten.add.Tensor, x, call(graph, aten.linear.default, hidden, down))
    return call(graph, aten.linear.default, x, table)


@pytest.fixture
def program(program_of: Callable[..., Program]) -> Program:
    return program_of(two_layers, weights(table=(V, K), up=(N, K), bias=(N,), down=(K, N)))


def calibration(count: int = 4) -> Calibration:
    generator = torch.Generator().manual_seed(1)
    return Calibration(tuple(torch.randint(0, V, (32,), generator=generator) for _ in range(count)), "random", 1)


def quantize(program: Program, recipe: Recipe, **options: Any) -> PassRecord:
    (record,) = run_passes(program, [Quantize(recipe=recipe, **options)], facts={"canonical"})
    return record


def layers(program: Program) -> dict[str, QuantizedLayer]:
    assert program.quantization is not None
    return {layer.name: layer for layer in program.quantization.layers}


def stored(program: Program, name: str) -> StoredWeight:
    layer = layers(program)[name]
    assert program.quantization is not None
    parts = {part: get_weight(program.module, constant) for part, constant in layer.constants.items()}
    args = program.quantization.schemes[layer.scheme].weights
    found = StoredWeight(parts["codes"], parts["scale"], parts.get("zero"), parts.get("group_index"), args, layer.shape)
    found.check()
    return found


def logits(program: Program) -> Tensor:
    with torch.no_grad():
        result: Tensor = program.module(torch.arange(20)[None] % V, torch.arange(20)[None])[0]
    return result


def test_linears_are_rewritten_and_the_tied_table_stays(program: Program, count: Callable[..., int]) -> None:
    record = quantize(program, Recipe(default="w8a16", rounding="rtn"))
    assert record.matches == 2
    (declined,) = record.declined
    assert "lm_head: full precision" in declined
    assert count(program, optc.linear_quantized.default) == 2
    assert count(program, aten.linear.default) == count(program, aten.embedding.default) == 1
    assert set(layers(program)) == {"up", "down"}
    assert set(program.weights()) == {"table", "bias", "up_codes", "up_scale", "down_codes", "down_scale"}


def test_a_tied_weight_is_stored_once_for_both_uses(program: Program, count: Callable[..., int]) -> None:
    rules = tuple(Rule(role=role, scheme="w8a16") for role in ("lm_head", "embedding"))
    before = logits(program)
    record = quantize(program, Recipe(default="none", rounding="rtn", rules=rules))
    assert record.matches == 2
    assert count(program, optc.linear_quantized.default) == count(program, optc.embedding_quantized.default) == 1
    assert set(layers(program)) == {"table"}
    assert {"table_codes", "table_scale"} <= set(program.weights()) and "table" not in program.weights()
    assert (logits(program) - before).abs().max() < 0.02 * before.abs().max()


def test_a_tied_weight_with_two_schemes_is_refused(program: Program) -> None:
    rules = (Rule(role="lm_head", scheme="w8a16"), Rule(role="embedding", scheme="w4a16-g32"))
    with pytest.raises(UsageError, match="table is both lm_head and embedding"):
        quantize(program, Recipe(default="none", rounding="rtn", rules=rules))


def test_a_weight_of_two_linears_is_stored_once(program_of: Callable[..., Program], count: Callable[..., int]) -> None:
    def build(
        graph: fx.Graph, input_ids: fx.Node, positions: fx.Node, *, table: fx.Node, shared: fx.Node, head: fx.Node
    ) -> fx.Node:
        x = call(graph, aten.embedding.default, table, input_ids)
        for _ in range(2):
            x = call(graph, aten.silu.default, call(graph, aten.linear.default, x, shared))
        return call(graph, aten.linear.default, x, head)

    program = program_of(build, weights(table=(V, K), shared=(K, K), head=(V, K)))
    record = quantize(program, Recipe(default="w4a16-g32", rounding="gptq"), calibration=calibration())
    assert record.matches == 2
    assert count(program, optc.linear_quantized.default) == 2
    assert set(layers(program)) == {"shared"}
    assert {name for name in program.weights() if name.startswith("shared")} == {"shared_codes", "shared_scale"}


def shared_twice(
    graph: fx.Graph, input_ids: fx.Node, positions: fx.Node, *, table: fx.Node, shared: fx.Node, head: fx.Node
) -> fx.Node:
    """The second input of the shared weight is much larger than the first."""
    x = call(graph, aten.embedding.default, table, input_ids)
    x = call(graph, aten.relu.default, call(graph, aten.linear.default, x, shared))
    x = call(graph, aten.linear.default, call(graph, aten.mul.Tensor, x, 10.0), shared)
    return call(graph, aten.linear.default, x, head)


@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
def test_a_weight_of_two_inputs_is_measured_at_both(rounding: Any, program_of: Callable[..., Program]) -> None:
    """Whatever is seen, one scale covers it; and its codes are those for both inputs as one."""
    program = program_of(shared_twice, weights(table=(V, K), shared=(K, K), head=(V, K)))
    plain, data = program.copy(), calibration()
    quantize(program, Recipe(default="w8a8-static", rounding=rounding), calibration=data)
    ids = torch.cat(data.samples)
    weight = get_weight(plain.module, "shared")
    first = get_weight(plain.module, "table")[ids]
    second = 10 * torch.relu(first @ weight.t())
    scale = get_weight(program.module, layers(program)["shared"].constants["input_scale"])
    torch.testing.assert_close(scale, torch.cat([first, second]).abs().max().reshape(1) / 127.0)
    assert (logits(program) - logits(plain)).norm() < 0.1 * logits(plain).norm()
    both = torch.cat([first, second])
    importance = both.square().mean(dim=0)
    expected = rtn(weight, find_scheme("w8a8-static").weights, torch.float16, importance=importance)
    assert layers(program)["shared"].algorithm == rounding
    if rounding == "rtn":
        assert (stored(program, "shared").unpack().codes == expected.codes).float().mean() > 0.999
    else:
        losses = [
            ((found.dequantize() - weight) @ both.t()).square().sum() for found in (stored(program, "shared"), expected)
        ]
        assert losses[0] < 0.9 * losses[1]


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_head_is_calibrated_as_any_layer(
    is_tied: bool, program: Program, program_of: Callable[..., Program]
) -> None:
    if not is_tied:
        program = program_of(shared_twice, weights(table=(V, K), shared=(K, K), head=(V, K)))
    name = "table" if is_tied else "head"
    roles = ("lm_head", "embedding") if is_tied else ("lm_head",)
    found = {}
    for rounding in ("rtn", "gptq"):
        copy = program.copy()
        rules = tuple(Rule(role=role, scheme="w4a16-g32", rounding=rounding) for role in roles)
        quantize(copy, Recipe(rules=rules), calibration=calibration())
        assert layers(copy)[name].algorithm == rounding
        found[rounding] = stored(copy, name).unpack().codes
    assert not torch.equal(found["rtn"], found["gptq"])
    rules = tuple(Rule(role=role, scheme="w8a8-static") for role in roles)
    before = logits(program)
    quantize(program, Recipe(rules=rules), calibration=calibration())
    assert "input_scale" in layers(program)[name].constants
    assert (logits(program) - before).abs().max() < 0.05 * before.abs().max()


def test_an_embedding_alone_has_no_input_to_scale(program_of: Callable[..., Program]) -> None:
    program = program_of(shared_twice, weights(table=(V, K), shared=(K, K), head=(V, K)))
    quantize(program, Recipe(rules=(Rule(role="embedding", scheme="w8a8-static"),)), calibration=calibration())
    assert set(layers(program)["table"].constants) == {"codes", "scale"}


def test_what_is_recorded_is_what_was_done(program: Program) -> None:
    """GPTQ without data is rounding to nearest, and is called that."""
    quantize(program, Recipe(default="w4a16-g32", rounding="gptq", adapt=True))
    assert {layer.algorithm for layer in layers(program).values()} == {"rtn"}


@pytest.mark.parametrize(
    ("name", "rounding"),
    [(name, "rtn") for name in ("w8a8", "w4a16-g32", "w4a16-g32-asym", "fp8-weight", "fp8-block", "fp8-tensor")]
    + [(name, "gptq") for name in ("w8a8", "w4a16-g32", "w4a16-g32-asym")]
    + [("w4a16-g32-asym", "hqq")],
)
def test_rows_in_parts_give_the_same_codes(name: str, rounding: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, generator = find_scheme(name), torch.Generator().manual_seed(0)
    weight, x = torch.randn(300, 256, generator=generator), torch.randn(500, 256, generator=generator)
    statistics = Statistics(x.t() @ x / 500, x.abs().amax(dim=0), x.abs().mean(dim=0), 500)
    assignment = Assignment(name, scheme, rounding)
    whole = round_weight(weight, assignment, torch.float16, statistics)
    monkeypatch.setattr("optc.passes.quantize.quantize._WEIGHTS_AT_ONCE", 37 * 256)
    parts = round_weight(weight, assignment, torch.float16, statistics)
    parts.pack().check()
    same = (whole.codes.float() == parts.codes.float()).float().mean()
    assert same == 1 if rounding == "rtn" else same > 0.99  # products of other shapes are summed in another order
    assert torch.equal(whole.scale, parts.scale) or rounding != "rtn"


@pytest.mark.parametrize("name", ["w8a16", "w4a16-g32", "w4a16-g32-asym", "w3a16-channel", "fp8-weight", "fp8-block"])
@settings(max_examples=25)
@given(
    exponents=st.lists(st.floats(-9.0, 3.0), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    seed=st.integers(0, 9),
)
def test_scales_have_room_for_rows_of_any_magnitude(
    name: str, exponents: list[float], dtype: torch.dtype, seed: int
) -> None:
    """Every row keeps the accuracy that it has with scales in float32."""
    args = find_scheme(name).weights
    rows = torch.randn(len(exponents), 64, generator=torch.Generator().manual_seed(seed))
    weight = (rows * 10.0 ** torch.tensor(exponents)[:, None]).to(dtype).float()
    chosen = scale_dtype(dtype, weight, args)
    assert chosen in (torch.float16, torch.float32)

    def errors(kind: torch.dtype) -> Tensor:
        return (rtn(weight, args, kind).dequantize() - weight).norm(dim=1)

    assert (errors(chosen) <= 1.1 * errors(torch.float32) + 1e-3 * weight.norm(dim=1)).all()


def test_a_weight_that_something_else_uses_is_declined(program_of: Callable[..., Program]) -> None:
    def build(
        graph: fx.Graph, input_ids: fx.Node, positions: fx.Node, *, table: fx.Node, used: fx.Node, plain: fx.Node
    ) -> fx.Node:
        x = call(graph, aten.linear.default, call(graph, aten.embedding.default, table, input_ids), used)
        x = call(graph, aten.add.Tensor, x, call(graph, aten.sum.default, used))
        x = call(graph, aten.silu.default, call(graph, aten.linear.default, x, plain))
        return call(graph, aten.linear.default, x, table)

    program = program_of(build, weights(table=(V, K), used=(K, K), plain=(K, K)))
    record = quantize(program, Recipe(default="w8a16", rounding="rtn"))
    assert set(layers(program)) == {"plain"}
    assert any("its weight is also used by sum" in declined for declined in record.declined)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_program_computes_what_the_stored_weights_mean(scheme: str, program: Program) -> None:
    """Put back as plain weights, they give the same logits; biases are kept to the bit."""
    plain = program.copy()
    recipe = Recipe(default=scheme, rounding="rtn", adapt=True)
    bias = get_weight(program.module, "bias").clone()
    quantize(program, recipe)
    assert torch.equal(get_weight(program.module, "bias"), bias)
    names = {name: stored(program, name).dequantize() for name in ("up", "down")}
    found = logits(program)
    assert program.quantization is not None
    if any(found.input_activations for found in program.quantization.schemes.values()):
        return  # rounds activations too: tests/test_quantized_ops.py
    with torch.no_grad():
        for name, value in names.items():
            get_weight(plain.module, name).copy_(value)
    torch.testing.assert_close(found, logits(plain), rtol=1e-5, atol=1e-5)


PROBE = Probe.random(V, 64)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_check_holds_the_program_against_what_the_codes_mean(scheme: str, program: Program) -> None:
    """However far that is from the weights before, which is what the record says."""
    recipe = Recipe(default=scheme, rounding="rtn", adapt=True, rules=(Rule(role="embedding", scheme=scheme),))
    recipe = recipe.model_copy(update={"rules": (*recipe.rules, Rule(role="lm_head", scheme=scheme))})
    (record,) = run_passes(program, [Quantize(recipe=recipe)], facts={"canonical"}, probe=PROBE)
    assert record.max_error is not None and record.max_error > 1e-3


@pytest.mark.parametrize("name", ["table", "up", "down"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda stored: {"weight": stored.weight.flip(0)},
        lambda stored: {"weight": stored.weight.roll(1, 1)},
        lambda stored: {"scale": stored.scale * 1.01},
        lambda stored: {"scale": stored.scale * float("nan")},
        lambda stored: {"zero": stored.zero.flip(0)},
        lambda stored: {"group_index": torch.arange(stored.shape[1], dtype=torch.int32) % stored.scale.shape[1]},
    ],
    ids=["rows", "columns", "scale", "nan", "zero", "groups"],
)
def test_the_check_finds_a_program_that_means_other_weights(
    damage: Callable[[StoredWeight], dict[str, Tensor]], name: str, program_of: Callable[..., Program], monkeypatch: Any
) -> None:
    rewrite = module._rewrite

    def damaged(program: Program, candidate: Any, work: Any, source: str) -> QuantizedLayer:
        if candidate.name == name:
            work.stored[name] = replace(work.stored[name], **damage(work.stored[name]))
        return rewrite(program, candidate, work, source)

    monkeypatch.setattr(module, "_rewrite", damaged)
    program = program_of(two_layers, weights(table=(V, K), up=(K, K), bias=(K,), down=(K, K)))
    rules = tuple(Rule(role=role, scheme="w4a16-g32-asym") for role in ("embedding", "lm_head"))  # type: ignore[arg-type]
    recipe = Recipe(default="w4a16-g32-asym", rounding="rtn", rules=rules)
    with pytest.raises(VerificationError, match="quantize changed the logits"):
        run_passes(program, [Quantize(recipe=recipe)], facts={"canonical"}, probe=PROBE)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bits_per_weight_are_the_bytes_that_are_stored(scheme: str, program: Program) -> None:
    quantize(program, Recipe(default=scheme, rounding="rtn", adapt=True))
    total = 0
    for name, layer in layers(program).items():
        parts = [get_weight(program.module, constant) for constant in layer.constants.values()]
        size = sum(part.numel() * part.element_size() for part in parts)
        assert layer.bits_per_weight == pytest.approx(8 * size / (layer.shape[0] * layer.shape[1]))
        assert size == stored(program, name).num_bytes()
        total += size
    assert program.quantization is not None
    assert program.quantization.bits_per_weight == pytest.approx(8 * total / (2 * N * K))


def test_bits_per_weight_of_a_scheme(program: Program) -> None:
    quantize(program, Recipe(default="w4a16-g32", rounding="rtn", rules=(Rule(name="down", scheme="none"),)))
    assert layers(program)["up"].bits_per_weight == 4 + 16 / 32


@pytest.mark.parametrize(("bad", "kind"), [(float("nan"), "NaN"), (float("inf"), "Inf"), (float("-inf"), "Inf")])
def test_a_weight_that_holds_no_numbers_is_named(bad: float, kind: str, program_of: Callable[..., Program]) -> None:
    broken = weights(table=(V, K), up=(N, K), bias=(N,), down=(K, N))
    broken["down"][3, 4] = bad
    with pytest.raises(UsageError, match=f"down holds {kind}: it cannot be quantized"):
        quantize(program_of(two_layers, broken), Recipe(default="w8a16", rounding="rtn"))


def test_inputs_that_are_no_numbers_name_the_layer(program_of: Callable[..., Program]) -> None:
    huge = weights(table=(V, K), up=(N, K), bias=(N,), down=(K, N))
    huge["table"] *= 1e25
    with pytest.raises(UsageError, match="inputs of up NaN, Inf or too large to square"):
        quantize(
            program_of(two_layers, huge),
            Recipe(default="w4a16-g32", rounding="gptq", adapt=True),
            calibration=calibration(),
        )


@pytest.mark.parametrize("rounding", ["rtn", "gptq", "hqq"])
def test_the_same_input_gives_the_same_codes(rounding: Any, program: Program) -> None:
    other = program.copy()
    recipe = Recipe(default="w4a16-g32-asym", rounding=rounding, adapt=True)
    for each in (program, other):
        quantize(each, recipe, calibration=calibration())
    assert program.quantization == other.quantization
    for name, value in program.weights().items():
        assert torch.equal(value, other.weights()[name])


def test_gptq_measures_inputs_with_the_layers_before_quantized(program: Program) -> None:
    """The codes of the second layer follow the first layer's scheme; those of the first do not follow the second's."""
    found = {}
    for first in ("w8a16", "w3a16-channel"):
        for second in ("w4a16-channel", "w8a16"):
            copy = program.copy()
            recipe = Recipe(default=second, rounding="gptq", rules=(Rule(name="up", scheme=first),))
            quantize(copy, recipe, calibration=calibration())
            found[first, second] = [stored(copy, name).unpack().codes for name in ("up", "down")]
    assert torch.equal(found["w8a16", "w4a16-channel"][0], found["w8a16", "w8a16"][0])
    assert not torch.equal(found["w8a16", "w4a16-channel"][1], found["w3a16-channel", "w4a16-channel"][1])


@pytest.mark.parametrize(("scheme", "largest"), [("w8a8-static", 127.0), ("fp8-tensor", 448.0)])
def test_a_static_scale_covers_the_largest_calibrated_input(scheme: str, largest: float, program: Program) -> None:
    data = calibration()
    table = get_weight(program.module, "table")
    quantize(program, Recipe(default=scheme, rounding="rtn"), calibration=data)
    scale = get_weight(program.module, layers(program)["up"].constants["input_scale"])
    seen = table[torch.cat(data.samples)].abs().max() / largest
    torch.testing.assert_close(scale, seen.reshape(1))
    assert scale.dtype == torch.float32


def test_transposed_weights_are_said_to_be(program: Program) -> None:
    """GPT-2 stores [K, N]; canonicalize turns it, and the record says so."""
    program.layouts["up"] = "transposed"
    quantize(program, Recipe(default="w8a16", rounding="rtn"))
    assert layers(program)["up"].transposed and not layers(program)["down"].transposed
    assert layers(program)["up"].shape == (N, K)
