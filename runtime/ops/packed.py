"""Linear layers whose weights lie as the CPU kernels read them: in panels of 32 outputs, streamed once a step.

    optc::linear_packed(x, weight, scale?, zero?, input_scale?, bias?, outputs, bits, group, activation)
    optc::linear_packed_a8(codes, steps, weight, scale, zero?, bias?, outputs, bits, group, dtype, activation)
    optc::embedding_packed(ids, weight, scale?, zero?, outputs, columns, bits, group, dtype)

A weight [N, K] becomes P = ceil(N / 32) panels, with zeros after its last row. A panel holds its columns in runs, and of
each run first those of outputs 0-15 and then those of outputs 16-31:

    4 bits    uint8 [P, ceil(K / 8), 128]   8 columns a run: a byte has column j in its low half and j + 4 in its high half
    8 bits    uint8, float8_e4m3fn [P, ceil(K / 4), 128]   4 columns a run
    16, 32    bfloat16 [P, ceil(K / 2), 64]   2 columns a run;   float16, float32 [P, K, 32]   one

Four bytes of an output lie together, as 8-bit dot products (VNNI, AMX) take them, and so do two bfloat16 numbers. Integer
codes c are stored as c + 2^(bits - 1). `scale` and `zero` are [P, groups, 32], a group `group` columns wide. Nothing
depends on the instruction set.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..scheme import QuantizationArgs
from .attention import LIBRARY
from .quantized import FP8, QuantizedWeight, quantize_activations

PANEL = 32
_HALF = 16


def _run(dtype: torch.dtype, bits: int) -> int:
    """Columns that lie together."""
    if dtype == torch.uint8:
        return 8 if bits == 4 else 4
    return {FP8: 4, torch.bfloat16: 2}.get(dtype, 1)


def pack_matrix(matrix: Tensor, bits: int) -> Tensor:
    """A matrix [N, K] in panels.

    Args:
        matrix: int8 codes of 4 or 8 bits, float8_e4m3fn codes, or bfloat16, float16 or float32 numbers.
        bits: of a code; ignored for floating numbers.
    """
    is_integer = matrix.dtype == torch.int8
    run = _run(torch.uint8 if is_integer else matrix.dtype, bits)
    rows, columns = matrix.shape
    padded = matrix.new_zeros(-(-rows // PANEL) * PANEL, -(-columns // run) * run)
    _as_bytes(padded)[:rows, :columns] = _as_bytes(matrix)
    if is_integer:
        padded = (padded.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    runs = _as_bytes(padded).view(-1, 2, _HALF, padded.shape[1] // run, run).permute(0, 3, 1, 2, 4)
    if run == 8:
        runs = runs[..., :4] | (runs[..., 4:] << 4)
    return runs.contiguous().flatten(2).view(padded.dtype)


def unpack_matrix(packed: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    """The inverse of `pack_matrix`: [rows, columns], integer codes as int8."""
    run = packed.shape[2] // PANEL  # by the shape: a bfloat16 weight may have been widened
    values = _as_bytes(packed).view(packed.shape[0], packed.shape[1], 2, _HALF, run)
    if packed.dtype == torch.uint8 and bits == 4:
        values = torch.cat([values & 15, values >> 4], dim=-1)
    matrix: Tensor = values.permute(0, 2, 3, 1, 4).reshape(packed.shape[0] * PANEL, -1)[:rows, :columns].contiguous()
    if packed.dtype == torch.uint8:
        codes: Tensor = (matrix.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
        return codes
    return matrix.view(packed.dtype)


def _as_bytes(tensor: Tensor) -> Tensor:
    """Copies and permutations of FP8 tensors are not implemented everywhere; those of bytes are."""
    return tensor.view(torch.uint8) if tensor.dtype == FP8 else tensor


def pack_groups(values: Tensor, rows: int, block_rows: int) -> Tensor:
    """Scales or zero points [ceil(rows / block_rows), groups] as [P, groups, 32], those of a block for each of its rows."""
    each = values if block_rows == 1 else values.repeat_interleave(block_rows, 0)[:rows]
    padded = each.new_zeros(-(-rows // PANEL) * PANEL, each.shape[1])
    padded[:rows] = each
    return padded.view(-1, PANEL, each.shape[1]).transpose(1, 2).contiguous()


def unpack_groups(packed: Tensor, rows: int, block_rows: int = 1) -> Tensor:
    """The inverse of `pack_groups`."""
    return packed.transpose(1, 2).reshape(-1, packed.shape[1])[:rows:block_rows].contiguous()


@dataclass(frozen=True)
class PackedWeight:
    """A quantized weight in panels: the operands of `optc::linear_packed`."""

    weight: Tensor
    scale: Tensor
    zero: Tensor | None
    group: int
    args: QuantizationArgs
    shape: tuple[int, int]

    @classmethod
    def pack(cls, weight: QuantizedWeight) -> PackedWeight:
        """Bit-exact: `unpack` undoes it. The weight must be one that `reason_not_to_pack` finds nothing about."""
        rows, columns = weight.codes.shape
        block_rows, group = weight.block
        zero = weight.zero
        return cls(
            pack_matrix(weight.codes, weight.args.num_bits),
            pack_groups(weight.scale, rows, block_rows),
            None if zero is None else pack_groups(zero, rows, block_rows),
            min(group, columns),
            weight.args,
            (rows, columns),
        )

    def unpack(self) -> QuantizedWeight:
        rows, columns = self.shape
        block_rows, _ = self.args.block(rows, columns)
        codes = unpack_matrix(self.weight, self.args.num_bits, rows, columns)
        zero = None if self.zero is None else unpack_groups(self.zero, rows, block_rows)
        return QuantizedWeight(codes, unpack_groups(self.scale, rows, block_rows), zero, None, self.args)


def reason_not_to_pack(weight: QuantizedWeight, activation: str) -> str | None:
    """Why the packed kernels are not for this weight; None if they are."""
    args, columns = weight.args, weight.codes.shape[1]
    group = min(weight.block[1], columns)
    if weight.group_index is not None:
        return "its columns are in groups by an index (act-order)"
    if args.num_bits not in (4, 8):
        return f"codes of {args.num_bits} bits"
    if activation.startswith("fp8"):
        return "FP8 activations"
    if group < columns and group % 8:
        return f"groups of {group} columns"
    if activation.startswith("int8") and args.type == "float":
        return "FP8 codes with integer activations"
    if activation.startswith("int8-group"):
        step = int(activation.removeprefix("int8-group"))
        if step < columns and (step % 8 or (group < columns and step % group and group % step)):
            return f"groups of {group} columns with activations in groups of {step}"
    return None


LIBRARY.define(
    "linear_packed(Tensor x, Tensor weight, Tensor? scale, Tensor? zero, Tensor? input_scale, Tensor? bias, int outputs, "
    "int bits, int group, str activation) -> Tensor"
)


def _dequantized(
    weight: Tensor, scale: Tensor | None, zero: Tensor | None, rows: int, columns: int, bits: int, group: int
) -> Tensor:
    """f32[rows, columns]."""
    values = unpack_matrix(weight, bits, rows, columns).float()
    if scale is None:
        return values

    def spread(packed: Tensor) -> Tensor:
        return unpack_groups(packed.float(), rows).repeat_interleave(group, 1)[:, :columns]

    return (values if zero is None else values - spread(zero)) * spread(scale)


def linear_packed_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
    outputs: int,
    bits: int,
    group: int,
    activation: str,
) -> Tensor:
    """X [..., K] times the transposed packed weight [outputs, K], plus bias [outputs] -> [..., outputs] in x's dtype.

    `activation` says how x is rounded first, as in `linear_quantized_reference`. Everything is float32 until the sum is
    rounded to x's dtype. A weight of floating numbers has no scale.
    """
    values = x.float() if activation == "none" else quantize_activations(x, activation, input_scale)
    matrix = _dequantized(weight, scale, zero, outputs, x.shape[-1], bits, group)
    return torch.nn.functional.linear(values, matrix, None if bias is None else bias.float()).to(x.dtype)


def _linear_packed_fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
    outputs: int,
    bits: int,
    group: int,
    activation: str,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


LIBRARY.impl("linear_packed", linear_packed_reference, "CompositeExplicitAutograd")
torch.library.register_fake("optc::linear_packed", _linear_packed_fake, lib=LIBRARY)


LIBRARY.define(
    "linear_packed_a8(Tensor codes, Tensor steps, Tensor weight, Tensor scale, Tensor? zero, Tensor? bias, int outputs, "
    "int bits, int group, ScalarType dtype, str activation) -> Tensor"
)


def linear_packed_a8_reference(
    codes: Tensor,
    steps: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    outputs: int,
    bits: int,
    group: int,
    dtype: torch.dtype,
    activation: str,
) -> Tensor:
    """`linear_packed` on activations that are rounded already.

    codes int8 [..., K], steps f32 [..., ceil(K / G)] of groups of G columns, as `activation` says; with the activation
    none, codes are numbers and steps [..., 1].
    """
    columns = codes.shape[-1]
    size = int(activation.removeprefix("int8-group")) if "group" in activation else columns
    values = codes.float() * steps.repeat_interleave(size, -1)[..., :columns]
    matrix = _dequantized(weight, scale, zero, outputs, columns, bits, group)
    return torch.nn.functional.linear(values, matrix, None if bias is None else bias.float()).to(dtype)


def _linear_packed_a8_fake(
    codes: Tensor,
    steps: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    outputs: int,
    bits: int,
    group: int,
    dtype: torch.dtype,
    activation: str,
) -> Tensor:
    return codes.new_empty(*codes.shape[:-1], outputs, dtype=dtype)


LIBRARY.impl("linear_packed_a8", linear_packed_a8_reference, "CompositeExplicitAutograd")
torch.library.register_fake("optc::linear_packed_a8", _linear_packed_a8_fake, lib=LIBRARY)


LIBRARY.define(
    "embedding_packed(Tensor ids, Tensor weight, Tensor? scale, Tensor? zero, int outputs, int columns, int bits, "
    "int group, ScalarType dtype) -> Tensor"
)


def embedding_packed_reference(
    ids: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    outputs: int,
    columns: int,
    bits: int,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows `ids` i64[...] of the packed table [outputs, columns] -> [..., columns] in `dtype`."""
    flat = ids.flatten()
    panels = flat // PANEL
    whole = _dequantized(  # all 32 rows of the panel of each id
        _as_bytes(weight)[panels].view(weight.dtype),
        None if scale is None else scale[panels],
        None if zero is None else zero[panels],
        len(flat) * PANEL,
        columns,
        bits,
        group,
    )
    picked = whole[torch.arange(len(flat), device=flat.device) * PANEL + flat % PANEL]
    return picked.to(dtype).view(*ids.shape, columns)


def _embedding_packed_fake(
    ids: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    outputs: int,
    columns: int,
    bits: int,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    return ids.new_empty(*ids.shape, columns, dtype=dtype)


LIBRARY.impl("embedding_packed", embedding_packed_reference, "CompositeExplicitAutograd")
torch.library.register_fake("optc::embedding_packed", _embedding_packed_fake, lib=LIBRARY)
