"""What every format needs: the tensors of one quantized module, and quantization_config read with care."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...errors import CheckpointError, UnsupportedModelError
from ...passes.quantize.given import GivenWeight
from ...runtime.ops.quantized import QuantizedWeight, StoredWeight
from ...runtime.scheme import QuantizationArgs

SCALES = (torch.float32, torch.float16, torch.bfloat16)
BITS = (3, 4, 8)


@dataclass(frozen=True)
class QuantizedModule:
    """The tensors of one module of a checkpoint, read when they are asked for.

    Attributes:
        path: the checkpoint.
        name: of the module, such as model.layers.0.mlp.up_proj.
        kind: its class in the model, such as Linear.
        tensors: the last part of a tensor's name -> what reads it.
    """

    path: str
    name: str
    kind: str
    tensors: Mapping[str, Callable[[], Tensor]] = field(repr=False)

    def __contains__(self, leaf: str) -> bool:
        return leaf in self.tensors

    def take(self, leaf: str, dtypes: tuple[torch.dtype, ...], *shapes: tuple[int | None, ...]) -> Tensor:
        """The tensor of this name, of one of the dtypes and of one of the shapes (None is any size).

        Raises:
            CheckpointError: it is missing, or of another dtype or shape.
        """
        if leaf not in self.tensors:
            there = ", ".join(sorted(self.tensors))
            raise CheckpointError(
                f"{self.path}: {self.name} has {there} and no {leaf}; the checkpoint is incomplete, download it again"
            )
        tensor = self.tensors[leaf]()
        fits = any(
            len(shape) == tensor.dim()
            and all(want in (None, size) for want, size in zip(shape, tensor.shape, strict=True))
            for shape in shapes
        )
        if tensor.dtype not in dtypes or not fits:
            wanted = " or ".join(f"[{', '.join('any' if n is None else str(n) for n in shape)}]" for shape in shapes)
            raise CheckpointError(
                f"{self.path}: {self.name}.{leaf} is {_short(tensor.dtype)} {list(tensor.shape)}, expected "
                f"{' or '.join(map(_short, dtypes))} {wanted}; quantization_config is for other weights, or they are damaged"
            )
        return tensor

    def groups(self, columns: int, group_size: int) -> int:
        """How many groups of `group_size` a row of `columns` has.

        Raises:
            CheckpointError: they do not divide it.
        """
        if columns % group_size:
            raise CheckpointError(
                f"{self.path}: {self.name} has {columns} inputs, which the groups of {group_size} in quantization_config do "
                "not divide; the config is for other weights"
            )
        return columns // group_size

    def store(self, weight: QuantizedWeight) -> StoredWeight:
        """The weight as an artifact holds it.

        Raises:
            CheckpointError: codes or group indices outside their range, or scales that are no numbers.
        """
        if weight.args.type == "int" and weight.args.num_bits < 8:
            limit = 2 ** (weight.args.num_bits - 1)
            if weight.codes.min() < -limit or weight.codes.max() >= limit:
                raise CheckpointError(f"{self.path}: {self.name} holds codes outside {weight.args.num_bits} bits")
        if not torch.isfinite(weight.scale).all():
            raise CheckpointError(f"{self.path}: {self.name} has scales that are NaN or Inf; download it again")
        stored = weight.pack()
        try:
            stored.check()
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {self.name}: {error}; the checkpoint is damaged") from error
        return stored


@dataclass(frozen=True, kw_only=True)
class Format(ABC):
    """One tool's way to store quantized weights, with the parameters of one checkpoint.

    Attributes:
        leaves: the tensors of a quantized module that `read` takes; its others, such as the bias, are as in any model.
        label: what the user calls it, such as AWQ, 4 bits, groups of 128.
        kv_cache: what the checkpoint says of the KV cache: int8, fp8 or nothing.
        notes: what is done otherwise than the config says.
    """

    leaves: ClassVar[frozenset[str]]

    label: str
    kv_cache: Literal["int8", "fp8"] | None = None
    notes: tuple[str, ...] = ()

    @abstractmethod
    def is_coded(self, tensors: Mapping[str, str]) -> bool:
        """Whether a module with these tensors, and their safetensors dtypes, is quantized."""

    @abstractmethod
    def read(self, module: QuantizedModule) -> GivenWeight:
        """The module's weight, its codes and scales to the bit.

        Raises:
            CheckpointError: a tensor is missing or is not what quantization_config says.
        """


def integer(config: Mapping[str, Any], key: str, path: str) -> int:
    """An integer of quantization_config.

    Raises:
        CheckpointError: it is missing or something else.
    """
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise CheckpointError(f"{path}: quantization_config has {key} {value!r}, expected an integer")
    return value


def mapping(config: Mapping[str, Any], key: str, path: str) -> Mapping[str, Any]:
    """A part of quantization_config; an empty one if it is not there.

    Raises:
        CheckpointError: it is no object.
    """
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: quantization_config has a {type(value).__name__} as {key}, expected an object")
    return value


def refuse_bits(bits: int, path: str, tool: str) -> None:
    """Raises UnsupportedModelError: optc has no codes of so many bits."""
    if bits not in BITS:
        raise UnsupportedModelError(
            f"{path}: {tool} with {bits} bits; optc reads {', '.join(map(str, BITS[:-1]))} and {BITS[-1]} bits: take one "
            "of those, or the unquantized checkpoint"
        )


def groups_or_rows(bits: int, group_size: int | None, *, symmetric: bool, has_index: bool = False) -> QuantizationArgs:
    """The scheme of integer codes with one scale for each group of a row, or for the row if there is no group size."""
    return QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy="channel" if group_size is None else "group",
        group_size=group_size,
        actorder="group" if has_index else None,
    )


def describe_groups(bits: int, group_size: int) -> str:
    return f"{bits} bits, {'one scale a row' if group_size < 0 else f'groups of {group_size}'}"


def index_of(found: Tensor, group_size: int) -> Tensor | None:
    """`found` i32[K] as a group index; none where it says what the order of the columns says too."""
    in_order = torch.arange(found.numel(), dtype=torch.int32) // group_size
    return None if torch.equal(found, in_order) else found.contiguous()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
