"""Tensors in huge pages: weights and KV caches of native programs.

A decode step reads every weight once. With pages of 4 KiB the processor looks up a page every 4 KiB, which costs up to a
quarter of the speed on a virtual machine; how much of a mapped file lies in larger pages is left to chance. So weights are
copied at load, and their files need not stay in memory. Where the system has no huge pages to give, ordinary ones serve.
"""

from __future__ import annotations

import contextlib
import mmap
from math import prod

import torch
from torch import Tensor

_PAGE = 2 << 20
_ALIGNMENT = 64  # bytes; a cache line


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of zeros on the CPU. The system gives its memory as it is written to."""
    size = prod(shape) * dtype.itemsize
    return _memory(size)[:size].view(dtype).view(shape)


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies of tensors, side by side in memory."""
    starts, end = {}, 0
    for name, tensor in tensors.items():
        starts[name] = end
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    memory, found = _memory(end), {}
    for name, tensor in tensors.items():
        own = memory[starts[name] :][: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        found[name] = own.copy_(tensor)
    return found


def _memory(size: int) -> Tensor:
    """At least `size` bytes of zeros from the start of a huge page on."""
    mapped = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system built without them
            mapped.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(mapped, dtype=torch.uint8)
    return memory[-memory.data_ptr() % _PAGE :]
