"""The op vocabulary of optc's programs. Importing this package registers every op with PyTorch."""

from . import attention, grouped_mm, quantized

__all__ = ["attention", "grouped_mm", "quantized"]
