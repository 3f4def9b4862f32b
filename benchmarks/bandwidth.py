"""How fast this machine reads memory: the roofline that decode speeds are held against.

    python benchmarks/bandwidth.py [THREADS]

A small C++ program, compiled on first use, sums a buffer of 1 GiB (or 8 times the last-level cache, if that is more)
several times; the best pass counts.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
  double best = 0;
  uint64_t sum = 0;
  for (int pass = 0; pass < passes; ++pass) {
    const auto started = std::chrono::steady_clock::now();
#pragma omp parallel for schedule(static) reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += data[i];
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
    if (bytes / seconds > best) best = bytes / seconds;
  }
  printf("%.0f\n", best);
  return sum == 1;  // uses the sum
}
"""
GIB = 2**30
PASSES = 8


class Bandwidth:
    """The probe, compiled into `folder`.

    Args:
        folder: where the program lies.
        threads: how many read.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        self._program = folder / "bandwidth"
        self._threads = threads
        self._bytes = max(GIB, 8 * last_level_cache())
        folder.mkdir(parents=True, exist_ok=True)
        source = folder / "bandwidth.cpp"
        source.write_text(SOURCE)
        options = ["-O3", "-march=native", "-mprefer-vector-width=512", "-fopenmp"]
        subprocess.run(["g++", *options, str(source), "-o", str(self._program)], check=True)

    def measure(self) -> float:
        """Bytes per second read, the best of several passes."""
        environment = {"OMP_NUM_THREADS": str(self._threads), "OMP_PROC_BIND": "true"}
        command = [str(self._program), str(self._bytes), str(PASSES)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        return float(done.stdout)


def last_level_cache() -> int:
    """Bytes of the largest cache that the kernel tells of; 0 if it tells of none."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=0)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        probe = Bandwidth(Path(name), int(sys.argv[1]) if len(sys.argv) > 1 else 2)
        for _ in range(5):
            print(f"{probe.measure() / 1e9:.1f} GB/s")
