"""The thread pool of the kernels: exceptions, and several callers at once."""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from optc.optimizer.lowering.native import SOURCES, build_kernels
from optc.runtime.ops.kernels import load_kernels
from optc.runtime.ops.packed import PackedWeight

from .isas import ISA
from .quantized_cases import Case

OPS = torch.ops.optc

# The pool with a region of its own. `seen` counts how often each piece was run; piece `bad` throws, or any that another
# thread takes than the caller, which waits for it.
NONE, OTHERS = -1, -2
PROBE = """
#include "parallel.cpp"

#include <stdexcept>

extern "C" bool throws(int64_t count, int64_t threads, int64_t bad, int32_t* seen) {
  const auto caller = std::this_thread::get_id();
  std::atomic<bool> has_thrown{false};
  const auto piece = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      __atomic_fetch_add(&seen[i], 1, __ATOMIC_RELAXED);
      const bool is_caller = std::this_thread::get_id() == caller;
      while (bad == -2 && is_caller && !has_thrown) std::this_thread::yield();
      if (i != bad && (bad != -2 || is_caller)) continue;
      has_thrown = true;
      throw std::runtime_error("piece");
    }
  };
  const auto run = [](int64_t begin, int64_t end, const void* f) {
    (*static_cast<const decltype(piece)*>(f))(begin, end);
  };
  try {
    optc::run_pieces(count, 1, threads, {}, run, &piece);
    return false;
  } catch (const std::runtime_error&) {
    return true;
  }
}
"""

Run = Callable[..., tuple[bool, list[int]]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs pieces on the pool: whether an exception reached the caller, and how often each was run."""
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.cpp").write_text(PROBE)
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    includes = [f"-I{SOURCES}", f"-isystem{Path(torch.__file__).parent / 'include'}"]
    options = ["-O2", "-std=c++17", "-fPIC", "-shared", "-pthread", *includes]
    subprocess.run([*compiler, *options, folder / "probe.cpp", "-o", folder / "probe.so"], check=True)
    throws = ctypes.CDLL(str(folder / "probe.so")).throws  # without the interpreter's lock, so that callers meet
    throws.restype = ctypes.c_bool
    throws.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]

    def run(count: int, threads: int = 3, bad: int = NONE) -> tuple[bool, list[int]]:
        seen = (ctypes.c_int32 * count)()
        return throws(count, threads, bad, seen), list(seen)

    return run


@pytest.mark.parametrize("bad", [0, 13, 39, OTHERS])
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_an_exception_reaches_the_caller_and_the_pool_lives_on(bad: int, threads: int, run: Run) -> None:
    for _ in range(20):
        has_thrown, seen = run(40, threads, bad)
        assert has_thrown and max(seen) == 1
        assert run(40, threads) == (False, [1] * 40)


def in_two_threads(first: Callable[[], object], second: Callable[[], object]) -> None:
    """Both at the same time, again and again."""
    barrier = Barrier(2)

    def repeat(call: Callable[[], object]) -> None:
        torch.set_num_threads(3)
        barrier.wait()
        for _ in range(100):
            call()

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(repeat, first), pool.submit(repeat, second)]:
            done.result()


def test_two_callers_have_pieces_and_exceptions_of_their_own(run: Run) -> None:
    def good() -> None:
        assert run(1000) == (False, [1] * 1000)

    def bad() -> None:
        assert run(1000, bad=500)[0]

    in_two_threads(good, good)
    in_two_threads(good, bad)


@pytest.fixture
def threads() -> Iterator[None]:
    load_kernels(build_kernels(ISA))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def linear_arguments(rows: int) -> list[Any]:
    case = Case(scheme="w4a8-g32", shape=(1000, 512))
    x, _, _, _, _, input_scale, _, bits, _, activation = case.arguments(rows, case.weight())
    packed = PackedWeight.pack(case.weight().unpack())
    return [x, packed.weight, packed.scale, packed.zero, input_scale, None, 1000, bits, packed.group, activation]


@pytest.mark.usefixtures("threads")
def test_an_exception_of_a_kernel_becomes_one_of_python() -> None:
    good, bad = linear_arguments(2), linear_arguments(2)
    expected = OPS.linear_packed(*good)
    bad[5] = torch.zeros(1000, dtype=torch.int64)  # a bias whose dtype is looked at panel by panel
    with pytest.raises(RuntimeError, match="bias supports float32, bfloat16 and float16"):
        OPS.linear_packed(*bad)
    assert torch.equal(OPS.linear_packed(*good), expected)


@pytest.mark.usefixtures("threads")
def test_two_callers_of_kernels() -> None:
    few, many = linear_arguments(2), linear_arguments(30)
    q, k, v = (torch.randn(1, heads, 300, 64) for heads in (8, 2, 2))

    def results() -> list[Tensor]:
        attended = OPS.attention(q, k, v, 0.125, 0, 0.0, None, 0)
        return [OPS.linear_packed(*few), OPS.linear_packed(*many), attended]

    expected = results()

    def check() -> None:
        assert all(map(torch.equal, results(), expected))

    in_two_threads(check, check)
