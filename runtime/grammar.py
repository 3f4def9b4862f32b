"""Structured output: grammars, and where a completion stands in one. The grammar engine is llguidance."""

from __future__ import annotations

import json
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import OverloadedError, RequestError, UsageError
from .grammar_process import GrammarProcess
from .params import StructuredOutput

if TYPE_CHECKING:
    import llguidance

DEADLINE = 5.0  # seconds that a grammar may take to compile
LONGEST = 2**20  # bytes of a grammar
DEEPEST = 64  # levels of a JSON schema
KEPT, KEPT_CHARACTERS = 256, 2**24  # grammars kept compiled, and their lengths together
MOST_WAITING = 32  # grammars to be compiled
RETRY_AFTER = 60.0  # seconds before one that took too long is tried again


class Matcher:
    """Where one completion stands in its grammar."""

    def __init__(self, state: llguidance.LLMatcher) -> None:
        self._state = state

    def allowed(self, vocab_size: int) -> np.ndarray:
        """bool[vocab_size]: the tokens that may come next, end tokens where the completion may end.

        Raises:
            RequestError: the grammar is too complex to go on.
        """
        bits = np.frombuffer(self._state.compute_bitmask(), np.uint8)
        self._check()
        found = np.zeros(vocab_size, bool)
        mask = np.unpackbits(bits, bitorder="little")[:vocab_size].view(bool)
        found[: len(mask)] = mask
        return found

    def consume(self, token: int) -> None:
        """`token` was chosen.

        Raises:
            RequestError: it does not go on with it.
        """
        self._state.consume_token(token)
        self._check()

    @property
    def is_complete(self) -> bool:
        """Whether nothing but an end token may follow."""
        return bool(self._state.is_stopped())

    def _check(self) -> None:
        if self._state.is_error():
            raise RequestError(f"structured output: {_first_line(self._state.get_error())}")


@dataclass(frozen=True)
class _Refusal:
    """Why a grammar cannot be used, and until when that is believed, by the monotonic clock."""

    reason: str
    until: float = math.inf


class GrammarCompiler:
    """Makes matchers for an artifact's tokenizer. Threads may share it.

    A grammar comes from whoever sends a request. So it is first compiled in a worker process, which is killed when it
    takes too long, or too much memory; one that passed there is compiled here, and the last ones are kept, as is why one
    cannot be used. One is compiled at a time; those that are kept wait for nobody.

    Args:
        tokenizer: file of the tokenizer.
        vocab_size: of the model.
        end_ids: tokens that end a completion.
        deadline: seconds that a grammar may take.

    Raises:
        UsageError: llguidance is not installed.
    """

    def __init__(self, tokenizer: Path, *, vocab_size: int, end_ids: Sequence[int], deadline: float = DEADLINE) -> None:
        try:
            import llguidance

            from . import grammar_worker
        except ModuleNotFoundError as error:
            raise UsageError('structured output needs llguidance: pip install "optc[grammar]"') from error
        self._grammar_of = grammar_worker.grammar_of
        arguments = [str(tokenizer), str(vocab_size), *map(str, end_ids)]
        self._tokenizer = grammar_worker.make_tokenizer(str(tokenizer), vocab_size, list(end_ids))
        self._process = GrammarProcess(Path(llguidance.__file__).parent.parent, arguments, deadline)
        self._turn = threading.Lock()  # who compiles; the others wait for it
        self._books = threading.Lock()  # what is below, held for microseconds
        self._num_waiting = self._num_characters = 0
        self._kept: OrderedDict[tuple[str, str], llguidance.LLMatcher | _Refusal] = OrderedDict()

    def matcher(self, structured: StructuredOutput) -> Matcher:
        """A matcher at the start of a grammar.

        Raises:
            RequestError: the grammar is malformed, uses what cannot be enforced, or takes too long to compile.
            OverloadedError: too many others wait to be compiled.
            ClosedError: the compiler was closed.
        """
        key = _key(structured)
        if (found := self._find(key)) is not None:
            return found
        with self._books:
            if self._num_waiting >= MOST_WAITING:
                raise OverloadedError(f"{self._num_waiting} grammars wait to be compiled; try again later")
            self._num_waiting += 1
        try:
            with self._turn:
                if (found := self._find(key)) is None:  # by another, meanwhile
                    self._keep(key, self._compile(*key))
                    found = self._find(key)
            assert found is not None
            return found
        finally:
            with self._books:
                self._num_waiting -= 1

    def close(self) -> None:
        """End the worker process, and whatever waits for it."""
        self._process.close()

    def _find(self, key: tuple[str, str]) -> Matcher | None:
        """A matcher of a grammar that was compiled; None for one that was not.

        Raises:
            RequestError: it was, and cannot be used.
        """
        with self._books:
            found = self._kept.get(key)
            if found is None or (isinstance(found, _Refusal) and found.until < time.monotonic()):
                return None
            self._kept.move_to_end(key)
            if isinstance(found, _Refusal):
                raise RequestError(found.reason)
            return Matcher(found.deep_copy())

    def _compile(self, kind: str, text: str) -> llguidance.LLMatcher | _Refusal:
        """The grammar, or why it cannot be used."""
        import llguidance

        try:
            refusal = self._process.check(kind, text)
        except RequestError as error:  # the machine may have been busy, but copies of it must not take the time of all
            return _Refusal(str(error), until=time.monotonic() + RETRY_AFTER)
        if refusal is not None:
            return _Refusal(f"{kind}: {_first_line(refusal)}")
        return llguidance.LLMatcher(self._tokenizer, self._grammar_of(kind, text), log_level=0)

    def _keep(self, key: tuple[str, str], compiled: llguidance.LLMatcher | _Refusal) -> None:
        with self._books:
            if self._kept.pop(key, None) is None:
                self._num_characters += len(key[1])
            self._kept[key] = compiled
            while len(self._kept) > 1 and (len(self._kept) > KEPT or self._num_characters > KEPT_CHARACTERS):
                (_, text), _ = self._kept.popitem(last=False)
                self._num_characters -= len(text)


def _key(structured: StructuredOutput) -> tuple[str, str]:
    """The kind of a grammar and its text.

    Raises:
        RequestError: too long, or too deep.
    """
    if structured.json_schema is not None:
        assert isinstance(structured.json_schema, str)
        kind, text = "json_schema", structured.json_schema
        if (depth := _depth(json.loads(text))) > DEEPEST:
            raise RequestError(f"json_schema: {depth} levels deep: expected at most {DEEPEST}")
    elif structured.choice is not None:
        kind, text = "choice", json.dumps(list(structured.choice))
    elif structured.regex is not None:
        kind, text = "regex", structured.regex
    else:
        assert structured.grammar is not None
        kind, text = "grammar", structured.grammar
    if len(text) > LONGEST:
        raise RequestError(f"{kind}: {len(text)} characters: expected at most {LONGEST}")
    return kind, text


def _depth(value: object) -> int:
    deepest, level = 0, [value]
    while level:
        deepest += 1
        level = [
            inner
            for each in level
            for inner in (each.values() if isinstance(each, dict) else each if isinstance(each, list) else ())
        ]
    return deepest


def _first_line(message: str) -> str:
    return " ".join(message.split("\n\n")[0].split())[:300]
