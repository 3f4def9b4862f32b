"""Lowering with AOTInductor: the step program becomes native code whose weights stay outside.

The package holds no constants (`package_constants_in_so` off); the runtime binds memory-mapped tensors to it by name.
CPU code is made for the target's instruction set, not for the machine that compiles, and says which processor features
it needs.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
from torch._inductor import config as inductor_config
from torch._inductor import cpu_vec_isa

from ...errors import LoweringError
from ...passes.graph import Program, get_weight
from ...runtime.ops.kernels import REQUIRED_FLAGS
from ..targets import Target
from .shims import shims

_MARCH = {
    "avx512_bf16": "x86-64-v4",
    "avx512_vnni": "x86-64-v4",
    "avx512": "x86-64-v4",
    "avx2": "x86-64-v3",
    "generic": "x86-64",
}
# Compiler flag of Inductor's instruction sets -> the feature as /proc/cpuinfo names it.
_EXTRA_FEATURES = {
    "-mavx512vnni": "avx512_vnni",
    "-mavx512bf16": "avx512_bf16",
    "-mamx-tile": "amx_tile",
    "-mamx-bf16": "amx_bf16",
    "-mamx-int8": "amx_int8",
    "-mamx-fp16": "amx_fp16",
}


def compile_step(program: Program, target: Target, path: Path) -> tuple[str, ...]:
    """Compile a step program for a CPU target into the AOTInductor package `path`.

    Returns:
        The processor features the code needs, as /proc/cpuinfo names them.

    Raises:
        LoweringError: the graph cannot be lowered, or the C++ compiler failed.
    """
    assert target.isa is not None
    try:
        with torch.no_grad(), _quiet(), _instruction_set(target) as features:
            exported = _export(program)
            options = {
                "aot_inductor.package_constants_in_so": False,
                "cpp.march": _MARCH[target.isa] if platform.machine().lower() in ("x86_64", "amd64") else None,
                # What Inductor generates is little, and a thread of OpenMP's takes longer to wake than it runs; optc's own
                # kernels have their own threads.
                "cpp.threads": 1,
                "aot_inductor.custom_ops_to_c_shims": shims(),
            }
            torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=options)
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if "error" in line.lower()), str(error).splitlines()[0])
        raise LoweringError(
            f"AOTInductor could not compile the step program for {target.name}: {reason.strip()}; "
            "check that g++ works, or use --backend eager, which needs no compiler"
        ) from error
    return tuple(sorted(features))


def _export(program: Program) -> torch.export.ExportedProgram:
    """Trace the graph once more, with example inputs and the symbols' ranges."""
    root = nn.Module()
    attributes: dict[str, str] = {}
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    for node in graph.find_nodes(op="get_attr"):
        # A flat name that no shape symbol can have: the generated C++ would take a buffer `s19` for one.
        name = attributes.setdefault(node.target, f"weight_{len(attributes)}")
        weight = get_weight(program.module, node.target)
        root.register_buffer(name, weight.detach())
        node.target = name
    module = fx.GraphModule(root, graph)
    sizes = dict(zip(program.symbols, (7, 3, 5, 11, 13, 17, 19, 23), strict=False))
    sizes |= {"S": 16, "Q": sizes["B"] + 1, "L": 2}
    dims = {name: torch.export.Dim(name, min=low, max=high) for name, (low, high) in program.symbols.items()}
    args, shapes = [], []
    for spec in program.inputs:
        args.append(
            torch.zeros([sizes[d] if isinstance(d, str) else d for d in spec.shape], dtype=getattr(torch, spec.dtype))
        )
        shapes.append({i: dims[d] for i, d in enumerate(spec.shape) if isinstance(d, str)})
    return torch.export.export(module, tuple(args), dynamic_shapes=tuple(shapes), strict=False)


def constant_names(program: Program) -> dict[str, str]:
    """Names of the compiled code's constants, for each of the program's weights that code can ask for."""
    return {name: f"weight_{i}" for i, name in enumerate(program.weights())}


@contextlib.contextmanager
def _instruction_set(target: Target) -> Iterator[set[str]]:
    """Make Inductor emit code for `target`; gives the features that the code will need."""
    isa = target.isa
    assert isa is not None
    features = set(REQUIRED_FLAGS[isa])
    with contextlib.ExitStack() as stack:
        patch: dict[str, Any] = {}
        if target.name == "native" and isa.startswith("avx512"):
            found = str(cpu_vec_isa.pick_vec_isa().build_arch_flags())
            features |= {feature for flag, feature in _EXTRA_FEATURES.items() if flag in found.split()}
        elif isa.startswith("avx512"):
            plain = cpu_vec_isa.VecAVX512()
            flags = plain._arch_flags
            stack.enter_context(mock.patch.object(cpu_vec_isa.VecAVX512, "build_arch_flags", lambda self: flags))
            stack.enter_context(mock.patch.object(cpu_vec_isa, "valid_vec_isa_list", lambda: [plain]))
            patch["cpp.simdlen"] = 512
        else:
            patch["cpp.simdlen"] = 256 if isa == "avx2" else 1
        stack.enter_context(inductor_config.patch(patch))
        yield features


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inductor's and export's warnings are about their own internals."""
    logger = logging.getLogger("torch._inductor")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
