"""The lean runtime: loads artifacts and generates. It needs no transformers and no compiler."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .llm import LLM
    from .params import SamplingParams
    from .request import GenerationResult

__all__ = ["LLM", "GenerationResult", "SamplingParams"]

_WHERE = {"LLM": ".llm", "SamplingParams": ".params", "GenerationResult": ".request"}


def __getattr__(name: str) -> Any:
    # Imported on first use (PEP 562): `optc --help` reads the commands of this package, and torch takes a second.
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name], __name__), name)
