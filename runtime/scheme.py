"""Quantization schemes: what is stored, never how it was chosen or how it is computed.

The vocabulary is that of compressed-tensors' `quantization_config`, so that a manifest, an exported checkpoint and the
configs of other tools say the same thing in the same words. A scheme also has a short name, `find_scheme` knows them:

    w8a16, w8a8, w8a8-static                INT8 weights, one scale a row; activations as they are, 8 bits a token, static
    w8a16-g32                               INT8 weights, one scale for 32 weights of a row
    w4a16-g128, w4a16-g32-asym, w4a16-channel     INT4 weights; `asym` has zero points; group 32, 64, 128 or a row
    w4a8-g128, ...                          the same with 8-bit activations, one scale a token; w3a16-...: three bits
    w4a8g-g128, w8a8g-channel, ...          8-bit activations, one scale for each group of columns that the weights have (128
                                            columns where they have one scale a row): what CPU kernels take
    fp8-weight                              E4M3 weights, one scale a row
    fp8-tensor, fp8-dynamic, fp8-block      E4M3 weights and activations: one static scale each; a row and a token; 128x128
"""

from __future__ import annotations

import difflib
import re
from typing import Literal

from ..errors import UsageError
from .record import Record

Strategy = Literal["tensor", "channel", "group", "block", "token"]


class QuantizationArgs(Record):
    """How one tensor is quantized.

    Attributes:
        num_bits: bits of a code.
        type: int (two's complement) or float (8 bits: E4M3).
        symmetric: whether code 0 means 0; if not, every scale has a zero point.
        strategy: which elements share a scale: tensor (all), channel (a row), group (`group_size` of a row), block
            (`block_structure`), token (activations: a token).
        group_size: elements of a row that share a scale, for strategy group.
        block_structure: rows and columns that share a scale, for strategy block.
        dynamic: activations: the scale is computed from the data of every step; else it is stored.
        actorder: weights: `group` says that a column's group is looked up in a group index.
    """

    num_bits: int = 8
    type: Literal["int", "float"] = "int"
    symmetric: bool = True
    strategy: Strategy = "channel"
    group_size: int | None = None
    block_structure: tuple[int, int] | None = None
    dynamic: bool = False
    actorder: Literal["group"] | None = None

    def block(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of a [rows, columns] tensor that share a scale."""
        match self.strategy:
            case "tensor":
                return rows, columns
            case "group":
                assert self.group_size is not None
                return 1, self.group_size
            case "block":
                assert self.block_structure is not None
                return self.block_structure
        return 1, columns

    @property
    def bits_per_weight(self) -> float:
        """Bits of a code with its share of a group's 16-bit scale and zero point; a whole row's share is next to none."""
        if self.group_size is None:
            return float(self.num_bits)
        return self.num_bits + (16 + (0 if self.symmetric else self.num_bits)) / self.group_size

    def code_range(self) -> tuple[int, int]:
        """Smallest and largest integer code.

        Symmetric INT8 leaves -128 out, as integer dot products on every kind of hardware want it.
        """
        lowest = -(2 ** (self.num_bits - 1))
        return (lowest + 1 if self.num_bits == 8 and self.symmetric else lowest), 2 ** (self.num_bits - 1) - 1


class Scheme(Record):
    """What becomes of a linear layer: its weights, and the activations that go into it."""

    weights: QuantizationArgs
    input_activations: QuantizationArgs | None = None

    @property
    def activation(self) -> str:
        """The activations' quantization as the op `optc::linear_quantized` names it."""
        found = self.input_activations
        if found is None:
            return "none"
        kind = {"token": "token", "tensor": "static", "group": f"group{found.group_size}"}[found.strategy]
        return f"{'int8' if found.type == 'int' else 'fp8'}-{kind}"


GROUPS = (32, 64, 128)
_INT8_TOKEN = QuantizationArgs(strategy="token", dynamic=True)
_INT8_STATIC = QuantizationArgs(strategy="tensor")
_FP8 = QuantizationArgs(type="float")
_FIXED = {
    "w8a16": Scheme(weights=QuantizationArgs()),
    "w8a8": Scheme(weights=QuantizationArgs(), input_activations=_INT8_TOKEN),
    "w8a8-static": Scheme(weights=QuantizationArgs(), input_activations=_INT8_STATIC),
    "fp8-weight": Scheme(weights=_FP8),
    "fp8-tensor": Scheme(
        weights=_FP8.model_copy(update={"strategy": "tensor"}),
        input_activations=_FP8.model_copy(update={"strategy": "tensor"}),
    ),
    "fp8-dynamic": Scheme(
        weights=_FP8, input_activations=_FP8.model_copy(update={"strategy": "token", "dynamic": True})
    ),
    "fp8-block": Scheme(
        weights=_FP8.model_copy(update={"strategy": "block", "block_structure": (128, 128)}),
        input_activations=_FP8.model_copy(update={"strategy": "group", "group_size": 128, "dynamic": True}),
    ),
}
_GROUPED = re.compile(r"w([348])a(8|8g|16)-(?:g(32|64|128)|channel)(-asym)?")
_ACTIVATION_GROUP = 128  # of weights that have none


def scheme_names() -> list[str]:
    """Every name that `find_scheme` knows."""
    widths = ["w8a16", "w8a8g", "w4a16", "w4a8", "w4a8g", "w3a16"]
    grouped = [f"{width}-g{group}" for width in widths for group in GROUPS]
    grouped += [f"{width}-channel" for width in widths if width != "w8a16"]
    return [*_FIXED, *(name for base in grouped for name in (base, f"{base}-asym"))]


def find_scheme(name: str) -> Scheme:
    """The scheme of this name.

    Raises:
        UsageError: there is none; lists names like it.
    """
    if name in _FIXED:
        return _FIXED[name]
    if name not in scheme_names():
        near = difflib.get_close_matches(name, scheme_names(), n=4, cutoff=0.4) or list(_FIXED)
        raise UsageError(
            f"unknown scheme {name!r}; names like it: {', '.join(near)}; `optc targets --schemes` lists all"
        )
    found = _GROUPED.fullmatch(name)
    assert found is not None
    bits, activation, group, asymmetric = found.groups()
    weights = QuantizationArgs(
        num_bits=int(bits),
        symmetric=not asymmetric,
        strategy="group" if group else "channel",
        group_size=int(group) if group else None,
    )
    grouped = QuantizationArgs(strategy="group", group_size=weights.group_size or _ACTIVATION_GROUP, dynamic=True)
    return Scheme(weights=weights, input_activations={"16": None, "8": _INT8_TOKEN, "8g": grouped}[activation])
