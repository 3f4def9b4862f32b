"""Programs as JSON: what goes in comes out, and what is not in the vocabulary is refused without running anything."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx

from optc.errors import ArtifactError
from optc.runtime.program import decode_program, encode_program, find_op, program_ops, write_program

aten = torch.ops.aten
WEIGHT = torch.arange(12, dtype=torch.float32).reshape(4, 3) / 7


def module_of(build: Any) -> fx.GraphModule:
    """A module with the input x and the weight `layer.weight`; `build(graph, x, weight)` gives the outputs."""
    root, graph = torch.nn.Module(), fx.Graph()
    root.layer = torch.nn.Module()
    root.layer.register_buffer("weight", WEIGHT)
    x, weight = graph.placeholder("x"), graph.get_attr("layer.weight")
    graph.output(tuple(build(graph, x, weight)))
    return fx.GraphModule(root, graph)


def through_json(module: fx.GraphModule, tmp_path: Path) -> dict[str, Any]:
    write_program(tmp_path / "program.json", encode_program(module, ["x"]))
    program: dict[str, Any] = json.loads((tmp_path / "program.json").read_text())
    return program


def program_with(*nodes: list[Any], outputs: Any = None) -> dict[str, Any]:
    return {
        "version": 1,
        "nodes": [["input", "x"], *nodes],
        "outputs": [{"$": len(nodes)}] if outputs is None else outputs,
    }


def decode(program: Any) -> fx.GraphModule:
    return decode_program(program, {"layer.weight": WEIGHT})[0]


def test_round_trip(tmp_path: Path) -> None:
    def build(graph: fx.Graph, x: fx.Node, weight: fx.Node) -> list[fx.Node]:
        rows = graph.call_function(aten.sym_size.int, (x, 0))
        twice = graph.call_function(torch.sym_max, (rows, 2))
        linear = graph.call_function(aten.linear.default, (x, weight))
        parts = graph.call_function(aten.split_with_sizes.default, (linear, [1, 3], -1))
        import operator

        first = graph.call_function(operator.getitem, (parts, 1))
        wide = graph.call_function(aten._to_copy.default, (first,), {"dtype": torch.float64})
        like = graph.call_function(
            aten.full.default, ([twice, 3], -math.inf), {"dtype": torch.float64, "device": torch.device("cpu")}
        )
        copied = graph.call_function(aten.clone.default, (like,), {"memory_format": torch.contiguous_format})
        return [graph.call_function(aten.maximum.default, (wide, copied)), first]

    module = module_of(build)
    program = through_json(module, tmp_path)
    decoded, names = decode_program(program, {"layer.weight": WEIGHT})
    assert names == ["x"]
    x = torch.randn(5, 3)
    for expected, found in zip(module(x), decoded(x), strict=True):
        assert expected.dtype == found.dtype
        assert torch.equal(expected, found)
    assert encode_program(decoded, ["x"])["nodes"][1] == ["constant", "constant_0"]


def test_round_trip_of_the_compiled_programs(artifact: Path) -> None:
    """Decoding and encoding again gives the same file, but for the names of the weights."""
    from optc.runtime.artifact import open_artifact

    opened = open_artifact(artifact)
    for spec in (opened.manifest.step, opened.manifest.score):
        program = opened.program(spec.file)
        module, names = decode_program(program, opened.constants())
        assert names == [item.name for item in spec.inputs]
        again = encode_program(module, names)
        assert [n for n in again["nodes"] if n[0] != "constant"] == [n for n in program["nodes"] if n[0] != "constant"]
        assert again["outputs"] == program["outputs"]


@given(value=st.one_of(st.floats(), st.integers(-(2**63), 2**63 - 1), st.booleans()))
def test_scalars_survive(value: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    def build(graph: fx.Graph, x: fx.Node, weight: fx.Node) -> list[fx.Node]:
        return [graph.call_function(aten.full.default, ([2], value), {"dtype": torch.float64})]

    program = through_json(module_of(build), tmp_path_factory.mktemp("program"))
    json.dumps(program, allow_nan=False)
    (found,) = decode(program)(torch.zeros(1))
    assert torch.equal(found, torch.full([2], value, dtype=torch.float64)) or math.isnan(value)
    assert math.isnan(value) == bool(found.isnan().all())


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool, torch.int64]
)
def test_dtypes_survive(dtype: torch.dtype, tmp_path: Path) -> None:
    def build(graph: fx.Graph, x: fx.Node, weight: fx.Node) -> list[fx.Node]:
        return [graph.call_function(aten._to_copy.default, (x,), {"dtype": dtype, "layout": torch.strided})]

    assert decode(through_json(module_of(build), tmp_path))(torch.ones(2))[0].dtype == dtype


def test_devices_are_replaced() -> None:
    program = program_with(["aten.zeros.default", [[2]], {"device": {"device": "cuda"}}])
    assert decode(program)(torch.ones(1))[0].device.type == "cpu"
    assert decode_program(program, {}, device="meta")[0](torch.ones(1))[0].device.type == "meta"


def test_constants_are_bound_not_copied() -> None:
    module = decode(program_with(["constant", "layer.weight"]))
    assert module(torch.ones(1))[0].data_ptr() == WEIGHT.data_ptr()


def test_ops_are_listed() -> None:
    program = program_with(
        ["optc.grouped_mm.default", [{"$": 0}, {"$": 0}, {"$": 0}], {}], ["aten.neg.default", [{"$": 1}], {}]
    )
    assert program_ops(program) == ["optc.grouped_mm.default"]


@pytest.mark.parametrize(
    "name",
    [
        "aten.from_file.default",  # reads files
        "aten.save.default",  # writes files (a TorchScript op, not in the dispatcher)
        "aten.add_.Tensor",  # mutates
        "aten.copy_.default",
        "aten.set_.source_Tensor",
        "aten.add.out",
        "aten._print.default",
        "aten.warn.default",
        "aten.manual_seed.default",
        "aten.backward.default",
        "aten.format.default",
        "aten.wait.default",
        "aten.dict.str",
        "aten.__class__.default",
        "aten.default.default",
        "aten.linear",
        "aten..",
        "aten.add.Tensor.x",
        "optc.no_such_op.default",
        "optc.__init__.default",
        "prim.Print.default",
        "prims.add.default",
        "os.system",
        "os.system.default",
        "builtins.eval.default",
        "torch.load",
        "size.__import__",
        "getattr",
        "",
        "aten.linear.default\nimport os",
        "__import__('os').system('true')",
    ],
)
def test_ops_outside_the_vocabulary(name: str) -> None:
    with pytest.raises(ArtifactError):
        find_op(name)
    with pytest.raises(ArtifactError):
        decode(program_with([name, [{"$": 0}], {}]))


def test_no_op_of_the_vocabulary_takes_a_file_name_or_gives_nothing() -> None:
    """Over every ATen op of this torch: what a program may call computes tensors or sizes, and knows no files."""
    accepted = 0
    for schema in torch._C._jit_get_all_schemas():
        namespace, _, name = schema.name.partition("::")
        if namespace != "aten":
            continue
        try:
            find_op(f"aten.{name}.{schema.overload_name or 'default'}")
        except ArtifactError:
            continue
        accepted += 1
        assert not schema.is_mutable, schema
        assert schema.returns, schema
        texts = {argument.name for argument in schema.arguments if "str" in str(argument.type)}
        assert not texts & {"filename", "file", "path"}, schema
        if not name.startswith("sym_"):
            assert {str(value.type) for value in schema.returns} <= {"Tensor", "List[Tensor]"}, schema
    assert accepted > 400


@pytest.mark.parametrize(
    "value",
    [
        {"dtype": "load"},
        {"dtype": "os"},
        {"dtype": "__class__"},
        {"layout": "float32"},
        {"memory_format": 3},
        {"float": "1e400"},
        {"float": "__import__"},
        {"code": "1"},
        {"$": 7},
        {"$": -1},
        {"$": "0"},
        {"$": True},
        {"$": 0, "dtype": "float32"},
        {},
        [[{"module": "os"}]],
    ],
)
def test_values_outside_the_vocabulary(value: Any) -> None:
    with pytest.raises(ArtifactError):
        decode(program_with(["aten.neg.default", [value], {}]))
    with pytest.raises(ArtifactError):
        decode(program_with(["aten.neg.default", [{"$": 0}], {"alpha": value}]))


def test_text_of_a_program_never_becomes_code(tmp_path: Path) -> None:
    """Names that would run, were they pasted into generated code."""
    marker = tmp_path / "ran"
    attack = f"x = __import__('pathlib').Path({str(marker)!r}).touch()"
    quoted = f"');{attack};('"
    attacks = [
        program_with(["aten.neg.default", [{"$": 0}], {attack: 1}]),
        program_with(["aten.neg.default", [{"$": 0}], {f"y=1); {attack}; (": 1}]),
        program_with(["aten.neg.default", [{"$": 0}], {"class": 1}]),
        program_with(["aten.neg.default", [{"$": 0}], {"None": 1}]),
        program_with([attack, [{"$": 0}], {}]),
        program_with(["constant", attack]),
        program_with(["input", attack], ["aten.neg.default", [{"$": 1}], {}]),
        program_with(["aten.einsum.default", [quoted, [{"$": 0}]], {}]),
        program_with(["aten.einsum.default", ["\n" + attack + "\n", [{"$": 0}]], {}]),
        program_with(["aten.neg.default", [{"$": 0}], {}], outputs=[attack, quoted, {"$": 1}]),
    ]
    for program in attacks:
        try:
            module = decode(program)
        except ArtifactError:
            continue
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            with contextlib.suppress(RuntimeError, TypeError):  # the op itself may refuse its arguments
                module(*[torch.ones(2)] * len(module.graph.find_nodes(op="placeholder")))
        assert not marker.exists()


GOOD = program_with(["constant", "layer.weight"], ["aten.linear.default", [{"$": 0}, {"$": 1}], {}])
BAD_PROGRAMS: list[Any] = [
    None,
    [],
    "program",
    {},
    {"version": 2, "nodes": [], "outputs": []},
    {"version": "1", "nodes": [], "outputs": []},
    {"version": 1},
    {"version": 1, "nodes": []},
    {"version": 1, "nodes": 3, "outputs": []},
    {"version": 1, "nodes": {"a": 1}, "outputs": []},
    {"version": 1, "nodes": [], "outputs": {"$": 0}},
    {"version": 1, "nodes": [], "outputs": 3},
    program_with([]),
    program_with([[], [], {}]),
    program_with([5, [], {}]),
    program_with(["aten.neg.default"]),
    program_with(["aten.neg.default", [{"$": 0}]]),
    program_with(["aten.neg.default", [{"$": 0}], []]),
    program_with(["aten.neg.default", {"$": 0}, {}]),
    program_with(["aten.neg.default", "xyz", {}]),
    program_with(["aten.neg.default", 3, {}]),
    program_with(["constant"]),
    program_with(["constant", ["a"]]),
    program_with(["constant", "no.such.weight"]),
    program_with(["input"]),
    program_with(["input", 5]),
]


@pytest.mark.parametrize("program", BAD_PROGRAMS, ids=[str(p)[:60] for p in BAD_PROGRAMS])
def test_malformed_programs(program: Any) -> None:
    with pytest.raises(ArtifactError):
        decode(program)


def test_deeply_nested_values() -> None:
    value: Any = {"$": 0}
    for _ in range(100_000):
        value = [value]
    with pytest.raises(ArtifactError):
        decode(program_with(["aten.neg.default", [value], {}]))


@given(data=st.data())
def test_damaged_programs_never_raise_anything_else(data: st.DataObject) -> None:
    """Replace a random part of a good program with a random JSON value."""
    scalars = (
        st.none()
        | st.booleans()
        | st.integers(-3, 9)
        | st.floats()
        | st.sampled_from(["", "$", "input", "aten.neg.default"])
    )
    anything = st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["$", "dtype", "x"]), inner),
    )
    program = copy.deepcopy(GOOD)
    owner: Any = program
    while True:
        key = data.draw(st.sampled_from(sorted(owner) if isinstance(owner, dict) else range(len(owner))))
        if not isinstance(owner[key], dict | list) or not owner[key] or data.draw(st.booleans()):
            owner[key] = data.draw(anything)
            break
        owner = owner[key]
    try:
        decode(program)
    except ArtifactError as error:
        assert str(error)


def test_encoding_refuses_what_a_program_cannot_say() -> None:
    def mutating(graph: fx.Graph, x: fx.Node, weight: fx.Node) -> list[fx.Node]:
        return [graph.call_function(aten.add_.Tensor, (x, x))]

    def foreign(graph: fx.Graph, x: fx.Node, weight: fx.Node) -> list[fx.Node]:
        return [graph.call_function(torch.relu, (x,))]

    def odd_value(graph: fx.Graph, x: fx.Node, weight: fx.Node) -> list[fx.Node]:
        return [graph.call_function(aten.full.default, ([2], 1j))]

    for build in (mutating, foreign, odd_value):
        with pytest.raises(ArtifactError):
            encode_program(module_of(build), ["x"])


def test_reference_result() -> None:
    x = torch.randn(2, 3)
    found: Tensor = decode(GOOD)(x)[0]
    assert torch.equal(found, torch.nn.functional.linear(x, WEIGHT))


@pytest.mark.parametrize(
    "name",
    ["aten.linear.default", "aten.add.Tensor", "aten.embedding.default", "aten.sym_size.int", "aten.cos.default",
     "aten.view.default", "aten.topk.default", "aten._to_copy.default", "optc.paged_attention.default"],
)  # fmt: skip
def test_ops_of_the_vocabulary(name: str) -> None:
    assert find_op(name) is not None


@pytest.mark.parametrize(
    "name",
    ["aten._sparse_csr_tensor_unsafe.default", "aten.sparse_coo_tensor.size", "aten.as_strided.default",
     "aten.empty.memory_format", "aten.rand.default", "aten.add_.Tensor", "aten.from_file.default",
     "aten._nested_tensor_from_mask.default", "aten.native_dropout.default"],
)  # fmt: skip
def test_ops_that_trust_their_arguments_are_outside(name: str) -> None:
    with pytest.raises(ArtifactError):
        find_op(name)
