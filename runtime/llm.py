"""`LLM`: an artifact as a Python object that completes prompts."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..errors import ExecutionError, RequestError
from .artifact import open_artifact
from .engine import Engine
from .engine_config import EngineConfig
from .params import RequestOptions, SamplingParams, split_options
from .reader import CompletionReader
from .request import GenerationResult, Request
from .stats import EngineStats
from .tokenizer import Tokenizer

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


class LLM:
    """A compiled model. Threads may share one; a process forked from one that has it may not use it.

        with LLM("qwen3.optc") as llm:
            print(llm.generate("Hello", max_tokens=32)[0].text)

    Args:
        path: artifact folder.
        native: use the artifact's native code. Off (`--no-native`), only data is loaded: the portable program over known
            ops, and safetensors. Native code of a stranger is a stranger's program.
        verify: hash every file even if the artifact was checked on this machine before.
        on_hash: called with the name of each file before it is hashed.
        **limits: fields of `EngineConfig`.

    Raises:
        ArtifactError: the artifact is damaged or does not fit this machine.
        UsageError: a limit that makes no sense.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        native: bool = True,
        verify: bool = False,
        on_hash: Callable[[str], None] = lambda file: None,
        **limits: Any,
    ) -> None:
        config = EngineConfig(**limits)
        self.artifact = open_artifact(path, verify=verify, on_hash=on_hash)
        self.manifest = self.artifact.manifest
        self.engine = Engine(self.artifact, config, native=native)
        self.tokenizer = self.engine.tokenizer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop requests that have not finished, and end helper processes."""
        self.engine.close()

    def stats(self) -> EngineStats:
        """What the engine has done, and how it stands."""
        return self.engine.stats()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        progress: bool | None = None,
        **options: Any,
    ) -> list[GenerationResult]:
        """Complete prompts, all in one continuously batched run.

        Args:
            prompts: a text or a list of token ids, or a list of such.
            params: for all prompts.
            progress: show a progress bar on standard error; by default for several prompts on a terminal.
            **options: fields of `SamplingParams`, over those of `params`, and of `RequestOptions`.

        Returns:
            One result a prompt, in order. What went wrong with one prompt alone is in its `error`.

        Raises:
            RequestError: an empty prompt, one that is too long, ids out of range, a wrong option, or text without a
                tokenizer. Nothing was generated then.
            OverloadedError: the engine has a queue limit, and it does not hold these prompts.
        """
        chosen, treatment = make_params(params, options)
        requests = self._add_all([self.encode(prompt) for prompt in _as_list(prompts)], chosen, treatment)
        if progress is None:
            progress = len(requests) > 1 and sys.stderr.isatty()
        try:
            self._finish_all(requests, progress)
        except BaseException:
            self._abort(requests)
            raise
        return [self._result(request) for request in requests]

    def _finish_all(self, requests: Sequence[Request], progress: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[speed]}"))
        before = self.engine.counters.generated_tokens
        with Progress(*columns, console=Console(stderr=True), disable=not progress, transient=True) as bar:
            task = bar.add_task("", total=len(requests), speed="")
            for request in requests:
                while any(member.finish_reason is None for member in request.group):
                    self.engine.step()
                if progress:
                    elapsed = bar.tasks[0].elapsed or 1e-9
                    speed = (self.engine.counters.generated_tokens - before) / elapsed
                    bar.update(task, advance=1, speed=f"{speed:.0f} tokens/s")

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> Iterator[str]:
        """Complete one prompt, yielding its text as it comes; pieces join to the text that `generate` gives.

        Raises:
            RequestError: as `generate`, before the first piece; or `n` above 1.
            OptcError: what went wrong with the request, behind the last piece.
        """
        self._need_tokenizer("streaming text")
        chosen, treatment = make_params(params, options)
        if chosen.n > 1:
            raise RequestError(f"n={chosen.n}: expected 1 for a stream")
        pieces = self._pieces(self.encode(prompt), chosen, treatment)
        next(pieces)  # adds the request, so what is wrong with it is raised here; dropped, it ends the request
        return pieces

    def _pieces(self, prompt: list[int], params: SamplingParams, treatment: RequestOptions) -> Iterator[str]:
        (request,) = self._add_all([prompt], params, treatment)
        reader = CompletionReader(request, self.tokenizer)
        try:
            yield ""
            if params.echo:
                yield self._need_tokenizer("echo").decode(prompt)
            while not reader.is_done:
                # Other callers step the engine too, so there may be none or several new tokens.
                output = reader.read()
                if output is None:
                    self.engine.step()
                elif output.text:
                    yield output.text
            if request.error is not None:
                raise request.error
        finally:
            self._abort([request])

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | None = None,
        *,
        template_variables: Mapping[str, object] | None = None,
        **options: Any,
    ) -> list[GenerationResult]:
        """Answer a conversation, or several, through the model's chat template.

        Args:
            messages: `{"role": "user", "content": "..."}` and so on; or a list of such conversations.
            params: for all conversations.
            template_variables: what the template takes besides messages, such as `tools` or `enable_thinking`.
            **options: as `generate`.

        Raises:
            RequestError: no chat template, or messages it refuses; and as `generate`.
        """
        if not isinstance(messages, Sequence) or not messages:
            raise RequestError('messages: expected a list of {"role": ..., "content": ...}, at least one')
        conversations = [messages] if isinstance(messages[0], Mapping) else messages
        variables = dict(template_variables or {})
        prompts = [self.chat_prompt(conversation, **variables) for conversation in conversations]  # type: ignore[arg-type]
        return self.generate(prompts, params, **options)

    def chat_prompt(self, messages: Sequence[Message], **template_variables: Any) -> list[int]:
        """The token ids of a conversation, ready for the model's answer."""
        tokenizer = self._need_tokenizer("chat")
        return tokenizer.encode(tokenizer.render_chat(messages, **template_variables), add_special_tokens=False)

    def score(self, prompts: Prompt | Sequence[Prompt], *, progress: bool | None = None) -> list[list[float]]:
        """Natural log-probability of each token of each prompt after its first, given those before it.

        Raises:
            RequestError: fewer than two tokens, more than the context length, or ids out of range.
            ExecutionError: the model failed.
        """
        limit = self.manifest.model.max_model_len
        encoded = [self.encode(prompt) for prompt in _as_list(prompts)]
        for ids in encoded:
            if not 2 <= len(ids) <= limit:
                raise RequestError(f"{len(ids)} tokens to score: expected 2 to {limit}")
        results = self.generate(encoded, SamplingParams(max_tokens=0, prompt_logprobs=0), progress=progress)
        found: list[list[float]] = []
        for result in results:
            if result.error is not None:
                raise ExecutionError(result.error)
            assert result.prompt_logprobs is not None
            found.append(
                [entry[token] for entry, token in zip(result.prompt_logprobs, result.prompt_token_ids[1:], strict=True)]
            )
        return found

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt.

        Raises:
            RequestError: neither a text nor a list, an empty text, or a text and no tokenizer.
        """
        if not isinstance(prompt, str):
            ids: object = prompt
            if not isinstance(ids, Sequence) or isinstance(ids, bytes):
                raise RequestError(f"prompt {prompt!r}: expected a text or a list of token ids")
            return list(ids)
        if not prompt:
            raise RequestError("empty prompt")
        return self._need_tokenizer("a text prompt").encode(prompt)

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(
                f"{what} needs a tokenizer, and the checkpoint of this artifact had none; give token ids"
            )
        return self.tokenizer

    def _add_all(self, prompts: list[list[int]], params: SamplingParams, treatment: RequestOptions) -> list[Request]:
        if params.echo:
            self._need_tokenizer("echo")
        requests: list[Request] = []
        try:
            for number, ids in enumerate(prompts):
                requests.append(self.engine.add(ids, _seeded(params, number), treatment))
        except BaseException:
            self._abort(requests)
            raise
        return requests

    def _abort(self, requests: Sequence[Request]) -> None:
        self.engine.abort(member for request in requests for member in request.group if member.finish_reason is None)

    def _result(self, request: Request) -> GenerationResult:
        completions = [
            CompletionReader(member, self.tokenizer).completion(self.tokenizer is not None) for member in request.group
        ]
        if request.params.echo:
            text = self._need_tokenizer("echo").decode(request.prompt_token_ids)
            completions = [replace(each, text=text + (each.text or "")) for each in completions]
        reported = request.params.prompt_logprobs is not None
        return GenerationResult(request.prompt_token_ids, completions, request.prompt_logprobs if reported else None)


def make_params(params: SamplingParams | None, options: Mapping[str, Any]) -> tuple[SamplingParams, RequestOptions]:
    """Parameters with keyword arguments over them.

    Raises:
        RequestError: an unknown or a wrong option.
    """
    sampling, treatment = split_options(options)
    return replace(params or SamplingParams(), **sampling), RequestOptions(**treatment)


def _seeded(params: SamplingParams, number: int) -> SamplingParams:
    """Prompts of one call with one seed get different random numbers, the first the seed's own."""
    return params if params.seed is None or number == 0 else replace(params, seed=(params.seed + number) % 2**63)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise RequestError(f"prompts {prompts!r}: expected a text, a list of token ids, or a list of such")
    if not prompts:
        raise RequestError("no prompts")
    if isinstance(prompts, bytes) or isinstance(prompts[0], numbers.Integral):
        return [prompts]  # type: ignore[list-item]
    return prompts  # type: ignore[return-value]
