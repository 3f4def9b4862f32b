"""Quantized weights: how they are stored, what they mean, and the ops that use them.

    optc::linear_quantized(x, weight, scale, zero?, group_index?, input_scale?, bias?, bits, block, activation)
    optc::grouped_mm_quantized(x, weight, scale, zero?, group_index?, input_scale?, offsets, bits, block, activation)
    optc::embedding_quantized(ids, weight, scale, zero?, group_index?, columns, bits, block, dtype)

A stored weight [N, K] is

    weight  int8[N, K] (8 bits), float8_e4m3fn[N, K], or int32[N, ceil(K * bits / 32)] (fewer bits): codes + 2^(bits-1),
            packed from the lowest bit up and densely across words, as compressed-tensors' pack-quantized format has it
    scale   floating [ceil(N / block[0]), ceil(K / block[1])]
    zero    none; or of the scale's shape: int8, int32 (fewer bits: packed as above, along the rows), or floating (HQQ)
    group_index   none, or i32[K]: the group of each column (GPTQ's act-order), instead of column // block[1]

and means  W = (code - zero) * scale, in float32. `dequantize` is that, and the oracle of every kernel. The weights of
experts are one matrix too, theirs one below the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..scheme import QuantizationArgs
from .attention import LIBRARY

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_CODES_AT_ONCE = 2**22  # that are packed or unpacked: the work takes 25 bytes each


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix [N, K] as codes, before it is packed.

    Attributes:
        codes: int8[N, K] within `args.code_range()`, or float8_e4m3fn[N, K].
        scale: floating [ceil(N / rows), ceil(K / columns)] of `args.block(N, K)`.
        zero: none if symmetric; of the scale's shape: int8 in the codes' range, or floating.
        group_index: i32[K], only where a column's group is not column // group_size.
        args: the scheme of the weight.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    group_index: Tensor | None
    args: QuantizationArgs

    def dequantize(self) -> Tensor:
        """f32[N, K]."""
        return dequantize_codes(self.codes, self.scale, self.zero, self.group_index, self.block)

    @property
    def block(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return self.args.block(rows, columns)

    def pack(self) -> StoredWeight:
        """The weight as it is stored. Bit-exact: `StoredWeight.unpack` undoes it."""
        bits = self.args.num_bits
        codes = self.codes if bits == 8 else pack_bits(self.codes, bits)
        zero = self.zero
        if zero is not None and not zero.is_floating_point() and bits < 8:
            zero = pack_bits(zero.t(), bits).t().contiguous()
        return StoredWeight(codes, self.scale, zero, self.group_index, self.args, (*self.codes.shape,))


@dataclass(frozen=True)
class StoredWeight:
    """A matrix [N, K] as the module docstring describes it: what an artifact holds and the ops take."""

    weight: Tensor
    scale: Tensor
    zero: Tensor | None
    group_index: Tensor | None
    args: QuantizationArgs
    shape: tuple[int, int]

    def unpack(self) -> QuantizedWeight:
        bits, columns = self.args.num_bits, self.shape[1]
        codes = self.weight if bits == 8 else unpack_bits(self.weight, bits, columns)
        zero = _unpacked_zero(self.zero, bits, self.scale.shape[0])
        return QuantizedWeight(codes, self.scale, zero, self.group_index, self.args)

    def dequantize(self) -> Tensor:
        """f32[N, K]."""
        return self.unpack().dequantize()

    def tensors(self) -> dict[str, Tensor]:
        """The parts that are there, by the suffix of their constants' names."""
        parts = {
            "codes": self.weight,
            "scale": self.scale,
            "zero": self.zero,
            "group_index": self.group_index,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def check(self) -> None:
        """Raises ValueError: a part has another shape or dtype than the scheme says."""
        bits, (rows, columns) = self.args.num_bits, self.shape
        block = self.args.block(rows, columns)
        row_blocks, groups = -(-rows // block[0]), -(-columns // block[1])
        kind = FP8 if self.args.type == "float" else torch.int8 if bits == 8 else torch.int32
        width = columns if bits == 8 else -(-columns * bits // 32)
        _expect("codes", self.weight, (kind,), (rows, width))
        _expect("scale", self.scale, _FLOATS, (row_blocks, groups))
        if (self.zero is None) != self.args.symmetric:
            found, scheme = ("missing", "asymmetric") if self.zero is None else ("there", "symmetric")
            raise ValueError(f"zero is {found}, but the scheme is {scheme}")
        if self.zero is not None:
            kind = torch.int8 if bits == 8 else torch.int32
            words = row_blocks if self.zero.dtype != torch.int32 else -(-row_blocks * bits // 32)
            _expect("zero", self.zero, (kind, *_FLOATS), (words, groups))
        if self.group_index is not None:
            _expect("group_index", self.group_index, (torch.int32,), (columns,))
            if int(self.group_index.min()) < 0 or int(self.group_index.max()) >= groups:
                raise ValueError(f"group_index names a group outside 0 to {groups - 1}")

    def num_bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.tensors().values())


def _expect(part: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, int] | tuple[int]) -> None:
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
        raise ValueError(f"{part} is {tensor.dtype} {list(tensor.shape)}, expected {dtypes[0]} {list(shape)}")


def _unpacked_zero(zero: Tensor | None, bits: int, row_blocks: int) -> Tensor | None:
    if zero is None or zero.dtype != torch.int32:
        return zero
    return unpack_bits(zero.t(), bits, row_blocks).t().contiguous()


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes int8[R, C] in [-2^(bits-1), 2^(bits-1)) -> int32[R, ceil(C * bits / 32)], low bits first, dense."""
    at_once = max(1, _CODES_AT_ONCE // max(1, codes.shape[1]))
    return torch.cat([_pack_rows(part, bits) for part in codes.split(at_once)])


def _pack_rows(codes: Tensor, bits: int) -> Tensor:
    rows, columns = codes.shape
    words = -(-columns * bits // 32)
    values = codes.to(torch.int64) + 2 ** (bits - 1)
    packed = torch.zeros(rows, words + 1, dtype=torch.int64, device=codes.device)
    # A code that straddles two words is split by 64-bit arithmetic: its high part goes to the next word.
    position = torch.arange(columns, device=codes.device) * bits
    word, shifted = position // 32, values << (position % 32)
    packed.index_add_(1, word, shifted & 0xFFFFFFFF)
    packed.index_add_(1, word + 1, shifted >> 32)
    low = packed[:, :words]
    return torch.where(low >= 2**31, low - 2**32, low).to(torch.int32)


def unpack_bits(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_bits`: int32[R, W] -> int8[R, columns]."""
    at_once = max(1, _CODES_AT_ONCE // max(1, columns))
    return torch.cat([_unpack_rows(part, bits, columns) for part in packed.split(at_once)])


def _unpack_rows(packed: Tensor, bits: int, columns: int) -> Tensor:
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
        narrow: Tensor = (packed[:, :, None] >> shifts) & (2**bits - 1)
        return narrow.flatten(1)[:, :columns].sub(2 ** (bits - 1)).to(torch.int8)
    wide: Tensor = torch.nn.functional.pad(packed.to(torch.int64) & 0xFFFFFFFF, (0, 1))
    position = torch.arange(columns, device=packed.device) * bits
    word = position // 32
    values: Tensor = ((wide[:, word] | (wide[:, word + 1] << 32)) >> (position % 32)) & (2**bits - 1)
    return values.sub(2 ** (bits - 1)).to(torch.int8)


def dequantize_codes(
    codes: Tensor, scale: Tensor, zero: Tensor | None, group_index: Tensor | None, block: tuple[int, int]
) -> Tensor:
    """(code - zero) * scale, f32[N, K]; `codes` unpacked, `zero` unpacked or floating."""
    rows, columns = codes.shape

    def spread(values: Tensor) -> Tensor:
        values = values.float()
        if block[0] != 1:
            values = values.repeat_interleave(block[0], 0)[:rows]
        if group_index is not None:
            return values[:, group_index.long()]
        return values if values.shape[1] == 1 else values.repeat_interleave(block[1], 1)[:, :columns]

    values: Tensor = codes.float()
    if zero is not None:
        values = values - spread(zero)
    return values * spread(scale)


LIBRARY.define(
    "linear_quantized(Tensor x, Tensor weight, Tensor scale, Tensor? zero, Tensor? group_index, Tensor? input_scale, "
    "Tensor? bias, int bits, int[] block, str activation) -> Tensor"
)


def linear_quantized_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_index: Tensor | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
    bits: int,
    block: list[int],
    activation: str,
) -> Tensor:
    """X [..., K] times the transposed stored weight [N, K], plus bias [N] -> [..., N] in x's dtype.

    `activation` is none, or says how x is rounded first: {int8,fp8}-token (one scale a row of x, its largest magnitude
    over 127 or 448), {int8,fp8}-groupG (the same for each G columns), {int8,fp8}-static (`input_scale`, one number).
    Everything is float32 until the sum is rounded to x's dtype; the dequantized weight is not rounded.
    """
    codes = unpack_bits(weight, bits, x.shape[-1]) if weight.dtype == torch.int32 else weight
    zero = _unpacked_zero(zero, bits, scale.shape[0])
    dequantized = dequantize_codes(codes, scale, zero, group_index, (block[0], block[1]))
    values = x.float() if activation == "none" else quantize_activations(x, activation, input_scale)
    return torch.nn.functional.linear(values, dequantized, None if bias is None else bias.float()).to(x.dtype)


def quantize_activations(x: Tensor, activation: str, input_scale: Tensor | None) -> Tensor:
    """X [..., K] rounded to 8 bits and back, f32; see `linear_quantized_reference`. A row of zeros stays zeros."""
    kind, _, how = activation.partition("-")
    largest = 127.0 if kind == "int8" else FP8_MAX
    values = x.float()
    if how == "static":
        assert input_scale is not None
        steps = input_scale.float()
    else:
        group = int(how.removeprefix("group")) if how != "token" else x.shape[-1]
        padded = torch.nn.functional.pad(values, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))
        steps = padded.abs().amax(dim=-1) / largest
        steps = torch.where(steps > 0, steps, torch.ones_like(steps)).repeat_interleave(group, -1)[..., : x.shape[-1]]
    scaled = (values / steps).clamp(-largest, largest)
    return (scaled.round() if kind == "int8" else scaled.to(FP8).float()) * steps


def _linear_quantized_fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_index: Tensor | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
    bits: int,
    block: list[int],
    activation: str,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


LIBRARY.impl("linear_quantized", linear_quantized_reference, "CompositeExplicitAutograd")
torch.library.register_fake("optc::linear_quantized", _linear_quantized_fake, lib=LIBRARY)


LIBRARY.define(
    "grouped_mm_quantized(Tensor x, Tensor weight, Tensor scale, Tensor? zero, Tensor? group_index, Tensor? input_scale, "
    "Tensor offsets, int bits, int[] block, str activation) -> Tensor"
)


def grouped_mm_quantized_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_index: Tensor | None,
    input_scale: Tensor | None,
    offsets: Tensor,
    bits: int,
    block: list[int],
    activation: str,
) -> Tensor:
    """X [S, K] with rows sorted by expert, stored weight [G * N, K], offsets i32[G] (end of each expert's rows) -> [S, N].

    Rows at or after offsets[G - 1] belong to no expert; they are zero. The rest is as in `linear_quantized_reference`. Only
    the weights of experts that have rows are expanded.
    """
    outputs = _outputs_of_expert(weight, offsets)
    values = x.float() if activation == "none" else quantize_activations(x, activation, input_scale)
    out = x.new_zeros(x.shape[0], outputs)
    zero = _unpacked_zero(zero, bits, scale.shape[0])
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            rows = torch.arange(expert * outputs, (expert + 1) * outputs, device=weight.device)
            matrix = _dequantize_rows(rows, weight, scale, zero, group_index, x.shape[1], bits, block)
            out[start:end] = (values[start:end] @ matrix.t()).to(x.dtype)
        start = end
    return out


