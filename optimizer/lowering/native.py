"""Compiles the C++ kernels of `runtime/ops/cpu/` into one shared library per instruction set.

The library uses torch's stable ABI only, so one file serves every torch that optc supports. Results are cached in the
user's cache folder under a digest of everything that went into them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ...errors import LoweringError
from ...runtime import ops
from ...runtime.cache import cache_folder
from ...runtime.ops.kernels import REQUIRED_FLAGS

SOURCES = Path(ops.__file__).parent / "cpu"

_MARCH = {
    "avx512_bf16": ["-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"],
    "avx512_vnni": ["-march=x86-64-v4", "-mavx512vnni"],
    "avx512": ["-march=x86-64-v4"],
    "avx2": ["-march=x86-64-v3"],
    "generic": ["-march=x86-64"],
}

# The oldest torch that optc supports, in the form torch/csrc/stable/version.h asks for: newer functions stay unused.
_TORCH_TARGET_VERSION = "0x020b000000000000"

_WAY_OUT = "install g++ 11 or newer (or point CXX at one), or compile with --backend eager, which needs no compiler"


def build_kernels(isa: str) -> Path:
    """Compile the kernels for `isa`, a key of `REQUIRED_FLAGS`, and return the path of the shared library.

    Takes half a minute once, and then comes from the cache: $OPTC_CACHE, else $XDG_CACHE_HOME/optc, else ~/.cache/optc.
    The compiler is $CXX, else g++. Cross-compiling to another x86-64 instruction set works on any x86-64 machine.

    Raises:
        LoweringError: `isa` is unknown or not of this machine's architecture, there is no compiler, or it failed.
    """
    command = _command(isa)
    digest = _digest(command)
    target = cache_folder() / "kernels" / digest[:16] / f"kernels-{isa}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / "lock").open("w") as lock:  # who wants the same library waits for it instead of making it too
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _compile(command, target)
    return target


def _compile(command: list[str], target: Path) -> None:
    """Make the library `target`, in a folder of our own first, so that a reader never meets half of it."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        sources = sorted(SOURCES.glob("*.cpp"), key=lambda path: path.stat().st_size, reverse=True)  # about their time
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda source, to: _run([*command, "-c", str(source), "-o", str(to)]), sources, objects))
        library = Path(folder) / target.name
        torch_libraries = Path(torch.__file__).parent / "lib"
        _run([*command, "-shared", *map(str, objects), "-o", str(library), f"-L{torch_libraries}", "-ltorch_cpu"])
        library.replace(target)


def _command(isa: str) -> list[str]:
    if isa not in REQUIRED_FLAGS:
        raise LoweringError(f"unknown instruction set {isa!r}, expected one of {', '.join(REQUIRED_FLAGS)}")
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if not is_x86 and isa != "generic":
        raise LoweringError(
            f"cannot compile {isa} kernels on a {platform.machine()} machine; use generic, or compile on x86-64"
        )
    # -fno-math-errno -fno-trapping-math: nobody reads errno or floating-point exceptions, and selects vectorise.
    options = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
    include = Path(torch.__file__).parent / "include"
    defines = [f"-DTORCH_TARGET_VERSION={_TORCH_TARGET_VERSION}"]
    march = _MARCH[isa] if is_x86 else []
    return [*shlex.split(os.environ.get("CXX", "g++")), *options, *march, *defines, f"-isystem{include}"]


def _digest(command: list[str]) -> str:
    """Of the sources, the command, the compiler's version and torch's version."""
    digest = hashlib.sha256()
    compiler = command[: len(shlex.split(os.environ.get("CXX", "g++")))]
    for part in (*command, _run([*compiler, "--version"]), torch.__version__):
        digest.update(part.encode() + b"\0")
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".cpp", ".h"):
            content = path.read_bytes()
            digest.update(f"{path.name} {len(content)}\0".encode() + content)
    return digest.hexdigest()


def _run(command: list[str]) -> str:
    """The standard output of a compiler command."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise LoweringError(f"cannot run the C++ compiler {command[0]!r} ({error.strerror}); {_WAY_OUT}") from error
    if result.returncode != 0:
        lines = result.stderr.splitlines() or ["no message"]
        first = next((line for line in lines if "error" in line), lines[0])
        raise LoweringError(f"the C++ compiler {command[0]!r} failed: {first.strip()}; {_WAY_OUT}")
    return result.stdout
