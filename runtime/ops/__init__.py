"""The op vocabulary of optc's programs. Importing this package registers every op with PyTorch."""

from . import attention

__all__ = ["attention"]
