"""The model `optc` of lm-eval (EleutherAI's language model evaluation harness): its tasks run on an artifact.

lm-eval has no plug-ins: a model exists for it once the module that registers it was imported. `optc lm-eval` does that and
hands over to lm-eval's own command line; from Python, import this module before `lm_eval.simple_evaluate(model="optc")`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import tokenizers
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from ..errors import RequestError, UsageError
from ..runtime import LLM, SamplingParams
from ..runtime.artifact import open_artifact
from ..runtime.reader import CompletionReader
from ..runtime.request import Request
from ..runtime.scorer import Scored, Scorer
from ..runtime.tokenizer import Tokenizer
from .evaluate import special_prefix

_MAX_GEN_TOKS = 256  # lm-eval's own default
_AUTO = 64  # sequences in a step, as the engine's default


def main(arguments: Sequence[str]) -> None:
    """lm-eval's command line, which reads `sys.argv`."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm-eval", *arguments]
    cli_evaluate()


@register_model("optc")
class ArtifactLM(TemplateLM):
    """An artifact as a model of lm-eval.

    A text is scored behind what the tokenizer puts before texts (BOS), which is never predicted. In rolling
    log-likelihoods that is once before the text, not before each of its windows.

    Args:
        path: artifact folder.
        batch_size: most sequences in a step; `auto` is 64.
        max_batch_size: at most that.
        native: use native code; off, only data is loaded.
        max_length: most tokens of a sequence; the context length by default.
        device: lm-eval always gives one; it has no say, an artifact runs on the hardware it was compiled for.

    Raises:
        ArtifactError: the artifact is damaged or does not fit this machine.
        UsageError: it has no tokenizer, or an argument makes no sense.
    """

    def __init__(
        self,
        path: str,
        *,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        native: bool = True,
        max_length: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        self.artifact = open_artifact(path)
        manifest = self.artifact.manifest
        if manifest.tokenizer is None:
            raise UsageError(f"{path}: has no tokenizer, so it cannot be evaluated on texts")
        limit = manifest.model.max_model_len
        self.max_length = limit if max_length is None else max_length
        if not 2 <= self.max_length <= limit:
            raise UsageError(f"max_length {max_length}: expected 2 to {limit}, the context length")
        self.native = native
        self.max_num_seqs = _batch_size(batch_size, max_batch_size)
        self._text = Tokenizer(self.artifact.path, manifest.tokenizer)
        self._bos = manifest.tokenizer.bos_token
        self._prefix = special_prefix(
            tokenizers.Tokenizer.from_file(str(self.artifact.file(manifest.tokenizer.tokenizer)))
        )

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self.artifact, native=self.native, max_length=self.max_length, max_num_seqs=self.max_num_seqs)

    @cached_property
    def _llm(self) -> LLM:
        return LLM(self.artifact.path, native=self.native, max_num_seqs=self.max_num_seqs)

    @property
    def eot_token_id(self) -> int:
        ends = self.artifact.manifest.eos_token_ids
        return ends[0] if ends else self.prefix_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it: BOS, or the end token of models without BOS."""
        if self._prefix:
            return self._prefix[-1]
        if self._bos is not None:
            return self._text.encode(self._bos, add_special_tokens=False)[0]
        if not self.artifact.manifest.eos_token_ids:
            raise UsageError(f"{self.artifact.path}: has neither a BOS nor an end token to put before a text")
        return self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The tokens of a text, behind the tokenizer's prefix unless it is there already or unwanted."""
        ids = self._text.encode(string, add_special_tokens=False)
        has_it = self._bos is not None and string.startswith(self._bos)
        wanted = not has_it if add_special_tokens is None else add_special_tokens
        return [*self._prefix, *ids] if wanted else ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is the greedy one; longest first, so that memory fails early."""
        inputs, answers = [], [(0.0, True)] * len(requests)
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise RequestError(f"a continuation of {len(continuation)} tokens: expected at most {self.max_length}")
            whole = [*context, *continuation][-self.max_length - 1 : -1]
            inputs.append(Scored(whole, first=len(whole) - len(continuation)))
        order = sorted((n for n, request in enumerate(requests) if request[2]), key=lambda n: -len(inputs[n].token_ids))
        scored = self._scorer.score([inputs[number] for number in order])
        for number, logits in zip(order, tqdm(scored, total=len(order), disable=disable_tqdm), strict=True):
            key, _, continuation = requests[number]
            targets = torch.tensor(continuation)
            logprobs = torch.log_softmax(logits.double(), -1).gather(1, targets[:, None])
            answers[number] = (float(logprobs.sum()), bool((logits.argmax(-1) == targets).all()))
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answers[number])
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text, every token predicted once with as much before it as the context length allows."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[number] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Complete each context up to the first of its stop strings, all in one continuously batched run."""
        engine = self._llm.engine
        running: list[Request] = []
        for number, request in enumerate(requests):
            context, options = request.args
            params = _sampling(options, seed=number)
            room = self.max_length - params.max_tokens
            if room < 1:
                raise RequestError(f"max_gen_toks {params.max_tokens}: expected fewer than {self.max_length}")
            running.append(engine.add(self.tok_encode(context)[-room:] or [self.prefix_token_id], params))
        texts: list[str] = []
        for completion in tqdm(running, disable=disable_tqdm):
            while completion.finish_reason is None:
                engine.step()
            if completion.error is not None:
                raise completion.error
            texts.append(CompletionReader(completion, self._text).completion(has_text=True).text or "")
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as one text; without a generation prompt it ends where the last message does, to be continued."""
        text = self._text.render_chat(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's text, for lm-eval's records."""
        record = self.artifact.manifest.tokenizer
        assert record is not None
        if isinstance(chat_template, str):
            raise UsageError(f"chat template {chat_template!r}: an artifact has one, without a name")
        if not chat_template or record.chat_template is None:
            return None
        return self.artifact.file(record.chat_template).read_text(encoding="utf-8")

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's caches of requests go by."""
        return f"optc-{self.artifact.manifest.identity[:16]}"

    def get_model_info(self) -> dict[str, Any]:
        """For lm-eval's record of the run."""
        manifest = self.artifact.manifest
        return {"model_sha": manifest.identity, "model_num_parameters": manifest.model.parameters}


def _sampling(options: Mapping[str, Any], *, seed: int) -> SamplingParams:
    """lm-eval's generation arguments as sampling parameters."""
    given: dict[str, Any] = dict(normalize_gen_kwargs(dict(options), _MAX_GEN_TOKS))
    until = [stop for stop in given.pop("until") if stop]
    max_tokens, sample = given.pop("max_gen_toks"), given.pop("do_sample", False)
    temperature = float(given.pop("temperature", 1.0))
    known = {name: given.pop(name) for name in ("top_k", "top_p") if name in given}
    if given:
        raise RequestError(
            f"generation option {sorted(given)[0]!r}: expected until, max_gen_toks, do_sample, temperature, top_k, top_p"
        )
    return SamplingParams(
        max_tokens=max_tokens, temperature=temperature if sample else 0.0, seed=seed, stop=until, **known
    )


def _batch_size(batch_size: int | str, max_batch_size: int | None) -> int:
    text = str(batch_size)
    if text.startswith("auto"):
        return max_batch_size or _AUTO
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"batch_size {batch_size!r}: expected a whole number above 0, or auto")
    return int(text)
