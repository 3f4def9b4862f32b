"""Stop strings: found wherever tokens break them, held back while they may still come, and nothing else is lost."""

from __future__ import annotations

from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optc.runtime.text import CompletionText
from optc.runtime.tokenizer import Detokenizer


class Pieces:
    """A detokenizer whose token i is piece i."""

    def __init__(self, pieces: list[str]) -> None:
        self._pieces = pieces

    def push(self, token_id: int) -> str:
        return self._pieces[token_id]

    def flush(self) -> str:
        return ""


def read(pieces: list[str], stop: list[str], **options: object) -> tuple[str, int, list[str]]:
    """The text, after how many tokens it ended, and the pieces that were given out."""
    text = CompletionText(cast(Detokenizer, Pieces(pieces)), stop, **options)  # type: ignore[arg-type]
    given: list[str] = []
    for count in range(len(pieces)):
        text.catch_up(list(range(count + 1)), ended=count + 1 == len(pieces))
        given.append(text.since(sum(map(len, given))))
        if text.is_stopped:
            return "".join(given), count + 1, given
    return "".join(given), len(pieces), given


def expected(pieces: list[str], stop: list[str], include: bool) -> tuple[str, int]:
    whole = ""
    for count, piece in enumerate(pieces, 1):
        whole += piece
        found = [(whole.find(each), each) for each in stop if each in whole]
        if found:
            at, each = min(found)
            return whole[: at + len(each) * include], count
    return whole, len(pieces)


@given(
    pieces=st.lists(st.text("abc", max_size=4), min_size=1, max_size=12),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
)
def test_any_text_in_any_pieces(pieces: list[str], stop: list[str], include: bool) -> None:
    text, count, given_out = read(pieces, stop, include_stop=include)
    assert (text, count) == expected(pieces, stop, include)
    # What was given out is never taken back, and only what may begin a stop string waits.
    whole = ""
    for number in range(count - 1):
        whole += pieces[number]
        shown = "".join(given_out[: number + 1])
        assert whole.startswith(shown)
        waiting = whole[len(shown) :]
        assert waiting == "" or any(each.startswith(waiting) for each in stop)


def test_no_stop_within_the_first_tokens() -> None:
    assert read(["a", "b", "a", "b"], ["ab"], min_tokens=3)[:2] == ("ab", 4)
    assert read(["a", "b", "c", "d"], ["ab"], min_tokens=3)[:2] == ("abcd", 4)


@pytest.mark.parametrize("include", [True, False])
def test_nothing_comes_behind_the_stop(include: bool) -> None:
    text = CompletionText(cast(Detokenizer, Pieces(["x", "END", "more"])), ["END"], include_stop=include)
    text.catch_up([0, 1, 2], ended=True)
    assert text.since(0) == ("xEND" if include else "x") and text.is_stopped
