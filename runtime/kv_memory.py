"""How many blocks the KV cache has, by the memory it may take."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ..errors import RequestError
from .artifact import Artifact

MEMORY_SHARE = 0.25


def num_blocks(artifact: Artifact, *, max_num_seqs: int, kv_cache_memory: int | None) -> int:
    """Blocks that fit into `kv_cache_memory` bytes.

    None takes what `max_num_seqs` sequences of full length need, at most a quarter of the memory that the weights leave
    available.

    Raises:
        RequestError: not even one fits.
    """
    manifest = artifact.manifest
    per_block = max(1, manifest.memory.kv_bytes_per_token * manifest.block_size)
    if kv_cache_memory is not None:
        blocks = kv_cache_memory // per_block
        if blocks < 1:
            raise RequestError(f"kv_cache_memory={kv_cache_memory}: a block takes {per_block} bytes")
        return blocks
    per_sequence = -(-manifest.model.max_model_len // manifest.block_size)
    left = max(0, available_memory() - manifest.memory.weight_bytes)  # the executor loads the weights after this
    affordable = int(left * MEMORY_SHARE) // per_block
    return max(1, min(max_num_seqs * per_sequence, affordable))


def available_memory() -> int:
    """Bytes that can be allocated without swapping, and within the limit of the container."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024
    except (OSError, StopIteration):
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        available = min(available, max(0, limit - used))
    return available
