"""GPTQ, as AutoGPTQ and GPTQModel store it.

    qweight  i32[ceil(K * bits / 32), N]: the codes of a column packed from the lowest bit up, dense across words
    qzeros   i32[groups, ceil(N * bits / 32)], packed along N; format 1 stores each less one, wrapped at its bits
    scales   f16[groups, N]
    g_idx    i32[K]: the group of each column (act-order)

W = (code - zero) * scale, codes and zeros from 0 to 2^bits - 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import CheckpointError, UnsupportedModelError
from ...passes.quantize.given import GivenWeight
from ...runtime.ops.quantized import QuantizedWeight, unpack_bits
from .module import (
    SCALES,
    Format,
    QuantizedModule,
    describe_groups,
    groups_or_rows,
    index_of,
    integer,
    mapping,
    refuse_bits,
)

_FORMATS = {"gptq": 1, "gptq_v2": 2}


@dataclass(frozen=True, kw_only=True)
class GPTQ(Format):
    """A checkpoint of AutoGPTQ or GPTQModel.

    Attributes:
        bits, group_size: of modules without rules of their own; -1 is a row.
        version: of the format, which says how zeros are stored.
        dynamic: pattern of module names -> their bits and group size; those of a pattern "-:..." are not quantized.
    """

    leaves: ClassVar[frozenset[str]] = frozenset({"qweight", "qzeros", "scales", "g_idx"})

    bits: int
    group_size: int
    version: int
    dynamic: Mapping[str, Any]

    @classmethod
    def parse(cls, config: Mapping[str, Any], path: str) -> GPTQ:
        """Raises UnsupportedModelError: another layout or width."""
        layout = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
        if layout not in _FORMATS:
            raise UnsupportedModelError(
                f"{path}: GPTQ in the layout {layout}; optc reads {' and '.join(_FORMATS)}: take a checkpoint in one of "
                "those, or the unquantized one"
            )
        packed = str(config.get("pack_dtype") or "int32").removeprefix("torch.")
        if packed != "int32":
            raise UnsupportedModelError(f"{path}: GPTQ packed into {packed}; optc reads int32: take another checkpoint")
        bits, group_size = integer(config, "bits", path), integer(config, "group_size", path)
        dynamic = mapping(config, "dynamic", path)
        rules = [rule for rule in dynamic.values() if isinstance(rule, dict)]
        for width in (bits, *(integer(rule, "bits", path) for rule in rules if "bits" in rule)):
            refuse_bits(width, path, "GPTQ")
        label = f"GPTQ, {describe_groups(bits, group_size)}{', some modules otherwise' if rules else ''}"
        return cls(bits=bits, group_size=group_size, version=_FORMATS[layout], dynamic=dynamic, label=label)

    def is_coded(self, tensors: Mapping[str, str]) -> bool:
        return "qweight" in tensors

    def read(self, module: QuantizedModule) -> GivenWeight:
        bits, group_size = self._widths(module)
        qweight = module.take("qweight", (torch.int32,), (None, None))
        words, rows = qweight.shape
        columns, group_index = words * 32 // bits, None
        if "g_idx" in module:
            group_index = module.take("g_idx", (torch.int32, torch.int64), (None,)).to(torch.int32)
            columns = group_index.numel()
        module.take("qweight", (torch.int32,), (-(-columns * bits // 32), rows))
        size = columns if group_size < 0 else group_size
        groups = -(-columns // size)
        qzeros = module.take("qzeros", (torch.int32,), (groups, -(-rows * bits // 32)))
        scale = module.take("scales", SCALES, (groups, rows)).t().contiguous()
        if group_index is not None:
            group_index = index_of(group_index, size)
        zero = self._zeros(qzeros, bits, rows)
        is_symmetric = not zero.any()
        args = groups_or_rows(
            bits, None if group_size < 0 else group_size, symmetric=is_symmetric, has_index=group_index is not None
        )
        codes = unpack_bits(qweight.t().contiguous(), bits, columns)
        return GivenWeight(
            module.store(QuantizedWeight(codes, scale, None if is_symmetric else zero, group_index, args))
        )

    def _widths(self, module: QuantizedModule) -> tuple[int, int]:
        """Bits and group size of a module: the first rule that matches its name counts."""
        for pattern, rule in self.dynamic.items():
            if re.match(pattern.removeprefix("+:").removeprefix("-:"), module.name):
                if pattern.startswith("-:") or not isinstance(rule, dict):
                    raise CheckpointError(
                        f"{module.path}: {module.name} is quantized, and the rule {pattern!r} of quantization_config says "
                        "it is not; the config is for other weights"
                    )
                return rule.get("bits", self.bits), rule.get("group_size", self.group_size)
        return self.bits, self.group_size

    def _zeros(self, qzeros: Tensor, bits: int, rows: int) -> Tensor:
        """int8[N, groups], from -2^(bits - 1)."""
        half = 2 ** (bits - 1)
        stored = unpack_bits(qzeros, bits, rows).to(torch.int16) + half
        zero = (stored + 1) & (2 * half - 1) if self.version == 1 else stored
        signed: Tensor = (zero - half).to(torch.int8)
        return signed.t().contiguous()
