"""A request on its way through the engine, and what it gives."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ..errors import OptcError
from .params import RequestOptions, SamplingParams

if TYPE_CHECKING:
    from .logits import Constraints
    from .text import CompletionText

FinishReason = Literal["stop", "length", "abort", "timeout", "error"]
Logprobs = dict[int, float]


@dataclass(eq=False)  # a request is itself alone; comparing tokens would be slow and wrong
class Request:
    """One sequence. Of `n` completions of a prompt, each is one; the first computes the prompt, and the rest fork from it.

    Attributes:
        token_ids: the prompt and what was generated so far.
        num_computed: how many of them have their keys and values in the cache.
        blocks: physical blocks of the sequence, in order.
        num_freed: how many of the first of them were given back, since they slid out of every window.
        prefix_root: what its first block's digest starts from.
        block_hashes: digests of its full blocks, as far as they were needed.
        num_prompt_run: prompt tokens that have run or were found, up to the last one that ran.
        num_cached: tokens that were found in the prefix cache when it was first admitted.
        forks: further completions of the prompt, until it is computed.
        group: all completions of the prompt, this one included.
        end_ids: tokens that end it.
        constraints: what restricts its tokens; None if nothing does.
        text: the completion's text as it grows, where stop strings need it.
        finish_reason: stop (an end token, a stop token or a stop text), length, abort, timeout or error; None while it runs.
        error: why it ended, for timeout and error.
    """

    request_id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    token_ids: list[int]
    options: RequestOptions = field(default_factory=RequestOptions)
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    num_freed: int = 0
    prefix_root: bytes = b""
    block_hashes: list[bytes] = field(default_factory=list)
    num_prompt_run: int = 0
    num_cached: int = 0
    num_preemptions: int = 0
    forks: list[Request] = field(default_factory=list)
    group: list[Request] = field(default_factory=list)
    end_ids: frozenset[int] = frozenset()
    constraints: Constraints | None = None
    text: CompletionText | None = None
    logprobs: list[Logprobs] = field(default_factory=list)
    prompt_logprobs: list[Logprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: OptcError | None = None
    arrived: float = field(default_factory=time.monotonic)
    admitted: float | None = None
    first_token: float | None = None
    finished: float | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def is_timed(self) -> bool:
        """Whether it has a deadline."""
        return self.options.timeout is not None or self.options.queue_timeout is not None

    @property
    def next_deadline(self) -> float:
        """When it is late for something, in seconds of the monotonic clock."""
        options = self.options
        waits = options.queue_timeout if self.admitted is None else None
        return self.arrived + min(options.timeout or math.inf, waits or math.inf)

    def late_for(self, now: float) -> str | None:
        """What it is too late for at `now`, seconds of the monotonic clock; None if it is in time."""
        options, waited = self.options, now - self.arrived
        if options.timeout is not None and waited > options.timeout:
            return f"the request did not end within {options.timeout:g} s"
        if self.admitted is None and options.queue_timeout is not None and waited > options.queue_timeout:
            return f"the request was not begun within {options.queue_timeout:g} s"
        return None

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[len(self.prompt_token_ids) :]


@dataclass(frozen=True)
class RequestMetrics:
    """Times of a request in seconds, from its arrival on; None for what did not happen."""

    queued: float | None
    first_token: float | None
    finished: float | None
    num_cached_tokens: int
    num_preemptions: int

    @classmethod
    def of(cls, request: Request) -> RequestMetrics:
        def since(moment: float | None) -> float | None:
            return None if moment is None else moment - request.arrived

        return cls(
            since(request.admitted),
            since(request.first_token),
            since(request.finished),
            request.num_cached,
            request.num_preemptions,
        )


@dataclass(frozen=True)
class Completion:
    """One completion of a prompt.

    Attributes:
        text: the completion, or None if the artifact has no tokenizer.
        token_ids: its tokens, an end token included.
        finish_reason: stop, length, abort, timeout or error.
        logprobs: for each token, natural log-probabilities by token id: of the token itself and of the most likely
            ones; None unless asked for. They are of the model, before anything of `SamplingParams`.
        error: why it ended, for timeout and error; what was generated until then is kept.
    """

    text: str | None
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[Logprobs] | None
    error: str | None
    metrics: RequestMetrics = field(compare=False)


@dataclass(frozen=True)
class GenerationResult:
    """The completions of one prompt. The first one's fields can be read here as well.

    Attributes:
        completions: `n` of them.
        prompt_logprobs: for each prompt token after the first, as `Completion.logprobs`; None unless asked for.
    """

    prompt_token_ids: list[int]
    completions: list[Completion]
    prompt_logprobs: list[Logprobs] | None

    @property
    def text(self) -> str | None:
        return self.completions[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        return self.completions[0].finish_reason

    @property
    def logprobs(self) -> list[Logprobs] | None:
        return self.completions[0].logprobs

    @property
    def error(self) -> str | None:
        return self.completions[0].error
