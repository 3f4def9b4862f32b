"""A request on its way through the engine, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .params import SamplingParams

FinishReason = Literal["stop", "length"]


@dataclass(eq=False)  # a request is itself alone; comparing tokens would be slow and wrong
class Request:
    """One sequence.

    Attributes:
        token_ids: the prompt and what was generated so far.
        num_computed: how many of them have their keys and values in the cache.
        blocks: physical blocks of the sequence, in order.
        finish_reason: stop (an end token) or length; None while it runs.
    """

    request_id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    token_ids: list[int]
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[len(self.prompt_token_ids) :]


@dataclass(frozen=True)
class GenerationResult:
    """The completion of one prompt.

    Attributes:
        text: the completion, or None if the artifact has no tokenizer.
        token_ids: its tokens, an end token included.
        finish_reason: stop (an end token) or length.
        logprobs: for each token, natural log-probabilities by token id: of the token itself and of the most likely
            ones; None unless asked for. They are of the model, before temperature, top-k and top-p.
    """

    prompt_token_ids: list[int]
    text: str | None
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[dict[int, float]] | None
