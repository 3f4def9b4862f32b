"""Text to tokens and back, and chat templates. All with the artifact's own files; no transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers.decoders import DecodeStream

from ..errors import ArtifactError, RequestError
from .manifest import TokenizerRecord

_CONTEXT = 8  # prompt tokens that a decoder may need to see: a byte-level character has at most four


class Tokenizer:
    """An artifact's tokenizer and chat template.

    Raises:
        ArtifactError: the tokenizer file cannot be read.
    """

    def __init__(self, folder: Path, record: TokenizerRecord) -> None:
        self.record = record
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / record.tokenizer))
        except Exception as error:
            raise ArtifactError(f"{folder / record.tokenizer}: not a readable tokenizer: {error}") from error
        template = record.chat_template
        self._template = (folder / template).read_text(encoding="utf-8") if template else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of the tokens, special tokens left out."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def detokenizer(self, prompt_token_ids: Sequence[int]) -> Detokenizer:
        return Detokenizer(self._tokenizer, prompt_token_ids)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: object
    ) -> str:
        """Apply the chat template to `messages`, each {"role": ..., "content": ...}.

        The template comes from the checkpoint, so it runs in jinja2's immutable sandbox.

        Raises:
            RequestError: no chat template, malformed messages, or the template refuses them.
        """
        if self._template is None:
            raise RequestError("this artifact has no chat template; use generate with a prompt")
        if not messages or not all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in messages):
            raise RequestError('messages: expected a list of {"role": ..., "content": ...}, at least one')
        try:
            template = _environment().from_string(self._template)
            return template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                bos_token=self.record.bos_token or "",
                eos_token=self.record.eos_token or "",
                **variables,
            )
        except jinja2.TemplateError as error:
            raise RequestError(f"the chat template refuses these messages: {error}") from error
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise RequestError(f"the chat template failed on these messages: {error}") from error


def _environment() -> ImmutableSandboxedEnvironment:
    """What templates written for transformers expect to find."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda fmt: datetime.now().strftime(fmt)
    return environment


class Detokenizer:
    """Text of one completion, token by token.

    A piece is given out once it can no longer change: bytes of an unfinished UTF-8 character wait for the rest. The
    pieces, `flush` included, join to the text of the completion.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        context = list(prompt_token_ids[-_CONTEXT:])
        self._stream = DecodeStream(ids=context, skip_special_tokens=True)
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; "" if it only begins or continues a character."""
        self._pending.append(token_id)
        piece = self._stream.step(self._tokenizer, token_id)
        if piece is None:
            return ""
        self._pending.clear()
        return str(piece)

    def flush(self) -> str:
        """What is left when no more tokens come: unfinished bytes as replacement characters."""
        left: str = self._tokenizer.decode(self._pending, skip_special_tokens=True) if self._pending else ""
        self._pending.clear()
        return left
