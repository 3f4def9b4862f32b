"""The op vocabulary of optc's programs. Importing this package registers every op with PyTorch."""

from . import attention, gated, grouped_mm, norm, packed, quantized, rope, rounded

__all__ = ["attention", "gated", "grouped_mm", "norm", "packed", "quantized", "rope", "rounded"]
