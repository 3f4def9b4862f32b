"""The C functions through which compiled step programs call the kernels, past PyTorch's dispatcher.

An op has one if a kernel source defines it with `OPTC_SHIM` (see `runtime/ops/cpu/shim.h`). Its declaration follows from
the op's schema. The functions are found by name when the compiled program is loaded, so the kernels of another version of
optc would be called with the wrong arguments: the digest of all declarations is in the manifest, and the runtime compares.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache

import torch

from ...errors import LoweringError
from ...runtime import ops as _ops  # noqa: F401  the ops must be defined before their schemas are read
from .native import SOURCES

_TYPES = {
    "Tensor": "AtenTensorHandle",
    "Optional[Tensor]": "AtenTensorHandle*",
    "int": "int64_t",
    "float": "double",
    "bool": "int32_t",
    "str": "const char*",
    "ScalarType": "int32_t",
}
_DEFINITION = re.compile(r"^OPTC_SHIM aoti_torch_cpu_(\w+)\(", re.MULTILINE)


@cache
def shims() -> dict[torch._ops.OpOverload, list[str]]:
    """The declaration of each op's C function, as Inductor's `custom_ops_to_c_shims` wants them.

    Raises:
        LoweringError: a kernel source defines one for an op that does not exist.
    """
    found = {}
    for path in sorted(SOURCES.glob("*.cpp")):
        for name in _DEFINITION.findall(path.read_text(encoding="utf-8")):
            packet = getattr(torch.ops.optc, name, None)
            if packet is None:
                raise LoweringError(f"{path.name} defines a C function for optc::{name}, and there is no such op")
            found[packet.default] = [_declaration(packet.default)]
    return found


def shims_digest() -> str:
    """Equal for kernels whose C functions can stand for each other."""
    declarations = sorted(line for lines in shims().values() for line in lines)
    return hashlib.sha256("\n".join(declarations).encode()).hexdigest()[:16]


def _declaration(op: torch._ops.OpOverload) -> str:
    schema = op._schema
    arguments = [f"{_TYPES[_type_of(a)]} {a.name}" for a in schema.arguments]
    results = [f"AtenTensorHandle* result{i}" for i in range(len(schema.returns))]
    return f"AOTITorchError aoti_torch_cpu_{schema.name.split('::')[1]}({', '.join(arguments + results)})"


def _type_of(argument: torch.Argument) -> str:
    """The declared type; a dtype's is an integer to all but `real_type`."""
    return str(argument.real_type)
