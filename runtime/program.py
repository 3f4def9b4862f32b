"""Programs as JSON: a flat list of calls to a closed vocabulary of ops, and back to a callable graph.

A program file is data. It can name weights, the ops of `vocabulary.py` and integer arithmetic on
sizes, and nothing else: reading one runs no code from it (no pickle, and the names in it never reach generated code).

    {"version": 1,
     "nodes": [["input", "input_ids"], ["constant", "model.embed_tokens.weight"],
               ["aten.embedding.default", [{"$": 1}, {"$": 0}], {}], ...],
     "outputs": [{"$": 17}]}

A node is referred to by its index, {"$": i}. Values JSON cannot say are tagged: {"dtype": "float32"},
{"device": "cpu"}, {"float": "inf"}, {"layout": "strided"}, {"memory_format": "contiguous_format"}.
"""

from __future__ import annotations

import json
import keyword
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import ArtifactError
from . import ops as _ops
from .vocabulary import SIZE_FUNCTIONS, is_known_op

PROGRAM_VERSION = 1

_SIZE_NAMES = {function: name for name, function in SIZE_FUNCTIONS.items()}


def op_name(target: Any) -> str:
    """The name of a call target in a program file.

    Raises:
        ArtifactError: the target is outside the vocabulary.
    """
    if isinstance(target, torch._ops.OpOverload):
        if is_known_op(target):
            return f"{target.namespace}.{target._schema.name.split('::')[1]}.{target._overloadname}"
    elif target in _SIZE_NAMES:
        return _SIZE_NAMES[target]
    raise ArtifactError(f"the program calls {target}, which is outside the vocabulary of portable programs")


def find_op(name: str) -> Callable[..., Any]:
    """The op that a program file calls `name`.

    Raises:
        ArtifactError: no such op in this runtime, or one outside the vocabulary.
    """
    if name in SIZE_FUNCTIONS:
        return SIZE_FUNCTIONS[name]
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    if namespace in ("aten", "optc") and packet.isidentifier() and overload.isidentifier():
        op = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
        if isinstance(op, torch._ops.OpOverload) and is_known_op(op):
            return op
        raise ArtifactError(
            f"the program needs the op {name}, which this runtime (torch {torch.__version__}) lacks; "
            "update optc and torch to the versions in the manifest, or recompile with `optc compile`"
        )
    raise ArtifactError(f"the program calls {name!r}, which is outside the vocabulary of portable programs")


def _encode(value: Any, index: Mapping[fx.Node, int]) -> Any:
    match value:
        case fx.Node():
            return {"$": index[value]}
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"float": str(value)}
        case list() | tuple():
            return [_encode(item, index) for item in value]
        case torch.dtype():
            return {"dtype": str(value).removeprefix("torch.")}
        case torch.device():
            return {"device": value.type}
        case torch.layout():
            return {"layout": str(value).removeprefix("torch.")}
        case torch.memory_format():
            return {"memory_format": str(value).removeprefix("torch.")}
    raise ArtifactError(f"a program cannot hold a value of type {type(value).__name__}: {value!r}")


def encode_program(module: fx.GraphModule, input_names: list[str]) -> dict[str, Any]:
    """`module` as a JSON-able program.

    Args:
        module: placeholders in the order of `input_names`, constants as `get_attr` nodes, one output that is a tuple.
        input_names: the public name of each placeholder.

    Raises:
        ArtifactError: an op or a value outside the vocabulary.
    """
    index: dict[fx.Node, int] = {}
    nodes: list[list[Any]] = []
    outputs: list[Any] = []
    names = iter(input_names)
    for node in module.graph.nodes:
        if node.op == "output":
            outputs = _encode(node.args[0], index)
            continue
        index[node] = len(nodes)
        if node.op == "placeholder":
            nodes.append(["input", next(names)])
        elif node.op == "get_attr":
            nodes.append(["constant", node.target])
        else:
            kwargs = {key: _encode(value, index) for key, value in node.kwargs.items()}
            nodes.append([op_name(node.target), _encode(list(node.args), index), kwargs])
    return {"version": PROGRAM_VERSION, "nodes": nodes, "outputs": outputs}


