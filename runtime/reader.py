"""What a reader gets of a request that an engine runs, at the reader's own pace."""

from __future__ import annotations

from dataclasses import dataclass, field

from .request import Completion, FinishReason, Logprobs, Request, RequestMetrics
from .text import CompletionText
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class RequestOutput:
    """What is new of one completion.

    Attributes:
        index: which of `n` completions.
        text: new text; "" if the artifact has no tokenizer, or the new tokens do not end a character yet.
        token_ids, logprobs: new tokens; log-probabilities as in `Completion`.
        finish_reason: None while more comes.
        error: why it ended, for timeout and error.
        metrics: with the last output.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[Logprobs] | None
    finish_reason: FinishReason | None
    error: str | None = None
    metrics: RequestMetrics | None = field(default=None, compare=False)


class CompletionReader:
    """Reads a request while an engine's thread appends to it.

    There is no queue in between: the request itself keeps its tokens, and a reader takes what is new since it last came.
    So a slow reader holds up nobody and costs no memory; it gets larger pieces. One thread may read while another runs
    the engine: the engine appends tokens and text first and sets `finish_reason` last, a reader looks the other way round.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer | None, index: int = 0) -> None:
        self.request, self._index = request, index
        self._own_text: CompletionText | None = None
        if request.text is None and tokenizer is not None:
            self._own_text = CompletionText(
                tokenizer.detokenizer(request.prompt_token_ids), start=len(request.prompt_token_ids)
            )
        self._num_tokens = self._num_characters = 0
        self.is_done = False

    def read(self) -> RequestOutput | None:
        """What is new; None if nothing is."""
        request, reason = self.request, self.request.finish_reason
        if self.is_done or (reason is None and request.num_output_tokens == self._num_tokens):
            return None
        begin, end = len(request.prompt_token_ids) + self._num_tokens, request.num_tokens
        new = request.token_ids[begin:end]
        text = self._text(end, ended=reason is not None)
        logprobs = None
        if request.params.logprobs is not None:
            logprobs = request.logprobs[self._num_tokens : self._num_tokens + len(new)]
        self._num_tokens += len(new)
        self.is_done = reason is not None
        return RequestOutput(
            index=self._index,
            text=text,
            token_ids=new,
            logprobs=logprobs,
            finish_reason=reason,
            error=str(request.error) if self.is_done and request.error is not None else None,
            metrics=RequestMetrics.of(request) if self.is_done else None,
        )

    def _text(self, end: int, *, ended: bool) -> str:
        """New text of the tokens up to `end`."""
        source = self.request.text
        if self._own_text is not None:
            source = self._own_text
            source.catch_up(self.request.token_ids, end, ended=ended)
        piece = source.since(self._num_characters) if source is not None else ""
        self._num_characters += len(piece)
        return piece

    def completion(self, has_text: bool) -> Completion:
        """All of a request that has ended and was not read yet."""
        output = self.read()
        assert output is not None and output.finish_reason is not None and output.metrics is not None
        return Completion(
            text=output.text if has_text else None,
            token_ids=output.token_ids,
            finish_reason=output.finish_reason,
            logprobs=output.logprobs,
            error=output.error,
            metrics=output.metrics,
        )
