"""Building the library of kernels, and loading it."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from optc.errors import ArtifactError, LoweringError
from optc.optimizer.lowering.native import build_kernels
from optc.runtime.ops import kernels
from optc.runtime.ops.kernels import host_isa, kernels_loaded, load_kernels, supports

from .isas import ISA


@pytest.fixture(scope="module", autouse=True)
def native() -> None:
    load_kernels(build_kernels(ISA))


def test_the_first_library_stays(tmp_path: Path) -> None:
    assert kernels_loaded()
    load_kernels(build_kernels("generic"))
    with pytest.raises(ArtifactError, match=r"cannot read the kernels library .*missing\.so: No such file"):
        load_kernels(tmp_path / "missing.so")


def test_a_broken_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_loaded_digest", None)
    (tmp_path / "kernels.so").write_bytes(b"not a library")
    with pytest.raises(
        ArtifactError, match=r"cannot load the kernels library .*kernels\.so: .*compile the model again"
    ):
        load_kernels(tmp_path / "kernels.so")


def test_build_is_cached() -> None:
    first = build_kernels("generic")
    written = first.stat().st_mtime_ns
    assert build_kernels("generic") == first and first.stat().st_mtime_ns == written


def test_two_builders_compile_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler is a script that notes its calls and takes a while."""
    compiler, calls = tmp_path / "compiler", tmp_path / "calls"
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exit\necho "$@" >> {calls}\nsleep 0.1\n'
        'while [ $# -gt 1 ]; do [ "$1" = -o ] && echo library > "$2"; shift; done\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("OPTC_CACHE", str(tmp_path / "cache"))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(build_kernels, ["generic", "generic"])
    assert first == second and first.exists()
    assert sum(" -shared " in f" {call} " for call in calls.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("compiler", "message"),
    [("no-such-compiler", "cannot run the C.. compiler 'no-such-compiler'.*eager"), ("false", "'false' failed.*eager")],
)
def test_build_without_compiler(compiler: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(LoweringError, match=message):
        build_kernels("generic")


def test_build_for_unknown_isa() -> None:
    with pytest.raises(
        LoweringError, match="unknown instruction set 'sse9', expected one of avx512_bf16, avx512_vnni, avx512"
    ):
        build_kernels("sse9")
    assert not supports("sse9")
    assert supports(host_isa()) and supports("generic")


def test_loader_imports_no_compiler() -> None:
    script = (
        "import sys, torch; before = set(sys.modules); import optc.runtime.ops.kernels;"
        "print([m for m in set(sys.modules) - before if m.split('.')[0] in ('sympy', 'transformers')"
        " or m.startswith(('torch._inductor', 'torch._dynamo'))])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
