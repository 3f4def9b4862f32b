"""How fast this machine reads memory: the roofline of decode speeds, and whether the machine is at its best now.

    python benchmarks/bandwidth.py [THREADS]     # ten times, a second apart

A small C++ program, compiled on first use, sums a buffer of 1 GiB (or 8 times the last-level cache, if that is more) a few
times whenever it is asked; the best pass counts.

A virtual machine may read memory at 60 GB/s in one second and at 34 in the next, with nothing else running in it and no
stolen time reported. `Steady` takes measurements while the bandwidth is near its best.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = r"""
#include <sys/mman.h>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

int main(int argc, char** argv) {
  const int64_t bytes = atoll(argv[1]);
  const int passes = atoi(argv[2]);
  const int64_t count = bytes / 8;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return 1;
  madvise(memory, bytes, MADV_HUGEPAGE);  // the limit of the memory, not of the page tables
  uint64_t* data = static_cast<uint64_t*>(memory);
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < count; ++i) data[i] = i;
  uint64_t sum = 0;
  while (getchar() == '\n') {
    double best = 0;
    for (int pass = 0; pass < passes; ++pass) {
      const auto started = std::chrono::steady_clock::now();
#pragma omp parallel for schedule(static) reduction(+ : sum)
      for (int64_t i = 0; i < count; ++i) sum += data[i];
      const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
      if (bytes / seconds > best) best = bytes / seconds;
    }
    printf("%.0f\n", best);
    fflush(stdout);
  }
  return sum == 1;  // uses the sum
}
"""
GIB = 2**30
PASSES = 3
STEADY = 0.8  # share of the best bandwidth from which on the machine counts as steady
PATIENCE = 15.0  # seconds to wait for that
ATTEMPTS = 4


class Bandwidth:
    """The probe, compiled into `folder`; its process waits without taking processor time.

    Args:
        folder: where the program lies.
        threads: how many read.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        program, size = folder / "bandwidth", max(GIB, 8 * last_level_cache())
        folder.mkdir(parents=True, exist_ok=True)
        source = folder / "bandwidth.cpp"
        source.write_text(SOURCE)
        options = ["-O3", "-march=native", "-mprefer-vector-width=512", "-fopenmp"]
        subprocess.run(["g++", *options, str(source), "-o", str(program)], check=True)
        environment = {"OMP_NUM_THREADS": str(threads), "OMP_PROC_BIND": "true", "OMP_WAIT_POLICY": "passive"}
        command = [str(program), str(size), str(PASSES)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def measure(self) -> float:
        """Bytes per second read, the best of a few passes."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())


@dataclass(frozen=True)
class Measured:
    """A measurement, and the bandwidths before and after it.

    Attributes:
        value: what was measured.
        bandwidths: bytes per second.
        steady: whether both were near the best.
    """

    value: Any
    bandwidths: tuple[float, float]
    steady: bool


class Steady:
    """Measures while the bandwidth is near its best, as far as patience goes; nothing but the bandwidth chooses."""

    def __init__(self, probe: Bandwidth) -> None:
        self._probe = probe
        self.best = max(self._after(0.2) for _ in range(10))

    def measure(self, work: Callable[[], Any]) -> Measured:
        """The first steady measurement, or the last of several that are not."""
        for attempt in range(ATTEMPTS):
            deadline = time.monotonic() + PATIENCE / (attempt + 1)
            while not self._is_steady(before := self._after(0.0)) and time.monotonic() < deadline:
                time.sleep(0.2)
            value = work()
            found = Measured(value, (before, after := self._after(0.0)), self._is_steady(before, after))
            if found.steady:
                break
        return found

    def _is_steady(self, *bandwidths: float) -> bool:
        return min(bandwidths) >= STEADY * self.best

    def _after(self, pause: float) -> float:
        time.sleep(pause)
        found = self._probe.measure()
        self.best = max(found, getattr(self, "best", 0.0))
        return found


def last_level_cache() -> int:
    """Bytes of the largest cache that the kernel tells of; 0 if it tells of none."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=0)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        probe = Bandwidth(Path(name), int(sys.argv[1]) if len(sys.argv) > 1 else 2)
        for _ in range(10):
            print(f"{probe.measure() / 1e9:.1f} GB/s", flush=True)
            time.sleep(1)
