"""A completion's text as it grows, up to the first of its stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from .tokenizer import Detokenizer


class CompletionText:
    """Text that can be given out while the completion still grows; the pieces join to the whole.

    What may be the beginning of a stop string is held back until it is known not to be one.

    Args:
        detokenizer: of this completion.
        start: how many tokens the prompt has.
        stop: the text ends before the first of these; of several that end with the same token, the one that begins first.
        include_stop: or behind it.
        min_tokens: no stop string is looked for in so many first tokens.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        stop: Sequence[str] = (),
        *,
        start: int = 0,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._detokenizer, self._stop, self._include_stop = detokenizer, stop, include_stop
        self._longest = max(map(len, stop), default=0)
        self._read, self._search_from = start, start + min_tokens
        self._searched = 0  # a stop string that begins before this would have been found
        self._text = ""
        self.is_stopped = False
        self.safe_length = 0

    def catch_up(self, token_ids: Sequence[int], end: int | None = None, *, ended: bool = False) -> None:
        """Take the tokens, the prompt's included, up to `end` that are new since the last call; `ended` if no more come."""
        end = len(token_ids) if end is None else end
        while self._read < end and not self.is_stopped:
            piece = self._detokenizer.push(token_ids[self._read])
            self._read += 1
            self._append(piece)
        if ended and not self.is_stopped:
            self._append(self._detokenizer.flush())
            self.safe_length = len(self._text)

    def _append(self, piece: str) -> None:
        self._text += piece
        if not self._stop:
            self.safe_length = len(self._text)
            return
        if self._read < self._search_from:
            self._searched = len(self._text)
            self.safe_length = len(self._text)
            return
        found = [(at, stop) for stop in self._stop if (at := self._text.find(stop, self._searched)) >= 0]
        if found:
            at, stop = min(found)
            self._text = self._text[: at + len(stop) if self._include_stop else at]
            self.is_stopped = True
            self.safe_length = len(self._text)
            return
        self._searched = max(self._searched, len(self._text) - self._longest + 1)
        self.safe_length = len(self._text) - self._held_back()

    def _held_back(self) -> int:
        """The length of the longest end of the text that a stop string begins with."""
        end = len(self._text)
        earliest = end
        for stop in self._stop:
            at = self._text.find(stop[0], max(self._searched, end - len(stop) + 1))
            while 0 <= at < earliest and not stop.startswith(self._text[at:]):
                at = self._text.find(stop[0], at + 1)
            if at >= 0:
                earliest = min(earliest, at)
        return end - earliest

    def since(self, given: int) -> str:
        """What can be given out behind the first `given` characters."""
        return self._text[given : self.safe_length]