def write_program(path: Path, program: dict[str, Any]) -> None:
    lines = ",\n  ".join(json.dumps(node) for node in program["nodes"])
    body = f'{{"version": {program["version"]},\n "nodes": [\n  {lines}],\n "outputs": {json.dumps(program["outputs"])}}}\n'
    path.write_text(body, encoding="utf-8")


class _Decoder:
    """Builds an fx graph from a program. Node names are made here, so that no text of the file becomes code."""

    def __init__(self, program: Mapping[str, Any], device: torch.device) -> None:
        self.program, self.device = program, device
        self.graph = fx.Graph()
        self.nodes: list[fx.Node] = []
        self.inputs: list[str] = []
        self.constants: dict[str, str] = {}

    def value(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.value(item) for item in value]
        if not isinstance(value, dict):
            return value
        (tag, content), *rest = value.items()
        if not rest:
            if tag == "$" and type(content) is int and 0 <= content < len(self.nodes):
                return self.nodes[content]
            if tag == "device":
                return self.device
            if tag == "float" and content in ("inf", "-inf", "nan"):
                return float(content)
            kind = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}.get(tag)
            found = getattr(torch, content, None) if kind and isinstance(content, str) else None
            if kind and isinstance(found, kind):
                return found
        raise ArtifactError(f"a program holds the value {value!r}, which is not in its vocabulary")

    def build(self, constants: Mapping[str, Tensor]) -> tuple[fx.GraphModule, list[str]]:
        root = torch.nn.Module()
        for kind, *content in self.program["nodes"]:
            if kind == "input":
                if not isinstance(content[0], str):
                    raise ArtifactError(f"the program has an input called {content[0]!r}")
                node = self.graph.placeholder(f"input_{len(self.inputs)}")
                self.inputs.append(content[0])
            elif kind == "constant":
                name = content[0]
                if name not in constants:
                    raise ArtifactError(f"the program needs the constant {name!r}, which the artifact does not hold")
                attribute = self.constants.setdefault(name, f"constant_{len(self.constants)}")
                root.register_buffer(attribute, constants[name], persistent=False)
                node = self.graph.get_attr(attribute)
            else:
                args, kwargs = self.value(content[0]), {key: self.value(v) for key, v in content[1].items()}
                if not isinstance(args, list) or not all(
                    key.isidentifier() and not keyword.iskeyword(key) for key in kwargs
                ):
                    raise ArtifactError(f"the program calls {kind} with the arguments {args} and {sorted(kwargs)}")
                node = self.graph.call_function(find_op(kind), tuple(args), kwargs)
            self.nodes.append(node)
        self.graph.output(tuple(self.value(self.program["outputs"])))
        return fx.GraphModule(root, self.graph), self.inputs


def decode_program(
    program: Mapping[str, Any], constants: Mapping[str, Tensor], device: torch.device | str = "cpu"
) -> tuple[fx.GraphModule, list[str]]:
    """A program back as a callable graph, and the names of its inputs in order.

    Args:
        program: as `encode_program` made it.
        constants: the tensor of every constant; they are bound, not copied.
        device: replaces every device the program names.

    Raises:
        ArtifactError: not a program of this version, an op this runtime lacks, or a value outside the vocabulary.
    """
    version = program.get("version") if isinstance(program, dict) else None
    if version != PROGRAM_VERSION:
        raise ArtifactError(f"program version {version!r}; this runtime reads {PROGRAM_VERSION}")
    try:
        return _Decoder(program, torch.device(device)).build(constants)
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ArtifactError(f"malformed program: {error}") from error


def program_ops(program: Mapping[str, Any]) -> list[str]:
    """Names of the optc ops that `program` calls, sorted."""
    return sorted({node[0] for node in program["nodes"] if node[0].startswith("optc.")})


__all__ = ["decode_program", "encode_program", "find_op", "is_known_op", "op_name", "program_ops", "write_program"]
assert _ops.attention  # importing the ops registers them; a program cannot be decoded without
