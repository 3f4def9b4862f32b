"""One sample on its way through a program: its values, and where they lie while they wait for later nodes."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from ...errors import UsageError
from ...runtime.ops.quantized import quantize_activations
from ..graph import Program, get_weight
from ..verify import float32_arguments, widen

aten, optc = torch.ops.aten, torch.ops.optc


class MemoryBudget:
    """Bytes of activations in memory, the limit, and the folder for what is past it."""

    def __init__(self, limit: int, folder: Path) -> None:
        self.limit, self.folder, self.used = limit, folder, 0

    def hold(self, value: Any) -> Any:
        """The value, without what it is a view of; past the limit, a tensor in a file."""
        if not isinstance(value, Tensor) or value.numel() == 0:
            return value
        size = value.numel() * value.element_size()
        if self.used + size <= self.limit:
            self.used += size
            return value.clone() if value._base is not None else value
        try:
            return _Spilled(value, self.folder)
        except OSError as error:
            raise UsageError(
                f"{self.folder.parent} has no room for {size} bytes of activations: {error.strerror}; set TMPDIR to a folder "
                "on a larger disk, or calibrate on fewer samples"
            ) from None


class _Spilled:
    """A tensor in a file, which is gone once nothing refers to it. Not a mapped one: that would count as memory in use.

    Raises:
        OSError: the disk is full.
    """

    def __init__(self, value: Tensor, folder: Path) -> None:
        self._shape, self._dtype = value.shape, value.dtype
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".bin", delete=False) as file:
            self._path = file.name
            self._finalizer = weakref.finalize(self, Path(file.name).unlink, missing_ok=True)
            file.write(value.contiguous().view(-1).view(torch.uint8).numpy().data)

    def load(self) -> Tensor:
        buffer = bytearray(Path(self._path).read_bytes())
        return torch.frombuffer(buffer, dtype=self._dtype).view(self._shape)


def _loaded(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(map(_loaded, value))
    return value.load() if isinstance(value, _Spilled) else value


class Environment:
    """One sample's values."""

    def __init__(self, program: Program, tokens: Tensor, budget: MemoryBudget, float32: bool) -> None:
        given = {"input_ids": tokens[None], "positions": torch.arange(len(tokens))[None]}
        self._inputs = [given[spec.name] for spec in program.inputs]
        self._module, self._budget, self._float32 = program.module, budget, float32
        self._values: dict[fx.Node, Any] = {}
        self._held: dict[fx.Node, int] = {}

    def copy(self) -> Environment:
        """The same values; what is done with the copy leaves them as they are."""
        copied = object.__new__(Environment)
        copied.__dict__ |= self.__dict__ | {"_values": dict(self._values), "_held": {}, "_inputs": list(self._inputs)}
        return copied

    def run(
        self,
        nodes: list[fx.Node],
        replaced: Mapping[str, Tensor],
        keep: set[fx.Node],
        activations: Mapping[str, str] = MappingProxyType({}),
    ) -> Tensor:
        """Run the nodes and give the last one's value; afterwards only the values in `keep` are held."""
        last_use = {used: node for node in nodes for used in node.all_input_nodes}
        held = {used: self._values[used] for used in last_use if used in self._values}
        self._values |= {used: _loaded(value) for used, value in held.items()}
        for node in nodes:
            self._values[node] = (
                self._inputs.pop(0) if node.op == "placeholder" else self._call(node, replaced, activations)
            )
            for used in node.all_input_nodes:
                if last_use[used] is node and used not in keep:
                    self._drop(used)
        result: Tensor = self._values[nodes[-1]]
        for node in list(self._values):
            if node not in keep:
                self._drop(node)
            elif node not in self._held:
                self._hold(node)
            elif node in held:
                self._values[node] = held[node]
        return result

    def _call(self, node: fx.Node, replaced: Mapping[str, Tensor], activations: Mapping[str, str]) -> Any:
        weights = {used: str(used.target) for used in node.all_input_nodes if used.op == "get_attr"}
        known = {
            used: replaced[name] if name in replaced else get_weight(self._module, name)
            for used, name in weights.items()
        }
        if self._float32:
            known = {used: widen(value) for used, value in known.items()}
        arguments: Any = fx.node.map_arg((node.args, node.kwargs), (self._values | known).__getitem__)
        args, kwargs = float32_arguments(arguments) if self._float32 else arguments
        if node.target is optc.attention.default:
            return _attention(*args)
        if is_linear(node):
            activation = activations.get(weight_behind(node.args[1]), "none")
            if activation != "none":
                args = (quantize_activations(args[0], activation, None).to(args[0].dtype), *args[1:])
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _drop(self, node: fx.Node) -> None:
        self._values.pop(node, None)
        self._budget.used -= self._held.pop(node, 0)

    def _hold(self, node: fx.Node) -> None:
        """Account for a value that stays, one tensor or several; past the limit, move it into a file."""
        value, budget = self._values[node], self._budget
        before = budget.used
        if isinstance(value, tuple | list):
            self._values[node] = type(value)(budget.hold(part) for part in value)
        else:
            self._values[node] = budget.hold(value)
        self._held[node] = budget.used - before


def is_linear(node: fx.Node) -> bool:
    return node.target in (aten.linear.default, optc.grouped_mm.default)


def weight_behind(node: Any) -> str:
    """The weight that an argument is, or is a view of; nothing if it is something else."""
    origin = node.all_input_nodes[0] if is_of_weights(node) else node
    return str(origin.target) if origin.op == "get_attr" else ""


def _attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float, sinks: Tensor | None, layer: int
) -> Tensor:
    """`optc::attention`; where it is plain causal attention, by PyTorch's kernel, which is faster than the reference."""
    if softcap > 0 or sinks is not None or 0 < window < q.shape[2]:
        result: Tensor = optc.attention.default(q, k, v, scale, window, softcap, sinks, layer)
        return result
    grouped = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return grouped.transpose(1, 2).contiguous()  # as the op gives it: views follow


def is_of_weights(node: fx.Node) -> bool:
    used = node.all_input_nodes
    return node.op == "call_function" and bool(used) and all(weight.op == "get_attr" for weight in used)
