"""What a request needs besides tokens: its grammar, its stop strings, its bad words."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from ..errors import ClosedError, RequestError
from .artifact import Artifact
from .grammar import GrammarCompiler, Matcher
from .logits import Constraints, check_token_ids
from .request import Request
from .text import CompletionText
from .tokenizer import Tokenizer


class Constrainer:
    """Prepares requests for an artifact's vocabulary. Threads may share it."""

    def __init__(self, artifact: Artifact, tokenizer: Tokenizer | None) -> None:
        self._artifact, self._tokenizer = artifact, tokenizer
        self._vocab_size = artifact.manifest.model.vocab_size
        self._end_ids = frozenset(artifact.manifest.eos_token_ids)
        self._compiler: GrammarCompiler | None = None
        self._lock = threading.Lock()
        self._is_closed = False

    def prepare(self, group: Sequence[Request]) -> None:
        """Fill in `end_ids`, `constraints` and `text` of the new completions of a prompt.

        Raises:
            RequestError: a token id out of range, bad words without tokens, a grammar that cannot be used, or something
                that needs a tokenizer where the artifact has none.
            OverloadedError: too many grammars wait to be compiled.
            UsageError: llguidance is not installed, and there is a grammar.
        """
        params, structured = group[0].params, group[0].params.structured
        check_token_ids(params, self._vocab_size)
        ends = frozenset(params.stop_token_ids)
        bad_words = self._bad_words(params.bad_words) if params.bad_words else ()
        for request in group:
            request.end_ids = ends if params.ignore_eos else ends | self._end_ids
            self._prepare(request, bad_words, self._grammars().matcher(structured) if structured else None)

    def _prepare(self, request: Request, bad_words: Sequence[Sequence[int]], matcher: Matcher | None) -> None:
        params = request.params
        if params.stop:
            request.text = CompletionText(
                self._need_tokenizer("stop").detokenizer(request.prompt_token_ids),
                tuple(params.stop),
                start=len(request.prompt_token_ids),
                include_stop=params.include_stop,
                min_tokens=params.min_tokens,
            )
        if Constraints.are_wanted(params):
            request.constraints = Constraints(
                params,
                request.prompt_token_ids,
                end_ids=request.end_ids,
                bad_words=bad_words,
                matcher=matcher,
                vocab_size=self._vocab_size,
            )

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            if self._compiler is not None:
                self._compiler.close()

    def _bad_words(self, words: Sequence[str]) -> list[list[int]]:
        tokenizer = self._need_tokenizer("bad_words")
        found: list[list[int]] = []
        for word in words:
            forms = [tokenizer.encode(text, add_special_tokens=False) for text in (word, f" {word}")]
            if not forms[0]:
                raise RequestError(f"bad_words: {word!r} has no tokens")
            found += [ids for ids in forms if ids and ids not in found]
        return found

    def _grammars(self) -> GrammarCompiler:
        self._need_tokenizer("structured output")
        record = self._artifact.manifest.tokenizer
        assert record is not None
        with self._lock:
            if self._is_closed:
                raise ClosedError("the engine was closed")
            if self._compiler is None:
                self._compiler = GrammarCompiler(
                    self._artifact.file(record.tokenizer),
                    vocab_size=self._vocab_size,
                    end_ids=sorted(self._end_ids),
                )
            return self._compiler

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self._tokenizer is None:
            raise RequestError(f"{what} needs a tokenizer, and the checkpoint of this artifact had none")
        return self._tokenizer
