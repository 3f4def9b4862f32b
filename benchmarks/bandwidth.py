"""How fast this machine reads memory: the roofline of decode speeds, and whether the machine is at its best now.

    python benchmarks/bandwidth.py [THREADS]     # ten times, a second apart

A small C++ program, compiled on first use, sums a buffer of 1 GiB (or 8 times the last-level cache, if that is more) a few
times whenever it is asked; the best pass counts.

A virtual machine may read memory at 60 GB/s in one second and at 34 in the next, with nothing else running in it and no
stolen time reported. `Steady` takes measurements while the bandwidth is near its best, and no other program runs: engines
whose threads wait for each other by spinning get a hundred times slower beside one. The share of the roofline that an engine
reaches is found in turns of some milliseconds, steps and reads of as many bytes.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = r"""
#include <sys/mman.h>
#include <algorithm>
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
  int64_t at = 0;
  auto read = [&](int64_t first, int64_t last) {
    const auto started = std::chrono::steady_clock::now();
#pragma omp parallel for schedule(static) reduction(+ : sum)
    for (int64_t i = first; i < last; ++i) sum += data[i];
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
  };
  long long wanted;
  while (scanf("%lld", &wanted) == 1) {
    double found = 0;
    if (wanted == 0) {
      for (int pass = 0; pass < passes; ++pass) found = std::max(found, bytes / read(0, count));
    } else {
      for (int64_t left = wanted / 8; left > 0;) {
        const int64_t last = std::min(count, at + left);
        found += read(at, last);
        left -= last - at;
        at = last % count;
      }
    }
    printf("%.9g\n", found);
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
TURNS, TURN_PAUSE = 16, 0.02  # seconds for threads to go to sleep
FOREIGN = 0.1  # processor seconds of other programs per second that are too many


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
        return self._ask(0)

    def seconds(self, size: int) -> float:
        """How long reading so many bytes takes, once; they are in no cache."""
        return self._ask(size)

    def _ask(self, size: int) -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{size}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())


@dataclass(frozen=True)
class Measured:
    """A measurement, and how the machine was meanwhile.

    Attributes:
        value: what was measured.
        bandwidths: bytes per second, before and after.
        foreign: processor seconds that went to other programs, per second.
        steady: whether the bandwidths were near the best, and little went to others.
    """

    value: Any
    bandwidths: tuple[float, float]
    foreign: float
    steady: bool


class Steady:
    """Measures while the machine is steady, as far as patience goes; nothing that is measured has a say in it.

    Args:
        probe: of the bandwidth.
        memory: file that keeps the best bandwidth from call to call.
    """

    def __init__(self, probe: Bandwidth, memory: Path) -> None:
        self._probe, self._memory = probe, memory
        self.best = float(memory.read_text()) if memory.exists() else 0.0
        for _ in range(10):
            self._bandwidth()
            time.sleep(0.2)

    def share(self, steps: Callable[[], float], size: int) -> float:
        """What part of the time that some steps take reading so many bytes takes: the median of short turns of both, so that
        they meet the machine in the same state.

        Args:
            steps: takes them, and returns the seconds.
            size: bytes that they read together.
        """
        shares = []
        for _ in range(TURNS):
            seconds = steps()
            time.sleep(TURN_PAUSE)
            shares.append(self._probe.seconds(size) / seconds)
            time.sleep(TURN_PAUSE)
        return statistics.median(shares)

    def measure(self, work: Callable[[], Any]) -> Measured:
        """The first steady measurement, or the last of several that are not."""
        for attempt in range(ATTEMPTS):
            deadline = time.monotonic() + PATIENCE / (attempt + 1)
            while (before := self._bandwidth()) < STEADY * self.best and time.monotonic() < deadline:
                time.sleep(0.2)
            started, others = time.monotonic(), foreign_seconds()
            value = work()
            after = self._bandwidth()
            foreign = max(0.0, foreign_seconds() - others) / (time.monotonic() - started)
            steady = min(before, after) >= STEADY * self.best and foreign <= FOREIGN
            found = Measured(value, (before, after), foreign, steady)
            if steady:
                break
        return found

    def _bandwidth(self) -> float:
        found = self._probe.measure()
        if found > self.best:
            self.best = found
            self._memory.write_text(str(found))
        return found


def foreign_seconds() -> float:
    """Processor seconds since the machine started that went to programs other than this one and its children."""
    times = [int(value) for value in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    busy = sum(times) - times[3] - times[4]  # less idle and waiting for a disk
    own = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if os.getpid() in (int(path.parent.name), int(fields[1])):
            own += int(fields[11]) + int(fields[12])
    return (busy - own) / os.sysconf("SC_CLK_TCK")


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
