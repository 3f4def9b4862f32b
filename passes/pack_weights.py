"""Lay weights out as the CPU kernels read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ..runtime.manifest import PanelsRecord
from ..runtime.ops.packed import PackedWeight, pack_matrix, reason_not_to_pack
from ..runtime.ops.quantized import QuantizedWeight, StoredWeight
from ..runtime.scheme import QuantizationArgs
from .base import Pass, Result
from .graph import Program, arguments, call, get_weight, replacing, set_weight, value_of

aten, optc = torch.ops.aten, torch.ops.optc
_LINEAR, _EMBEDDING = aten.linear.default, aten.embedding.default
_LINEAR_QUANTIZED, _EMBEDDING_QUANTIZED = optc.linear_quantized.default, optc.embedding_quantized.default
_TAKES_WEIGHT = (_LINEAR, _EMBEDDING, _LINEAR_QUANTIZED, _EMBEDDING_QUANTIZED)
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, kw_only=True)
class PackWeights(Pass):
    """linear(x, weight [N, K], bias)  ->  optc.linear_packed(x, panels, none, none, none, bias, N, bits, 0, "none")
    optc.linear_quantized(x, codes, scale, zero, ...)  ->  optc.linear_packed(x, panels, scale, zero, ..., activation)
    optc.embedding_quantized(ids, codes, scale, zero, ...), and embedding(weight, ids) of a weight that a linear layer uses
    too  ->  optc.embedding_packed(ids, panels, scale, zero, ...)

    A weight takes the same number of bytes as before and keeps its name; `runtime/ops/packed.py` has the layout. All uses
    of a weight change together, or none do. Bit-exact, as `runtime/unpack.py` is its inverse.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    provides: ClassVar[frozenset[str]] = frozenset({"packed"})

    def apply(self, program: Program) -> Result:
        result = Result()
        for name, users in _users_of_matrices(program).items():
            linears = [user for user in users if user.target in (_LINEAR, _LINEAR_QUANTIZED)]
            if not linears:  # rows are looked up: they are best left together
                continue
            if reason := _reason_to_leave(program, name, users):
                result.decline(linears[0], reason)
                continue
            if linears[0].target is _LINEAR:
                _pack_float(program, name, users)
            else:
                _pack_quantized(program, name, users)
            result.matches += len(users)
        return result


def _users_of_matrices(program: Program) -> dict[str, list[fx.Node]]:
    """For each weight that is the matrix of a linear layer or an embedding: all nodes that use it."""
    users: dict[str, list[fx.Node]] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        users.setdefault(str(node.target), []).extend(node.users)
    return {name: nodes for name, nodes in users.items() if any(_matrix_name(node) == name for node in nodes)}


def _matrix_name(node: fx.Node) -> str | None:
    if node.target not in _TAKES_WEIGHT:
        return None
    weight = arguments(node)["weight"]
    return str(weight.target) if weight.op == "get_attr" else None


def _reason_to_leave(program: Program, name: str, users: Sequence[fx.Node]) -> str | None:
    for user in users:
        if _matrix_name(user) != name:
            return f"its weight is also used by {user.name}"
    kinds = {user.target in (_LINEAR, _EMBEDDING) for user in users}
    assert len(kinds) == 1  # codes have other dtypes than floats
    if users[0].target in (_LINEAR, _EMBEDDING):
        weight = get_weight(program.module, name)
        dtypes = {value_of(user).dtype for user in users} | {weight.dtype}
        fits = weight.dtype in _FLOATS and weight.dim() == 2 and len(dtypes) == 1
        return None if fits else f"its weight is {weight.dtype} {list(weight.shape)}"
    parts = {tuple(str(arguments(user)[part]) for part in ("scale", "zero")) for user in users}
    if len(parts) > 1:
        return "its codes have several scales"
    for user in users:
        activation = arguments(user).get("activation", "none")
        if activation.endswith("static") and arguments(user).get("input_scale") is None:
            return "a static activation without its scale"
        if reason := reason_not_to_pack(_quantized(program, user), activation):
            return reason
    return None


def _quantized(program: Program, node: fx.Node) -> QuantizedWeight:
    given = arguments(node)

    def part(which: str) -> Tensor | None:
        return get_weight(program.module, str(given[which].target)).detach() if given[which] is not None else None

    codes, scale, zero = part("weight"), part("scale"), part("zero")
    assert codes is not None and scale is not None
    is_linear = node.target is _LINEAR_QUANTIZED
    columns = int(value_of(given["x"]).shape[-1]) if is_linear else given["columns"]
    shape, block = (int(codes.shape[0]), columns), given["block"]
    args = QuantizationArgs(
        num_bits=given["bits"],
        type="float" if codes.is_floating_point() else "int",
        symmetric=zero is None,
        strategy="block",
        block_structure=(block[0], block[1]),
    )
    return StoredWeight(codes, scale, zero, part("group_index"), args, shape).unpack()


def _pack_float(program: Program, name: str, users: Sequence[fx.Node]) -> None:
    weight = get_weight(program.module, name).detach()
    rows, columns = weight.shape
    bits = 8 * weight.element_size()
    _put(program, name, pack_matrix(weight, bits), PanelsRecord(kind="matrix", bits=bits, rows=rows, columns=columns))
    for user in users:
        given = arguments(user)
        matrix = given["weight"]
        with replacing(program.graph, user) as new:
            if user.target is _LINEAR:
                operands = (given["input"], matrix, None, None, None, given["bias"], rows, bits, 0, "none")
                new.append(call(program.graph, optc.linear_packed.default, *operands))
            else:
                how = (rows, columns, bits, 0, weight.dtype)
                new.append(
                    call(program.graph, optc.embedding_packed.default, given["indices"], matrix, None, None, *how)
                )


def _pack_quantized(program: Program, name: str, users: Sequence[fx.Node]) -> None:
    first = arguments(users[0])
    quantized = _quantized(program, users[0])
    packed = PackedWeight.pack(quantized)
    (rows, columns), bits = packed.shape, first["bits"]
    groups = PanelsRecord(kind="groups", bits=bits, rows=rows, columns=columns)
    _put(program, name, packed.weight, PanelsRecord(kind="matrix", bits=bits, rows=rows, columns=columns))
    _put(program, str(first["scale"].target), packed.scale, groups)
    if packed.zero is not None:
        _put(program, str(first["zero"].target), packed.zero, groups)
    for user in users:
        given: dict[str, Any] = arguments(user)
        parts = (given["weight"], given["scale"], given["zero"])
        with replacing(program.graph, user) as new:
            if user.target is _LINEAR_QUANTIZED:
                rest = (given["input_scale"], given["bias"], rows, bits, packed.group, given["activation"])
                new.append(call(program.graph, optc.linear_packed.default, given["x"], *parts, *rest))
            else:
                how = (rows, columns, bits, packed.group, given["dtype"])
                new.append(call(program.graph, optc.embedding_packed.default, given["ids"], *parts, *how))


def _put(program: Program, name: str, value: Tensor, record: PanelsRecord) -> None:
    set_weight(program, name, value, layout=program.layouts.get(name, "plain"))
    program.panels[name] = record
