"""Structured output: grammars, and where a completion stands in one. The grammar engine is llguidance."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import RequestError, UsageError
from .params import StructuredOutput

if TYPE_CHECKING:
    import llguidance

DEADLINE = 5.0  # seconds that a grammar may take to compile
START_DEADLINE = 60.0  # and the worker to start, which reads the tokenizer
LONGEST = 2**20  # bytes of a grammar
DEEPEST = 64  # levels of a JSON schema
CACHED = 256  # grammars kept compiled


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


class GrammarCompiler:
    """Makes matchers for an artifact's tokenizer. Threads may share it.

    A grammar comes from whoever sends a request. So it is first compiled in a worker process, which is killed when it
    takes too long, or too much memory; one that passed there is compiled here, and the last ones are kept.

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
            from . import grammar_worker
        except ModuleNotFoundError as error:
            raise UsageError('structured output needs llguidance: pip install "optc[grammar]"') from error
        self._grammar_of = grammar_worker.grammar_of
        self._arguments = [str(tokenizer), str(vocab_size), *map(str, end_ids)]
        self._tokenizer = grammar_worker.make_tokenizer(str(tokenizer), vocab_size, list(end_ids))
        self._deadline = deadline
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[str] | None = None
        self._kept: OrderedDict[tuple[str, str], llguidance.LLMatcher] = OrderedDict()

    def matcher(self, structured: StructuredOutput) -> Matcher:
        """A matcher at the start of a grammar.

        Raises:
            RequestError: the grammar is malformed, uses what cannot be enforced, or takes too long to compile.
        """
        import llguidance

        kind, text = _key(structured)
        with self._lock:
            if (kind, text) not in self._kept:
                self._check(kind, text)
                self._kept[kind, text] = llguidance.LLMatcher(
                    self._tokenizer, self._grammar_of(kind, text), log_level=0
                )
                while len(self._kept) > CACHED:
                    self._kept.popitem(last=False)
            self._kept.move_to_end((kind, text))
            return Matcher(self._kept[kind, text].deep_copy())

    def close(self) -> None:
        """End the worker process."""
        with self._lock:
            self._stop_worker()

    def _check(self, kind: str, text: str) -> None:
        """Compile in the worker, within the deadline."""
        if self._worker is None or self._worker.poll() is not None:
            self._start_worker()
        assert self._worker is not None and self._worker.stdin is not None
        try:
            self._worker.stdin.write(json.dumps({"kind": kind, "text": text}) + "\n")
            self._worker.stdin.flush()
            answer = self._read(self._deadline)
        except (BrokenPipeError, EOFError) as error:
            self._stop_worker()
            raise RequestError(f"{kind}: too complex: compiling it took more memory than it may") from error
        except TimeoutError as error:
            self._stop_worker()
            raise RequestError(f"{kind}: too complex: compiling it took longer than {self._deadline:g} s") from error
        if answer is not None:
            raise RequestError(f"{kind}: {_first_line(answer)}")

    def _start_worker(self) -> None:
        import llguidance

        worker = Path(__file__).with_name("grammar_worker.py")
        # -I: nothing of the caller's folder or environment; where llguidance is, it is told.
        path = str(Path(llguidance.__file__).parent.parent)
        code = (
            f"import sys; sys.path += [{path!r}, {str(worker.parent)!r}]; import grammar_worker; grammar_worker.main()"
        )
        self._worker = subprocess.Popen(
            [sys.executable, "-I", "-c", code, *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self._read(START_DEADLINE)
        except (EOFError, TimeoutError) as error:
            self._stop_worker()
            raise RequestError("structured output: the process that compiles grammars does not start") from error

    def _read(self, seconds: float) -> str | None:
        """The worker's answer.

        Raises:
            TimeoutError: none came in time.
            EOFError: the worker died.
        """
        assert self._worker is not None and self._worker.stdout is not None
        if not select.select([self._worker.stdout], [], [], seconds)[0]:
            raise TimeoutError
        line = self._worker.stdout.readline()
        if not line:
            raise EOFError
        found: str | None = json.loads(line)["error"]
        return found

    def _stop_worker(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.wait()
            for stream in (self._worker.stdin, self._worker.stdout):
                assert stream is not None
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
            self._worker = None


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
