"""The instruction set that a file of kernel tests runs under, and running part of it again under the others.

`OPTC_TEST_ISA` picks it; by default it is the best of this machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from optc.runtime.ops.kernels import REQUIRED_FLAGS, host_isa, supports

ISA = os.environ.get("OPTC_TEST_ISA", host_isa())
SLOW = ("avx512",)  # what it has of its own is one way to multiply bytes; `make test-all` runs it
under_other_isas = pytest.mark.parametrize(
    "isa",
    [pytest.param(isa, marks=pytest.mark.slow if isa in SLOW else ()) for isa in REQUIRED_FLAGS if isa != ISA],
)


def run_again(file: str, isa: str, only: str, **environment: str) -> None:
    """The tests of `file` that `only` (as of pytest's -k) selects, under `isa`, if this machine has it.

    Variables of the environment may be given, such as CXX with options.
    """
    if not supports(isa):
        pytest.skip(f"this machine has no {isa}")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:xdist", "-k", only, file],
        env=os.environ | {"OPTC_TEST_ISA": isa} | environment,
        cwd=Path(file).parent.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout
