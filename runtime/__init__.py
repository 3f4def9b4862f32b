"""The lean runtime: loads artifacts and generates. It needs no transformers and no compiler."""

from .llm import LLM
from .params import SamplingParams
from .request import GenerationResult

__all__ = ["LLM", "GenerationResult", "SamplingParams"]
