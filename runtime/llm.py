"""`LLM`: an artifact as a Python object that completes prompts."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..errors import RequestError
from .artifact import open_artifact
from .engine import Engine, EngineConfig
from .params import SamplingParams
from .request import GenerationResult, Request
from .tokenizer import Tokenizer

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


class LLM:
    """A compiled model. Threads may share one.

        llm = LLM("qwen3.optc")
        print(llm.generate("Hello", max_tokens=32)[0].text)

    Args:
        path: artifact folder.
        native: use the artifact's native code. Off (`--no-native`), only data is loaded: the portable program over known
            ops, and safetensors. Native code of a stranger is a stranger's program.
        verify: hash every file even if the artifact was checked on this machine before.
        max_num_seqs, max_num_batched_tokens, kv_cache_memory: see `EngineConfig`.
        on_hash: called with the name of each file before it is hashed.

    Raises:
        ArtifactError: the artifact is damaged or does not fit this machine.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        native: bool = True,
        verify: bool = False,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 512,
        kv_cache_memory: int | None = None,
        on_hash: Callable[[str], None] = lambda file: None,
    ) -> None:
        self.artifact = open_artifact(path, verify=verify, on_hash=on_hash)
        self.manifest = self.artifact.manifest
        record = self.manifest.tokenizer
        self.tokenizer = Tokenizer(self.artifact.path, record) if record else None
        config = EngineConfig(
            max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, kv_cache_memory=kv_cache_memory
        )
        self.engine = Engine(self.artifact, config, native=native)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None, **options: Any
    ) -> list[GenerationResult]:
        """Complete prompts, all in one continuously batched run.

        Args:
            prompts: a text or a list of token ids, or a list of such.
            params: for all prompts.
            **options: fields of `SamplingParams`, over those of `params`.

        Returns:
            One result a prompt, in order.

        Raises:
            RequestError: an empty prompt, one that is too long, ids out of range, a wrong option, or text without a
                tokenizer. Nothing was generated then.
        """
        chosen = _params(params, options)
        requests = self._add_all([self._encode(prompt) for prompt in _as_list(prompts)], chosen)
        try:
            for request in requests:
                while request.finish_reason is None:
                    self.engine.step()
        except BaseException:
            self.engine.abort(requests)
            raise
        return [self._result(request) for request in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> Iterator[str]:
        """Complete one prompt, yielding its text as it comes; pieces join to the text that `generate` gives.

        Raises:
            RequestError: as `generate`, before the first piece.
        """
        tokenizer = self._need_tokenizer("streaming text")
        chosen = _params(params, options)
        ids = self._encode(prompt)
        self.engine.abort(self._add_all([ids], chosen))  # refuse now what would be refused at the first piece
        return self._pieces(tokenizer, ids, chosen)

    def _pieces(self, tokenizer: Tokenizer, prompt: list[int], params: SamplingParams) -> Iterator[str]:
        detokenizer = tokenizer.detokenizer(prompt)
        (request,) = self._add_all([prompt], params)
        given = 0
        try:
            while request.finish_reason is None or given < request.num_output_tokens:
                # Other callers step the engine too, so there may be none or several new tokens.
                if given == request.num_output_tokens:
                    self.engine.step()
                for token in request.output_token_ids[given:]:
                    given += 1
                    if piece := detokenizer.push(token):
                        yield piece
            if piece := detokenizer.flush():
                yield piece
        finally:
            if request.finish_reason is None:
                self.engine.abort([request])

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
            **options: fields of `SamplingParams`, over those of `params`.

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

    @torch.inference_mode()
    def score(self, prompt: Prompt) -> list[float]:
        """Natural log-probability of each token after the first, given those before it, by the scoring program.

        Raises:
            RequestError: fewer than two tokens, more than the context length, or ids out of range.
        """
        ids = self._encode(prompt)
        limit = self.manifest.model.max_model_len
        if not 2 <= len(ids) <= limit:
            raise RequestError(f"{len(ids)} tokens to score: expected 2 to {limit}")
        tokens = torch.tensor(self.engine.check_token_ids(ids))
        logits = self._scoring_program(tokens[None], torch.arange(len(ids))[None])[0][0].float()
        found: list[float] = torch.log_softmax(logits[:-1], -1).gather(1, tokens[1:, None])[:, 0].tolist()
        return found

    @cached_property
    def _scoring_program(self) -> Callable[..., Any]:
        constants = self.engine.executor.constants
        program, _ = self.artifact.load_program(self.manifest.score.file, constants, torch.device("cpu"))
        return program

    def _encode(self, prompt: Prompt) -> list[int]:
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

    def _add_all(self, prompts: list[list[int]], params: SamplingParams) -> list[Request]:
        requests: list[Request] = []
        try:
            for number, ids in enumerate(prompts):
                requests.append(self.engine.add(ids, _seeded(params, number)))
        except RequestError:
            self.engine.abort(requests)
            raise
        return requests

    def _result(self, request: Request) -> GenerationResult:
        assert request.finish_reason is not None
        text = None
        if self.tokenizer is not None:
            detokenizer = self.tokenizer.detokenizer(request.prompt_token_ids)
            text = "".join([*map(detokenizer.push, request.output_token_ids), detokenizer.flush()])
        logprobs = request.logprobs if request.params.logprobs is not None else None
        return GenerationResult(
            request.prompt_token_ids, text, request.output_token_ids, request.finish_reason, logprobs
        )


def _params(params: SamplingParams | None, options: Mapping[str, Any]) -> SamplingParams:
    try:
        return replace(params or SamplingParams(), **options)
    except TypeError as error:
        known = ", ".join(SamplingParams.__dataclass_fields__)
        raise RequestError(f"unknown sampling option among {sorted(options)}; known: {known}") from error


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
