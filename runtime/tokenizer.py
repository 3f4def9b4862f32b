"""Text to tokens and back, and chat templates. All with the artifact's own files; no transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import ArtifactError, RequestError
from .manifest import TokenizerRecord

_CONTEXT = 8  # prompt tokens that a decoder may need to see: a byte-level character has at most four
_REPLACEMENT = "\ufffd"
_UNFINISHED = 3  # most bytes, and so tokens, of an unfinished UTF-8 character
_LONGEST_GARBAGE = 64  # tokens that are no text after which decoding starts anew


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
        """The tokens of `text`.

        Raises:
            RequestError: the text holds a lone surrogate.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(f"the text is not valid Unicode: lone surrogate at character {error.start}") from error
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
        """Apply the chat template to `messages`; see the function `render_chat`.

        Raises:
            RequestError: no chat template, malformed messages, or the template refuses them.
        """
        if self._template is None:
            raise RequestError("this artifact has no chat template; use generate with a prompt")
        return render_chat(
            self._template,
            messages,
            bos_token=self.record.bos_token,
            eos_token=self.record.eos_token,
            add_generation_prompt=add_generation_prompt,
            **variables,
        )


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos_token: str | None,
    eos_token: str | None,
    add_generation_prompt: bool = True,
    **variables: object,
) -> str:
    """Apply a chat template to `messages`, each {"role": ..., "content": ...}.

    The template comes from the checkpoint, so it runs in jinja2's immutable sandbox.

    Raises:
        RequestError: malformed messages, or the template refuses them.
    """
    right = isinstance(messages, Sequence) and len(messages) > 0
    if not right or not all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in messages):
        raise RequestError('messages: expected a list of {"role": ..., "content": ...}, at least one')
    try:
        # A template sees data, never the caller's objects.
        plain = json.loads(json.dumps(list(map(dict, messages))))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"messages: expected what JSON can say: {error}") from error
    try:
        return _environment().from_string(template).render(
            messages=plain,
            add_generation_prompt=add_generation_prompt,
            bos_token=bos_token or "",
            eos_token=eos_token or "",
            **{"tools": None, "documents": None, **variables},
        )  # fmt: skip
    except jinja2.TemplateError as error:
        raise RequestError(f"the chat template refuses these messages: {error}") from error
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
        raise RequestError(f"the chat template failed on these messages: {error}") from error


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's part for training; here it is just its content."""

    tags = {"generation"}  # noqa: RUF012  as the base class declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        # A scope of its own, as in transformers, where the block is a call.
        return [nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True))]


def _environment() -> ImmutableSandboxedEnvironment:
    """What templates written for transformers expect to find."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    extensions = [loopcontrols, _Generation]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda fmt: datetime.now().strftime(fmt)
    return environment


class Detokenizer:
    """Text of one completion, token by token.

    A piece is given out once it can no longer change: bytes of an unfinished UTF-8 character wait for the rest. The
    pieces, `flush` included, join to the text of the completion. A character that the prompt left unfinished belongs
    to the completion. Each token is decoded behind those of the piece before, for decoders that strip leading spaces.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        # A context that begins or ends inside a character may decode to nothing but replacement characters, so take the
        # one that reads best, perhaps without its last tokens; and count as known what can be read.
        prompt = list(prompt_token_ids[-_CONTEXT - _UNFINISHED :])
        spare = max(0, len(prompt) - _CONTEXT)
        cuts = [(skipped, tail) for tail in range(_UNFINISHED + 1) for skipped in range(spare, -1, -1)]
        heads = {(skipped, tail): prompt[skipped : len(prompt) - tail] for skipped, tail in cuts}
        best = min(cuts, key=lambda cut: self._decode(heads[cut]).count(_REPLACEMENT))
        self._ids = prompt[best[0] :]
        self._num_context = len(self._ids)
        self._known = max(len(self._decode(ids).rstrip(_REPLACEMENT)) for ids in (self._ids, heads[best]))
        self._given = self._known

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; "" if it only begins or continues a character."""
        self._ids.append(token_id)
        text, pending = self._decode(self._ids), len(self._ids) - self._num_context
        end = len(text.rstrip(_REPLACEMENT))
        if pending > _UNFINISHED:  # so many tokens are no unfinished character
            end = max(end, len(text) - _UNFINISHED)
        whole = not text.endswith(_REPLACEMENT)
        if whole and len(text) <= self._known:  # a token without text, such as a special one
            del self._ids[self._num_context :]
            return ""
        piece = text[self._given : end]
        if whole or pending >= _LONGEST_GARBAGE:
            del self._ids[: self._num_context]
            self._num_context = len(self._ids)
            self._known = len(self._decode(self._ids))
            self._given = max(0, self._known - (len(text) - end))
        else:
            self._given = max(self._given, end)
        return piece

    def flush(self) -> str:
        """What is left when no more tokens come: unfinished bytes as replacement characters."""
        left = self._decode(self._ids)[self._given :]
        self._given += len(left)
        return left

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text
