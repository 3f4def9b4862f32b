"""The program that passes rewrite, and the few graph operations they share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from ..runtime.manifest import KVCacheSpec, Layout, PanelsRecord, ProgramSpec, Quantization, RowsRecord, TensorSpec

# A distinct prime for each symbol: equal hints would be taken for the same symbol, 0 and 1 would be specialised.
_HINTS = (7, 3, 5, 11, 13, 17, 19, 23, 29, 31)


@dataclass
class Program:
    """A graph of ATen and optc ops with named inputs, and what is known about it.

    Attributes:
        module: placeholders in the order of `inputs`; weights are `get_attr` nodes whose target is the weight's name;
            the output is a tuple. Every node has `meta["val"]`.
        inputs: name, dtype and shape of each placeholder; a symbolic dimension is a name in `symbols`.
        symbols: range of each symbol, both ends included.
        outputs: name of each output.
        kv_cache: geometry of each layer's cache, in the order of the layers.
        sources: checkpoint name of each weight; a weight made by a pass names what it was made from.
        layouts: how a weight made by a pass lies beside its source; all others are plain.
        merged: of a weight that several were merged into: what its rows are, in order.
        panels: how a weight lies in panels; all others are not packed.
        quantization: what was quantized; none before that pass.
    """

    module: fx.GraphModule
    inputs: list[TensorSpec]
    symbols: dict[str, tuple[int, int]]
    outputs: tuple[str, ...]
    kv_cache: list[KVCacheSpec] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    layouts: dict[str, Layout] = field(default_factory=dict)
    merged: dict[str, tuple[RowsRecord, ...]] = field(default_factory=dict)
    panels: dict[str, PanelsRecord] = field(default_factory=dict)
    quantization: Quantization | None = None

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def spec(self, file: str) -> ProgramSpec:
        return ProgramSpec(file=file, inputs=tuple(self.inputs), symbols=dict(self.symbols), outputs=self.outputs)

    def weights(self) -> dict[str, Tensor]:
        """The weights that the graph uses, by name, in the order of their first use."""
        return {node.target: get_weight(self.module, node.target) for node in self.graph.find_nodes(op="get_attr")}

    def copy(self) -> Program:
        """An independent graph over the same weights."""
        graph = fx.Graph()
        output = graph.graph_copy(self.graph, {})
        graph.output(output)
        return Program(
            fx.GraphModule(self.module, graph),
            list(self.inputs),
            dict(self.symbols),
            self.outputs,
            list(self.kv_cache),
            dict(self.sources),
            dict(self.layouts),
            dict(self.merged),
            dict(self.panels),
            self.quantization,
        )


def get_weight(module: torch.nn.Module, name: str) -> Tensor:
    """The weight or buffer of this dotted name."""
    owner, _, leaf = name.rpartition(".")
    value = getattr(module.get_submodule(owner), leaf)
    assert isinstance(value, Tensor)
    return value


def add_weight(program: Program, name: str, value: Tensor, source: str, *, layout: Layout = "plain") -> None:
    """Register `value` as a weight that `get_attr` nodes can name, made from the checkpoint's `source`."""
    owner, _, leaf = name.rpartition(".")
    parent: torch.nn.Module = program.module
    for part in owner.split(".") if owner else ():
        if not hasattr(parent, part):
            parent.add_module(part, torch.nn.Module())
        parent = getattr(parent, part)
    parent.register_buffer(leaf, value)
    program.sources[name] = source
    program.layouts[name] = layout


def set_weight(program: Program, name: str, value: Tensor, *, layout: Layout) -> None:
    """Put `value` in the place of a weight, for all nodes that name it; a copied program keeps the weight it has."""
    owner, _, leaf = name.rpartition(".")
    module = program.module.get_submodule(owner)
    delattr(module, leaf)
    module.register_buffer(leaf, value)
    program.sources.setdefault(name, name)
    program.layouts[name] = layout


def remove_weight(program: Program, name: str) -> None:
    """Forget a weight that no node names any more; a copied program keeps it."""
    owner, _, leaf = name.rpartition(".")
    delattr(program.module.get_submodule(owner), leaf)
    program.sources.pop(name, None)
    program.layouts.pop(name, None)


