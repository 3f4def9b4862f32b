"""optc: an ahead-of-time compiler for language models."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .optimizer.compile import compile
    from .runtime import LLM, AsyncEngine, GenerationResult, SamplingParams, StructuredOutput

# optc's kernels have a thread pool of their own (runtime/ops/cpu/parallel.h). What else runs on OpenMP's threads must not
# take the cores from it: with OpenMP's default they spin long after a parallel region has ended. It is read once, when
# torch loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncEngine",
    "GenerationResult",
    "SamplingParams",
    "StructuredOutput",
    "__version__",
    "compile",
]

_WHERE = {
    "compile": ".optimizer.compile",
    "AsyncEngine": ".runtime",
    "LLM": ".runtime",
    "GenerationResult": ".runtime",
    "SamplingParams": ".runtime",
    "StructuredOutput": ".runtime",
}


def __getattr__(name: str) -> Any:
    # Imported on first use (PEP 562): the runtime must not pay for the compiler, nor `optc --help` for torch.
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name], __name__), name)
