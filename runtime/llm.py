"""`LLM`: an artifact as a Python object that completes prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
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
    """A compiled model.

        llm = LLM("qwen3.optc")
        print(llm.generate("Hello", max_tokens=32)[0].text)

    Args:
        path: artifact folder.
        native: use the artifact's native code. Off (`--no-native`), only data is loaded: the portable program over known
            ops, and safetensors. Native code of a stranger is a stranger's program.
        verify: hash every file even if the artifact was checked on this machine before.
        max_num_seqs, max_num_batched_tokens, kv_cache_memory: see `EngineConfig`.

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
    ) -> None:
        self.artifact = open_artifact(path, verify=verify)
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
            while any(request.finish_reason is None for request in requests):
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
        ids = self._encode(prompt)
        (request,) = self._add_all([ids], _params(params, options))
        return self._pieces(tokenizer, request)

    def _pieces(self, tokenizer: Tokenizer, request: Request) -> Iterator[str]:
        detokenizer = tokenizer.detokenizer(request.prompt_token_ids)
        try:
            while request.finish_reason is None:
                if request in self.engine.step() and (piece := detokenizer.push(request.token_ids[-1])):
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
        **options: Any,
    ) -> list[GenerationResult]:
        """Answer a conversation, or several, through the model's chat template.

        Args:
            messages: `{"role": "user", "content": "..."}` and so on; or a list of such conversations.

        Raises:
            RequestError: no chat template, or messages it refuses; and as `generate`.
        """
        if not isinstance(messages, Sequence) or not messages:
            raise RequestError('messages: expected a list of {"role": ..., "content": ...}, at least one')
        conversations = [messages] if isinstance(messages[0], Mapping) else messages
        return self.generate([self.chat_prompt(c) for c in conversations], params, **options)  # type: ignore[arg-type]

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The token ids of a conversation, ready for the model's answer."""
        tokenizer = self._need_tokenizer("chat")
        return tokenizer.encode(tokenizer.render_chat(messages), add_special_tokens=False)

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
        self.engine.check_token_ids(ids)
        constants = self.engine.executor.constants
        program, _ = self.artifact.load_program(self.manifest.score.file, constants, torch.device("cpu"))
        tokens = torch.tensor(ids)
        logits = program(tokens[None], torch.arange(len(ids))[None])[0][0].float()
        found: list[float] = torch.log_softmax(logits[:-1], -1).gather(1, tokens[1:, None])[:, 0].tolist()
        return found

    def _encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            ids: object = prompt
            if not isinstance(ids, Sequence):
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
    return [prompts] if isinstance(prompts[0], int) else prompts  # type: ignore[list-item, return-value]
