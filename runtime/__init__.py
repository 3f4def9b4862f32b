"""The lean runtime: loads artifacts and generates. It needs no transformers and no compiler."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .async_engine import AsyncEngine
    from .llm import LLM
    from .params import SamplingParams, StructuredOutput
    from .reader import RequestOutput
    from .request import Completion, GenerationResult

__all__ = [
    "LLM",
    "AsyncEngine",
    "Completion",
    "GenerationResult",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutput",
]

_WHERE = {
    "AsyncEngine": ".async_engine",
    "Completion": ".request",
    "GenerationResult": ".request",
    "LLM": ".llm",
    "RequestOutput": ".reader",
    "SamplingParams": ".params",
    "StructuredOutput": ".params",
}


def __getattr__(name: str) -> Any:
    # Imported on first use (PEP 562): `optc --help` reads the commands of this package, and torch takes a second.
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name], __name__), name)
