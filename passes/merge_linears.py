"""Compute linear layers of the same input in one: q, k and v; gate and up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ..runtime.manifest import RowsRecord
from ..runtime.ops.quantized import QuantizedWeight, StoredWeight
from ..runtime.scheme import QuantizationArgs
from .base import Pass, Result
from .graph import Program, add_weight, arguments, call, get_weight, remove_weight, value_of

aten, optc = torch.ops.aten, torch.ops.optc
_PARTS = ("weight", "scale", "zero", "bias")


@dataclass(frozen=True, kw_only=True)
class MergeLinears(Pass):
    """a = linear(x, A, bias_a); b = linear(x, B, bias_b)  ->
    ab = linear(x, [A; B], [bias_a; bias_b]); a = slice(ab, -1, 0, N_a); b = slice(ab, -1, N_a, N_a + N_b)

    and the same of optc.linear_quantized. Layers are merged whose weights are of one scheme and dtype, all or none of them
    with a bias, and used by nothing else. Rows do not change, so neither do the products.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})

    def apply(self, program: Program) -> Result:
        result = Result()
        alike: dict[tuple[Any, ...], list[fx.Node]] = {}
        for node in program.graph.nodes:
            if node.op == "call_function" and node.target in (aten.linear.default, optc.linear_quantized.default):
                if reason := _reason_to_leave(node):
                    result.decline(node, reason)
                else:
                    alike.setdefault(_kind(program, node), []).append(node)
        for nodes in alike.values():
            if len(nodes) > 1:
                _merge(program, nodes)
                result.matches += 1
        return result


def _weights(node: fx.Node) -> dict[str, fx.Node]:
    given = arguments(node)
    return {part: given[part] for part in _PARTS if given.get(part) is not None}


def _reason_to_leave(node: fx.Node) -> str | None:
    given = arguments(node)
    for part, weight in _weights(node).items():
        if weight.op != "get_attr":
            return f"its {part} is computed"
        if len(weight.users) > 1:
            return f"its {part} has other users"
    if given.get("group_index") is not None:
        return "its columns are in groups by an index"
    rows, _ = given.get("block", (1, 0))
    if rows != 1:
        return f"its rows share scales, {rows} at a time"
    return None


def _kind(program: Program, node: fx.Node) -> tuple[Any, ...]:
    """Equal for layers that can be merged."""
    given = arguments(node)
    parts = tuple((part, value_of(weight).dtype) for part, weight in _weights(node).items())
    step = given.get("input_scale")
    step = float(get_weight(program.module, str(step.target))) if step is not None else None
    how = (given.get("bits"), tuple(given.get("block", ())), given.get("activation"), step)
    return node.args[0] if node.target is aten.linear.default else given["x"], node.target, parts, how


def _merge(program: Program, nodes: list[fx.Node]) -> None:
    graph, first = program.graph, nodes[0]
    names = [{part: str(weight.target) for part, weight in _weights(node).items()} for node in nodes]
    rows = [int(value_of(node).shape[-1]) for node in nodes]
    merged = _merged_weights(program, nodes, names, rows)
    new_names = {part: f"{names[0][part]}_merged" for part in merged}
    for part, value in merged.items():
        old = [of_node[part] for of_node in names]
        records = tuple(
            RowsRecord(source=program.sources.get(name, name), layout=program.layouts.get(name, "plain"), rows=count)
            for name, count in zip(old, rows, strict=True)
        )
        layout = program.layouts.get(old[0], "plain")
        add_weight(program, new_names[part], value, records[0].source, layout=layout)
        if layout != "quantized":
            program.merged[new_names[part]] = records
    _rename_layers(program, names, new_names, rows)
    with graph.inserting_before(first):
        fresh = {part: graph.get_attr(name) for part, name in new_names.items()}
        given = arguments(first)
        operands = [fresh.get(a.name, given[a.name]) for a in first.target._schema.arguments]  # type: ignore[union-attr]
        out = call(graph, first.target, *operands)
        for key in ("nn_module_stack", "stack_trace"):
            if key in first.meta:
                out.meta[key] = first.meta[key]
        start = 0
        for node, count in zip(nodes, rows, strict=True):
            rows_of = call(graph, aten.slice.Tensor, out, value_of(node).dim() - 1, start, start + count)
            rows_of.meta.update({key: value for key, value in node.meta.items() if key != "val"})
            node.replace_all_uses_with(rows_of)
            start += count
    for node, of_node in zip(nodes, names, strict=True):
        weights = list(_weights(node).values())
        graph.erase_node(node)
        for weight in weights:
            graph.erase_node(weight)
        for name in of_node.values():
            remove_weight(program, name)


def _merged_weights(
    program: Program, nodes: list[fx.Node], names: list[dict[str, str]], rows: list[int]
) -> dict[str, Tensor]:
    values = [{part: get_weight(program.module, name).detach() for part, name in of.items()} for of in names]
    merged = {}
    if "bias" in values[0]:
        merged["bias"] = torch.cat([value["bias"] for value in values])
    if nodes[0].target is aten.linear.default:
        return {"weight": torch.cat([value["weight"] for value in values]), **merged}
    given = arguments(nodes[0])
    columns = int(value_of(given["x"]).shape[-1])
    args = _args(given, columns, symmetric=given["zero"] is None)
    parts = [
        StoredWeight(value["weight"], value["scale"], value.get("zero"), None, args, (count, columns)).unpack()
        for value, count in zip(values, rows, strict=True)
    ]
    zeros = [part.zero for part in parts if part.zero is not None]
    whole = QuantizedWeight(
        torch.cat([_movable(part.codes) for part in parts]).view(parts[0].codes.dtype),
        torch.cat([part.scale for part in parts]),
        torch.cat(zeros) if zeros else None,
        None,
        args,
    ).pack()
    found = {"weight": whole.weight, "scale": whole.scale, "zero": whole.zero, **merged}
    return {part: value for part, value in found.items() if value is not None}


def _movable(codes: Tensor) -> Tensor:
    """FP8 tensors cannot be concatenated everywhere; their bytes can."""
    return codes.view(torch.uint8) if codes.is_floating_point() else codes


def _args(given: dict[str, Any], columns: int, *, symmetric: bool) -> QuantizationArgs:
    """The scheme of a node's weight, as far as it decides how the weight is stored."""
    group = given["block"][1]
    return QuantizationArgs(
        num_bits=given["bits"],
        type="float" if value_of(given["weight"]).is_floating_point() else "int",
        symmetric=symmetric,
        strategy="group" if group < columns else "channel",
        group_size=group if group < columns else None,
    )


def _rename_layers(program: Program, names: list[dict[str, str]], new_names: dict[str, str], rows: list[int]) -> None:
    """The records of quantized weights say where their rows are now."""
    if program.quantization is None:
        return
    start_of, start = {}, 0
    for of_node, count in zip(names, rows, strict=True):
        start_of[of_node["weight"]] = start
        start += count
    old_to_new = {of_node[part]: new for of_node in names for part, new in new_names.items()}
    layers = tuple(
        layer.model_copy(
            update={
                "constants": {part: old_to_new.get(name, name) for part, name in layer.constants.items()},
                "first_row": start_of[layer.constants["codes"]],
            }
        )
        if layer.constants.get("codes") in start_of
        else layer
        for layer in program.quantization.layers
    )
    program.quantization = program.quantization.model_copy(update={"layers": layers})
