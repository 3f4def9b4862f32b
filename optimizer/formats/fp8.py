"""FP8 as DeepSeek and Qwen publish it (quant_method fp8).

    weight            e4m3[N, K]
    weight_scale_inv  f32[ceil(N / 128), ceil(K / 128)], or one number for the weight; despite its name a factor
    input_scale       f32, where activations are static

W = code * scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...errors import CheckpointError, UnsupportedModelError
from ...passes.quantize.given import GivenWeight
from ...runtime.ops.quantized import FP8, QuantizedWeight
from ...runtime.scheme import QuantizationArgs
from .module import SCALES, Format, QuantizedModule

_SCALE_NAMES = ("weight_scale_inv", "weight_scale")
_INPUT_NAMES = ("input_scale", "activation_scale")
_POWERS = (torch.float8_e8m0fnu,)


@dataclass(frozen=True, kw_only=True)
class BlockFP8(Format):
    """A checkpoint in FP8, in blocks or with one scale a weight."""

    leaves: ClassVar[frozenset[str]] = frozenset({"weight", *_SCALE_NAMES, *_INPUT_NAMES})

    block: tuple[int, int] | None
    is_static: bool

    @classmethod
    def parse(cls, config: Mapping[str, Any], path: str) -> BlockFP8:
        """Raises UnsupportedModelError: another number format. CheckpointError: a block that is none."""
        kind = str(config.get("fmt") or "e4m3").lower()
        if kind not in ("e4m3", "float8_e4m3fn"):
            raise UnsupportedModelError(
                f"{path}: FP8 as {kind}; optc reads e4m3: take another checkpoint, or the unquantized one"
            )
        size = config.get("weight_block_size")
        if size is None:
            block = None
        elif isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size):
            block = (size[0], size[1])
        else:
            raise CheckpointError(f"{path}: quantization_config has weight_block_size {size!r}, expected two integers")
        is_static = config.get("activation_scheme", "dynamic") == "static"
        scales = f"blocks of {block[0]}x{block[1]}" if block else "one scale a weight"
        return cls(block=block, is_static=is_static, label=f"FP8, {scales}")

    def is_coded(self, tensors: Mapping[str, str]) -> bool:
        return tensors.get("weight") == "F8_E4M3"

    def read(self, module: QuantizedModule) -> GivenWeight:
        codes = module.take("weight", (FP8,), (None, None))
        rows, columns = codes.shape
        name = next((name for name in _SCALE_NAMES if name in module), _SCALE_NAMES[0])
        if self.block is None:
            found = module.take(name, SCALES + _POWERS, (), (1,), (1, 1), (rows, 1))
            args = QuantizationArgs(type="float", strategy="tensor" if found.numel() == 1 else "channel")
            scale = found.reshape(-1, 1)
        else:
            args = QuantizationArgs(type="float", strategy="block", block_structure=self.block)
            scale = module.take(name, SCALES + _POWERS, (-(-rows // self.block[0]), -(-columns // self.block[1])))
        if scale.dtype in _POWERS:
            scale = scale.float()  # powers of two: exact
        stored = module.store(QuantizedWeight(codes, scale.contiguous(), None, None, args))
        if self.is_static:
            given = next((name for name in _INPUT_NAMES if name in module), _INPUT_NAMES[0])
            input_scale = module.take(given, SCALES, (), (1,)).float().reshape(1)
            return GivenWeight(stored, QuantizationArgs(type="float", strategy="tensor"), input_scale)
        return GivenWeight(stored, self._activations())

    def _activations(self) -> QuantizationArgs:
        if self.block is None:
            return QuantizationArgs(type="float", strategy="token", dynamic=True)
        return QuantizationArgs(type="float", strategy="group", group_size=self.block[1], dynamic=True)
