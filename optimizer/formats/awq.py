"""AutoAWQ's GEMM layout.

    qweight  i32[K, N / 8]: column 8c + ORDER[i] of the codes in bits 4i to 4i + 3 of word c
    qzeros   i32[K / group, N / 8], packed likewise
    scales   f16[K / group, N]

W = (code - zero) * scale, codes and zeros from 0 to 15.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import UnsupportedModelError
from ...passes.quantize.given import GivenWeight
from ...runtime.ops.quantized import QuantizedWeight, unpack_bits
from .module import SCALES, Format, QuantizedModule, describe_groups, groups_or_rows, integer

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, kw_only=True)
class AWQ(Format):
    """A checkpoint of AutoAWQ, or of a tool that writes its GEMM layout."""

    leaves: ClassVar[frozenset[str]] = frozenset({"qweight", "qzeros", "scales"})

    group_size: int

    @classmethod
    def parse(cls, config: Mapping[str, Any], path: str) -> AWQ:
        """Raises UnsupportedModelError: another layout or width."""
        layout = str(config.get("version") or config.get("format") or config.get("checkpoint_format") or "gemm").lower()
        if layout != "gemm" or config.get("backend") == "llm-awq":
            raise UnsupportedModelError(
                f"{path}: AWQ in the layout {config.get('backend') if layout == 'gemm' else layout}; optc reads gemm: take a "
                "checkpoint in that, or the unquantized one"
            )
        bits, group_size = integer(config, "bits", path), integer(config, "group_size", path)
        if bits != 4:
            raise UnsupportedModelError(f"{path}: AWQ with {bits} bits; the gemm layout has 4: take another checkpoint")
        return cls(group_size=group_size, label=f"AWQ, {describe_groups(bits, group_size)}")

    def is_coded(self, tensors: Mapping[str, str]) -> bool:
        return "qweight" in tensors

    def read(self, module: QuantizedModule) -> GivenWeight:
        qweight = module.take("qweight", (torch.int32,), (None, None))
        columns, rows = qweight.shape[0], qweight.shape[1] * 8
        groups = 1 if self.group_size < 0 else module.groups(columns, self.group_size)
        qzeros = module.take("qzeros", (torch.int32,), (groups, rows // 8))
        scale = module.take("scales", SCALES, (groups, rows)).t().contiguous()
        zero = _unpack(qzeros)
        is_symmetric = not zero.any()
        args = groups_or_rows(4, None if self.group_size < 0 else self.group_size, symmetric=is_symmetric)
        weight = QuantizedWeight(_unpack(qweight), scale, None if is_symmetric else zero, None, args)
        return GivenWeight(module.store(weight))


def _unpack(words: Tensor) -> Tensor:
    """i32[R, N / 8] -> int8[N, R], from -8 to 7."""
    nibbles = unpack_bits(words, 4, words.shape[1] * 8).unflatten(1, (-1, 8))
    columns = torch.empty_like(nibbles)
    columns[:, :, list(ORDER)] = nibbles
    return columns.flatten(1).t().contiguous()
