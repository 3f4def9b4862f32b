"""The hardware optc knows by name. It drives defaults, refusals and the roofline estimate of the report.

Figures are the vendors' published peaks for dense arithmetic; bandwidth is that of device memory. For CPUs they depend
on the machine and are not listed.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, field

from ..errors import TargetError
from ..runtime.ops.kernels import host_isa


@dataclass(frozen=True, kw_only=True)
class Target:
    """Named hardware.

    Attributes:
        architecture: `sm_90` and the like for CUDA; the instruction set for CPUs.
        memory_gib: device memory.
        bandwidth_gbs: GB/s of device memory.
        tflops: dense TFLOP/s (TOP/s for integers) by dtype; a dtype that is not listed has no fast arithmetic.
    """

    name: str
    device: str
    architecture: str
    memory_gib: int | None = None
    bandwidth_gbs: int | None = None
    tflops: dict[str, float] = field(default_factory=dict)

    @property
    def isa(self) -> str | None:
        return self.architecture if self.device == "cpu" else None

    def can_build_here(self) -> bool:
        """Whether native code for the target can be made on this machine: CPU code, for a processor of its family."""
        is_x86 = platform.machine().lower() in ("x86_64", "amd64")
        return self.device == "cpu" and (is_x86 or self.name == "native")


def _cuda(name: str, architecture: str, memory_gib: int, bandwidth_gbs: int, **tflops: float) -> Target:
    return Target(
        name=name,
        device="cuda",
        architecture=architecture,
        memory_gib=memory_gib,
        bandwidth_gbs=bandwidth_gbs,
        tflops=tflops,
    )


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        _cuda("t4", "sm_75", 16, 320, float16=65, int8=130),
        _cuda("a10g", "sm_86", 24, 600, float16=70, bfloat16=70, int8=140),
        _cuda("a100", "sm_80", 80, 2039, float16=312, bfloat16=312, int8=624),
        _cuda("l4", "sm_89", 24, 300, float16=121, bfloat16=121, int8=242, fp8=242),
        _cuda("l40s", "sm_89", 48, 864, float16=362, bfloat16=362, int8=733, fp8=733),
        _cuda("h100", "sm_90", 80, 3350, float16=989, bfloat16=989, int8=1979, fp8=1979),
        _cuda("h200", "sm_90", 141, 4800, float16=989, bfloat16=989, int8=1979, fp8=1979),
        _cuda("b200", "sm_100", 180, 8000, float16=2250, bfloat16=2250, int8=4500, fp8=4500),
        Target(name="cpu-avx2", device="cpu", architecture="avx2"),
        Target(name="cpu-avx512", device="cpu", architecture="avx512"),
        Target(name="cpu-avx512-vnni", device="cpu", architecture="avx512_vnni"),
        Target(name="cpu-avx512-bf16", device="cpu", architecture="avx512_bf16"),
        # These kernels look for AMX when they run.
        Target(name="cpu-amx", device="cpu", architecture="avx512_bf16"),
        Target(name="cpu-generic", device="cpu", architecture="generic"),
    )
}


def find_target(name: str) -> Target:
    """The target of this name; `native` is this machine's CPU.

    Raises:
        TargetError: no such target.
    """
    if name == "native":
        return Target(name="native", device="cpu", architecture=host_isa())
    if name not in TARGETS:
        raise TargetError(f"unknown target {name!r}; known: native, {', '.join(TARGETS)}")
    return TARGETS[name]