def add_input(program: Program, spec: TensorSpec) -> fx.Node:
    """A new last placeholder."""
    last = program.graph.find_nodes(op="placeholder")[-1]
    with program.graph.inserting_after(last):
        node = program.graph.placeholder(spec.name.replace(".", "_"))
    program.inputs.append(spec)
    return node


def input_node(program: Program, name: str) -> fx.Node:
    """The placeholder of this input."""
    position = [spec.name for spec in program.inputs].index(name)
    node: fx.Node = program.graph.find_nodes(op="placeholder")[position]
    return node


def value_of(node: Any) -> Tensor:
    """The fake tensor of a node: its dtype and shape."""
    assert isinstance(node, fx.Node)
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value


@contextmanager
def replacing(graph: fx.Graph, node: fx.Node) -> Iterator[list[fx.Node]]:
    """Insert before `node`; append the node that takes its place to the list. Its metadata goes along."""
    result: list[fx.Node] = []
    with graph.inserting_before(node):
        yield result
    (new,) = result
    for key in ("nn_module_stack", "stack_trace", "val"):
        if key in node.meta:
            new.meta.setdefault(key, node.meta[key])
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an op call by name, however they were spelled, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    formal = node.target._schema.arguments
    defaults = {argument.name: argument.default_value for argument in formal if argument.has_default_value()}
    positional = dict(zip((argument.name for argument in formal), node.args, strict=False))
    return {**defaults, **positional, **node.kwargs}


def call(graph: fx.Graph, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
    return graph.call_function(op, args, kwargs)


def propagate(program: Program) -> None:
    """Recompute `meta["val"]` of every node from the inputs' specs.

    Raises:
        RuntimeError: an op refuses the shapes or dtypes it is given.
    """
    shape_env = ShapeEnv()
    mode = FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=True)
    hints = dict(zip(program.symbols, _HINTS, strict=False))
    values: dict[fx.Node, Any] = {}
    placeholders = iter(program.inputs)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node] = _fake_input(next(placeholders), hints, mode)
        elif node.op == "get_attr":
            values[node] = mode.from_tensor(get_weight(program.module, node.target), static_shapes=True)
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            # Without the Python dispatcher some ops would take their sizes as plain integers and so fix the symbols.
            with mode, enable_python_dispatcher():
                values[node] = node.target(*args, **kwargs)
        node.meta["val"] = values.get(node)


def _fake_input(spec: TensorSpec, hints: dict[str, int], mode: FakeTensorMode) -> Tensor:
    sizes = [hints[dim] if isinstance(dim, str) else dim for dim in spec.shape]
    kinds = [DimDynamic.DUCK if isinstance(dim, str) else DimDynamic.STATIC for dim in spec.shape]
    return mode.from_tensor(
        torch.empty(sizes, dtype=getattr(torch, spec.dtype)),
        symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds),
        source=ConstantSource(f"input_{spec.name.replace('.', '_')}"),
    )


def to_text(program: Program) -> str:
    """The graph as text, one line a node with dtype and shape; symbols by the order of their appearance."""
    names: dict[str, str] = {}

    def describe(value: Any) -> str:
        if isinstance(value, Tensor):
            dims = ", ".join(_dim_name(dim, names) for dim in value.shape)
            return f"{str(value.dtype).removeprefix('torch.')}[{dims}]"
        if isinstance(value, tuple | list):
            return "(" + ", ".join(describe(item) for item in value) + ")"
        return _dim_name(value, names)

    lines = []
    for node in program.graph.nodes:
        arguments = ", ".join([*map(str, node.args), *(f"{key}={value}" for key, value in node.kwargs.items())])
        what = node.target if node.op in ("get_attr", "placeholder") else str(node.target)
        lines.append(f"{node.name}: {describe(node.meta.get('val'))} = {node.op} {what}({arguments})")
    return "\n".join(lines) + "\n"


def _dim_name(dim: Any, names: dict[str, str]) -> str:
    if not isinstance(dim, torch.SymInt):
        return str(dim)
    return names.setdefault(str(dim), f"s{len(names)}")
