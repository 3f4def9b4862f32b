"""What restricts or biases a request's next token: masks, biases and penalties on its row of logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import RequestError
from .grammar import Matcher
from .params import SamplingParams


class TokenCounts:
    """The distinct tokens of a request and how often its completion holds each, for the penalties."""

    def __init__(self, prompt_token_ids: Sequence[int]) -> None:
        distinct = np.unique(np.array(prompt_token_ids, np.int64))
        self._size = len(distinct)
        self._tokens = np.zeros(max(64, 2 * self._size), np.int64)
        self._tokens[: self._size] = distinct
        self._counts = np.zeros(len(self._tokens), np.float32)
        self._places = {token: place for place, token in enumerate(distinct.tolist())}

    def add(self, token: int) -> None:
        place = self._places.setdefault(token, self._size)
        if place == self._size:
            if place == len(self._tokens):
                self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._tokens[place] = token
            self._size += 1
        self._counts[place] += 1

    @property
    def tokens(self) -> np.ndarray:
        """i64[D], distinct."""
        return self._tokens[: self._size]

    @property
    def counts(self) -> np.ndarray:
        """f32[D]: occurrences of `tokens` in the completion."""
        return self._counts[: self._size]


class Constraints:
    """What one request has of them, and what of its tokens they depend on.

    Args:
        params: of the request.
        prompt_token_ids: its prompt.
        end_ids: tokens that end it: end-of-sequence tokens unless they are ignored, and its own stop tokens.
        bad_words: token sequences that must not occur.
        matcher: state of its structured output.
        vocab_size: of the model.

    Raises:
        RequestError: a token id that the model does not have.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        *,
        end_ids: frozenset[int],
        bad_words: Sequence[Sequence[int]],
        matcher: Matcher | None,
        vocab_size: int,
    ) -> None:
        self.params, self.matcher = params, matcher
        self.counts = TokenCounts(prompt_token_ids) if params.has_penalties else None
        # By the number of tokens before the last one: which last tokens are bad behind them.
        self._bad_words: dict[int, dict[tuple[int, ...], list[int]]] = {}
        for *before, last in bad_words:
            self._bad_words.setdefault(len(before), {}).setdefault(tuple(before), []).append(last)
        self._banned_ends = np.array(sorted(end_ids), np.int64) if params.min_tokens else None
        self._allowed: np.ndarray | None = None
        if params.allowed_token_ids is not None:
            self._allowed = np.ones(vocab_size, bool)
            self._allowed[list(params.allowed_token_ids)] = False
        bias = params.logit_bias or {}
        self._biased = np.array(list(bias), np.int64)
        self._biases = np.array(list(bias.values()), np.float32)

    @staticmethod
    def are_wanted(params: SamplingParams) -> bool:
        """Whether a request of these parameters has any. One that has none costs nothing."""
        return bool(
            params.has_penalties
            or params.min_tokens
            or params.bad_words
            or params.logit_bias
            or params.allowed_token_ids is not None
            or params.structured is not None
        )

    def observe(self, token: int) -> None:
        """`token` was chosen.

        Raises:
            RequestError: the grammar does not go on with it.
        """
        if self.counts is not None:
            self.counts.add(token)
        if self.matcher is not None:
            self.matcher.consume(token)

    @property
    def is_complete(self) -> bool:
        """Whether the structured output is whole, and nothing may follow."""
        return self.matcher is not None and self.matcher.is_complete

    def mask(self, row: np.ndarray, token_ids: Sequence[int], num_outputs: int) -> None:
        """Set the logits f32[V] of tokens that must not come next to minus infinity, and add biases.

        Args:
            row: changed.
            token_ids: prompt and completion.
            num_outputs: how many of the last of them are the completion.
        """
        if self.matcher is not None:
            row[~self.matcher.allowed(len(row))] = -np.inf
        if self._allowed is not None:
            row[self._allowed] = -np.inf
        for count, bad_behind in self._bad_words.items():
            if count <= num_outputs:
                row[bad_behind.get(tuple(token_ids[len(token_ids) - count :]), [])] = -np.inf
        if self._banned_ends is not None and num_outputs < self.params.min_tokens:
            row[self._banned_ends] = -np.inf
        if len(self._biased):
            row[self._biased] += self._biases


def penalize(table: np.ndarray, rows: Sequence[int], constraints: Sequence[Constraints]) -> None:
    """Apply repetition, presence and frequency penalties to rows of logits f32[L, V], all rows at once."""
    counts = [each.counts for each in constraints]
    assert None not in counts
    sizes = [len(each.tokens) for each in counts if each is not None]
    at = np.repeat(rows, sizes), np.concatenate([each.tokens for each in counts if each is not None])
    occurrences = np.concatenate([each.counts for each in counts if each is not None])

    def spread(name: str) -> np.ndarray:
        return np.repeat(np.array([getattr(each.params, name) for each in constraints], np.float32), sizes)

    values, repetition = table[at], spread("repetition_penalty")
    values = np.where(values > 0, values / repetition, values * repetition)
    values -= spread("frequency_penalty") * occurrences + spread("presence_penalty") * (occurrences > 0)
    table[at] = values


def check_token_ids(params: SamplingParams, vocab_size: int) -> None:
    """Refuse ids of `params` that the model does not have.

    Raises:
        RequestError: names the field and the id.
    """
    for name in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
        if wrong := [token for token in getattr(params, name) or () if token >= vocab_size]:
            raise RequestError(f"{name}: token id {wrong[0]}: expected 0 to {vocab_size - 1}")
