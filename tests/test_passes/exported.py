"""Programs of modules that are no language models, as `torch.export` spells them, for the tests of fusion passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from optc.passes.base import Pass, run_passes
from optc.passes.canonicalize import Canonicalize
from optc.passes.graph import Program, get_weight, propagate
from optc.runtime.manifest import PassRecord, TensorSpec


class Function(nn.Module):
    """A module that applies `f(self, *inputs)`, with weights as attributes."""

    def __init__(self, f: Callable[..., Any], **weights: Tensor) -> None:
        super().__init__()
        self.f = f
        for name, value in weights.items():
            setattr(self, name, nn.Parameter(value, requires_grad=False))

    def forward(self, *inputs: Tensor) -> Any:
        return self.f(self, *inputs)


def export(module: nn.Module, *inputs: Tensor) -> Program:
    """The module as a canonical program of static shapes whose outputs are all that it returns."""
    with torch.no_grad():
        exported = torch.export.export(module.eval(), inputs, strict=False).run_decompositions({})
    found = exported.module(check_guards=False)
    graph = fx.Graph()
    graph.output(graph.graph_copy(found.graph, {}))
    result = graph.output_node().args[0]
    graph.output_node().args = (tuple(result) if isinstance(result, tuple | list) else (result,),)
    names = [node.name for node in graph.find_nodes(op="placeholder")]
    specs = [
        TensorSpec(name=name, dtype=str(x.dtype).removeprefix("torch."), shape=tuple(x.shape))
        for name, x in zip(names, inputs, strict=True)
    ]
    program = Program(fx.GraphModule(found, graph), specs, {}, ("logits",))
    for node in graph.find_nodes(op="get_attr"):
        assert get_weight(program.module, node.target) is not None
        program.sources[node.target] = node.target
    propagate(program)
    run_passes(program, [Canonicalize()])
    return program


def fuse(program: Program, item: Pass) -> PassRecord:
    (record,) = run_passes(program, [item], facts={"canonical", "paged"})
    return record


def ops(program: Program) -> dict[str, int]:
    """How often each op occurs."""
    counts: dict[str, int] = {}
    for node in program.graph.nodes:
        if node.op == "call_function":
            counts[str(node.target)] = counts.get(str(node.target), 0) + 1
    return counts
