"""Memory of the KV cache, made ready before it is used.

The system gives a page when it is first written to, and clears it then: a hundred megabytes take some milliseconds on bare
metal, and were measured at 0.2 s in a virtual machine whose host has to find them. In a decode step that would be a
stall, so a thread of low priority asks for the pages of the next blocks while the last ones are in use.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Sequence

from torch import Tensor

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14: pages are there as if written to, and what they hold stays
_PIECE = 2 << 20  # bytes a call: it holds a lock on the process's memory map
_AHEAD = 256 << 20  # bytes of all layers
_NICENESS = 10


class PagesAhead:
    """Keeps the pages of some blocks behind those in use ready. Where the system cannot, pages come as they are used.

    Args:
        caches: of each layer [num_blocks, ...], contiguous; blocks are used from the first on.
    """

    def __init__(self, caches: Sequence[Tensor]) -> None:
        self._regions = [(cache.data_ptr(), cache.nbytes // max(1, len(cache))) for cache in caches]
        self._num_blocks = len(caches[0]) if caches else 0
        per_block = sum(size for _, size in self._regions)
        self._ahead = max(1, _AHEAD // max(1, per_block))
        self.num_ready = 0
        self._wanted = 0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._madvise = getattr(ctypes.CDLL(None), "madvise", None)
        if self._madvise is not None:
            self._madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def use(self, num_blocks: int) -> None:
        """The first `num_blocks` are in use or about to be."""
        wanted = min(self._num_blocks, num_blocks + self._ahead)
        far_enough = wanted - self._wanted < self._ahead // 2 and wanted < self._num_blocks
        if wanted <= self._wanted or far_enough or self._madvise is None:
            return
        with self._lock:
            self._wanted = wanted
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="optc pages", daemon=True)
                self._thread.start()

    def wait(self) -> None:
        """Until what was asked for is ready."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)  # of this thread alone
        while True:
            with self._lock:
                first, last = self.num_ready, self._wanted
                if first >= last or self._madvise is None:
                    self._thread = None
                    return
            for address, size in self._regions:
                self._populate(address + first * size, address + last * size)
            self.num_ready = last

    def _populate(self, start: int, end: int) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        start -= start % page
        for at in range(start, end, _PIECE):
            madvise = self._madvise
            if madvise is None or madvise(at, min(_PIECE, end - at), _POPULATE_WRITE):
                self._madvise = None  # an older system: it would refuse every time
                return
