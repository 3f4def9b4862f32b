"""Native kernels of the ops: which instruction sets this machine runs, and loading a compiled library.

A kernels library is one shared object with the CPU kernels of every `optc::` op, compiled for one instruction set (see
`optimizer/lowering/native.py`). Loading it registers the kernels; from then on the ops take them for CPU tensors
instead of the reference implementations.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import threading
from functools import cache
from pathlib import Path

import torch

from ...errors import ArtifactError
from . import attention  # noqa: F401  the ops must be defined before kernels attach to them

_AVX2 = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_VNNI = _AVX512 | {"avx512_vnni"}

# What /proc/cpuinfo must list for each instruction set, best first: the x86-64-v4 and v3 levels of the x86 ABI, the former
# also with dot products of 8-bit integers (Cascade Lake, Ice Lake), and of bfloat16 as well (Sapphire Rapids, Zen 4).
REQUIRED_FLAGS: dict[str, frozenset[str]] = {
    "avx512_bf16": _VNNI | {"avx512_bf16"},
    "avx512_vnni": _VNNI,
    "avx512": _AVX512,
    "avx2": _AVX2,
    "generic": frozenset(),
}

logger = logging.getLogger("optc")
_lock = threading.Lock()
_loaded_digest: str | None = None
_loaded_shims: str | None = None


@cache
def cpu_flags() -> frozenset[str]:
    """The processor's features as Linux names them; empty on other systems and other architectures."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return frozenset()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").partition(":")[2].split())


def supports(isa: str) -> bool:
    """Whether this machine runs code compiled for `isa`; False for a name that is not in `REQUIRED_FLAGS`."""
    return isa in REQUIRED_FLAGS and REQUIRED_FLAGS[isa] <= cpu_flags()


def host_isa() -> str:
    """The best of `REQUIRED_FLAGS` that this machine runs."""
    return next(isa for isa in REQUIRED_FLAGS if supports(isa))


def kernels_loaded() -> bool:
    """Whether this process has native CPU kernels."""
    return _loaded_digest is not None


def load_kernels(path: Path, shims: str | None = None) -> None:
    """Register the kernels of the shared library at `path`.

    An op has one kernel per device, so the first library of a process stays: a later call with another file changes
    nothing and logs a warning. The path is still read, so that a missing file is never overlooked.

    Args:
        path: of the library.
        shims: digest of the C functions that compiled programs call in it; None if none will be called.

    Raises:
        ArtifactError: the file cannot be read, is not a library that this process can load, or the library that is loaded
            already has other C functions.
    """
    global _loaded_digest, _loaded_shims
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ArtifactError(f"cannot read the kernels library {path}: {error.strerror}") from error
    with _lock:
        if _loaded_digest is not None:
            if digest != _loaded_digest:
                if shims is not None and _loaded_shims not in (None, shims):
                    raise ArtifactError(
                        f"{path}: this process has the kernels of another version of optc, whose functions take other "
                        "arguments; load the artifact in a process of its own, or compile both with the same version"
                    )
                logger.warning("%s: this process has other kernels already and keeps them", path)
            return
        try:
            torch.ops.load_library(path)
            # Once more, so that compiled programs find its C functions.
            ctypes.CDLL(str(path), mode=os.RTLD_GLOBAL | os.RTLD_NOW)
        except (OSError, RuntimeError) as error:
            raise ArtifactError(
                f"cannot load the kernels library {path}: {error}. It was compiled for another machine or another "
                f"version of torch (this is {torch.__version__}); compile the model again here"
            ) from error
        _loaded_digest, _loaded_shims = digest, shims