def _outputs_of_expert(weight: Tensor, offsets: Tensor) -> int:
    rows, experts = weight.shape[0], offsets.shape[0]
    if experts == 0 or rows % experts:
        raise ValueError(f"grouped_mm_quantized: {rows} rows of weight for {experts} experts, expected a multiple")
    return rows // experts


def _grouped_mm_quantized_fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_index: Tensor | None,
    input_scale: Tensor | None,
    offsets: Tensor,
    bits: int,
    block: list[int],
    activation: str,
) -> Tensor:
    return x.new_empty(x.shape[0], _outputs_of_expert(weight, offsets))


LIBRARY.impl("grouped_mm_quantized", grouped_mm_quantized_reference, "CompositeExplicitAutograd")
torch.library.register_fake("optc::grouped_mm_quantized", _grouped_mm_quantized_fake, lib=LIBRARY)


LIBRARY.define(
    "embedding_quantized(Tensor ids, Tensor weight, Tensor scale, Tensor? zero, Tensor? group_index, int columns, "
    "int bits, int[] block, ScalarType dtype) -> Tensor"
)


def embedding_quantized_reference(
    ids: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_index: Tensor | None,
    columns: int,
    bits: int,
    block: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """Rows `ids` i64[...] of the stored weight [V, columns] -> [..., columns] in `dtype`. Only these are expanded."""
    zero = _unpacked_zero(zero, bits, scale.shape[0])
    values = _dequantize_rows(ids.flatten(), weight, scale, zero, group_index, columns, bits, block)
    return values.to(dtype).reshape(*ids.shape, columns)


def _dequantize_rows(
    rows: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_index: Tensor | None,
    columns: int,
    bits: int,
    block: list[int],
) -> Tensor:
    """Rows i64[R] of a stored weight, `zero` unpacked or floating -> f32[R, columns]."""
    codes = unpack_bits(weight[rows], bits, columns) if weight.dtype == torch.int32 else weight[rows]
    row_blocks = rows // block[0]
    zero = None if zero is None else zero[row_blocks]
    return dequantize_codes(codes, scale[row_blocks], zero, group_index, (1, block[1]))


def _embedding_quantized_fake(
    ids: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_index: Tensor | None,
    columns: int,
    bits: int,
    block: list[int],
    dtype: torch.dtype,
) -> Tensor:
    return scale.new_empty(*ids.shape, columns, dtype=dtype)


LIBRARY.impl("embedding_quantized", embedding_quantized_reference, "CompositeExplicitAutograd")
torch.library.register_fake("optc::embedding_quantized", _embedding_quantized_fake, lib=LIBRARY)
