"""Tokens may meet in attention alone: what makes it right to pack tokens of many sequences into one call."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from ..errors import UnsupportedModelError
from ..passes.graph import Program, input_node
from ..runtime.vocabulary import is_known_op

# Ops that carry information along the token dimension.
_MIXING = {
    "cumsum",
    "cumprod",
    "conv1d",
    "convolution",
    "roll",
    "flip",
    "scan",
    "while_loop",
    "scaled_dot_product_attention",
}
# Ops for which an integer argument only says which rows to take or put, as the experts of a mixture do.
_ROW_MOVES = {"index", "index_put", "gather", "scatter", "index_add", "index_select", "scatter_add", "index_copy"}


def check_token_flow(program: Program, who: str) -> None:
    """Refuse graphs in which tokens influence each other outside attention, or that count positions themselves."""
    if (node := _reduces_positions(program)) is not None:
        raise UnsupportedModelError(
            f"{who}: {_module_of(node)} looks at all positions together (aten.{_packet(node)}), which in a batch are those "
            "of many sequences; optc does not support that"
        )
    for node in program.graph.nodes:
        packet = _packet(node)
        if free_unbacked_symbols(node.meta["val"]):
            raise UnsupportedModelError(
                f"{who}: {_module_of(node)} has shapes that depend on the values of data (aten.{packet}), which optc does "
                "not support"
            )
        if node.users and isinstance(node.target, torch._ops.OpOverload) and not is_known_op(node.target):
            raise UnsupportedModelError(
                f"{who}: {_module_of(node)} calls {node.target}, which is outside the vocabulary of portable programs"
            )
        if packet in _MIXING and _runs_along_tokens(node):
            raise UnsupportedModelError(
                f"{who}: {_module_of(node)} combines tokens with aten.{packet} outside attention; such layers have a state "
                "of their own, which optc does not support"
            )
        if packet == "arange" and _runs_along_tokens(node) and _counts_positions(node):
            raise UnsupportedModelError(
                f"{who}: {_module_of(node)} counts positions itself (aten.arange) instead of using position ids; optc does not support that"
            )


def _reduces_positions(program: Program) -> fx.Node | None:
    """The first node that makes one value of all positions, such as the length of the data."""
    made_of_positions = {input_node(program, "positions")}
    node: fx.Node
    for node in program.graph.nodes:
        if not isinstance(node.meta.get("val"), Tensor):
            continue
        inputs = {n for n in node.all_input_nodes if n.op != "get_attr" and isinstance(n.meta["val"], Tensor)}
        if not inputs or not inputs <= made_of_positions:
            continue
        if not _has_tokens(node):
            return node
        made_of_positions.add(node)
    return None


def _packet(node: fx.Node) -> str:
    return getattr(getattr(node.target, "overloadpacket", None), "__name__", "")


def _has_tokens(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape)


def _runs_along_tokens(node: fx.Node) -> bool:
    if _packet(node) in ("cumsum", "cumprod") and _has_tokens(node):
        return isinstance(node.meta["val"].shape[node.args[1]], torch.SymInt)
    return _has_tokens(node)


def _counts_positions(arange: fx.Node) -> bool:
    """Whether a count of tokens reaches values or masks, rather than only moving rows around."""
    pending, seen = list(arange.users), {arange}
    while pending:
        node = pending.pop()
        value = node.meta.get("val")
        if node in seen or not isinstance(value, Tensor):
            continue
        seen.add(node)
        if value.dtype.is_floating_point or value.dtype == torch.bool:
            if _packet(node) not in _ROW_MOVES:
                return True
        else:
            pending += node.users
    return False


def _module_of(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return str(next(reversed(stack.values()))[0]) if stack else "the model"
