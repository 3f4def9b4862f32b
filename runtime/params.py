"""What a caller can ask of a request: how its tokens are chosen, and how it is treated. Checked when it is made."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import RequestError

MAX_STOPS, MAX_STOP_LENGTH = 16, 1024
MAX_LIST = 4096  # entries of a list or a mapping of tokens
MAX_N = 64


@dataclass(frozen=True, kw_only=True)
class StructuredOutput:
    """What the completion must match; exactly one of these.

    Attributes:
        json_schema: a JSON schema, as a mapping or as JSON text. Keywords that cannot be enforced are refused by name.
        regex: a regular expression for all of the text, in the syntax of Rust's regex crate (no look-around).
        choice: texts, one of which is the completion.
        grammar: a context-free grammar in Lark's EBNF, its start rule `start`; or in llama.cpp's GBNF, with `root`.

    Raises:
        RequestError: none of them, several, or one that is no such thing.
    """

    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("json_schema", "regex", "choice", "grammar") if getattr(self, name) is not None]
        if len(given) != 1:
            raise RequestError(
                f"structured output: expected one of json_schema, regex, choice, grammar; got {given or 'none'}"
            )
        if self.json_schema is not None:
            try:
                schema = json.loads(self.json_schema) if isinstance(self.json_schema, str) else dict(self.json_schema)
                text = json.dumps(schema)
            except (TypeError, ValueError, RecursionError) as error:
                raise RequestError(f"json_schema: not JSON: {error}") from error
            _check("json_schema", text[:80], isinstance(schema, dict), "an object")
            object.__setattr__(self, "json_schema", text)
        if self.choice is not None:
            object.__setattr__(self, "choice", _texts("choice", self.choice, most=MAX_LIST, longest=MAX_LIST))
            _check("choice", self.choice, bool(self.choice), "at least one text")
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            _check(name, value, value is None or (isinstance(value, str) and bool(value)), "a text")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of a request are chosen.

    Logits go through, in this order: the structured output's mask, `allowed_token_ids`, `bad_words`, `min_tokens`,
    `logit_bias`, the penalties; then `temperature`, `top_k`, `top_p` and `min_p`.

    Attributes:
        n: completions of the prompt; it is computed once.
        max_tokens: most tokens to generate; the context length limits it further. 0 is for `prompt_logprobs` alone.
        min_tokens: no end token, stop token or stop string before so many.
        temperature: 0 takes the most likely token; above, logits are divided by it.
        top_k: sample among the k most likely tokens; 0 is all.
        top_p: sample among the fewest tokens whose probabilities add up to p (nucleus sampling, Holtzman et al. 2020).
        min_p: leave out tokens less likely than this share of the most likely one's probability.
        repetition_penalty: of tokens in the prompt or the completion, positive logits are divided by it and negative
            ones multiplied (Keskar et al. 2019).
        presence_penalty, frequency_penalty: taken from the logit of a token that the completion holds, once, and as often
            as it does (OpenAI's definition).
        logit_bias: added to the logits of these token ids.
        allowed_token_ids: no other token is chosen.
        bad_words: texts that the completion must not hold as tokens, at its start or behind a space.
        stop: the completion ends before the first of these texts.
        stop_token_ids: the completion ends with the first of these tokens.
        include_stop: keep the stop text in the completion.
        ignore_eos: go on after an end-of-sequence token.
        seed: same seed, same tokens, whatever else is in the batch; None draws one.
        logprobs: how many of the most likely tokens to report at each position, besides the chosen one; None is none.
        prompt_logprobs: the same of the prompt's tokens after the first.
        echo: the result's text begins with the prompt's.
        structured: what the completion must match.

    Raises:
        RequestError: a value out of range.
    """

    n: int = 1
    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool = False
    structured: StructuredOutput | None = None

    def __post_init__(self) -> None:
        _check("n", self.n, _is_int(self.n) and 1 <= self.n <= MAX_N, f"1 to {MAX_N}")
        least = 0 if self.prompt_logprobs is not None else 1
        _check("max_tokens", self.max_tokens, _is_int(self.max_tokens) and self.max_tokens >= least, "at least 1")
        few = _is_int(self.min_tokens) and 0 <= self.min_tokens <= self.max_tokens
        _check("min_tokens", self.min_tokens, few, f"0 to max_tokens, {self.max_tokens}")
        _check_number("temperature", self.temperature, 0, 100)
        _check("top_k", self.top_k, _is_int(self.top_k) and self.top_k >= 0, "0 (all) or more")
        _check("top_p", self.top_p, _is_number(self.top_p) and 0 < self.top_p <= 1, "above 0, at most 1")
        _check_number("min_p", self.min_p, 0, 1)
        penalty = _is_number(self.repetition_penalty) and 0.01 <= self.repetition_penalty <= 10
        _check("repetition_penalty", self.repetition_penalty, penalty, "0.01 to 10")
        _check_number("presence_penalty", self.presence_penalty, -2, 2)
        _check_number("frequency_penalty", self.frequency_penalty, -2, 2)
        seed = self.seed is None or (_is_int(self.seed) and 0 <= self.seed < 2**63)
        _check("seed", self.seed, seed, "None, or 0 to 2**63 - 1")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _check(name, value, value is None or (_is_int(value) and 0 <= value <= 100), "None, or 0 to 100")
        for name in ("ignore_eos", "include_stop", "echo"):
            _check(name, getattr(self, name), isinstance(getattr(self, name), bool), "True or False")
        self._check_lists()
        kind = self.structured is None or isinstance(self.structured, StructuredOutput)
        _check("structured", self.structured, kind, "a StructuredOutput")

    def _check_lists(self) -> None:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", _texts("stop", stop, most=MAX_STOPS, longest=MAX_STOP_LENGTH))
        object.__setattr__(self, "bad_words", _texts("bad_words", self.bad_words, most=256, longest=MAX_STOP_LENGTH))
        object.__setattr__(self, "stop_token_ids", _ids("stop_token_ids", self.stop_token_ids, most=128))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", _ids("allowed_token_ids", self.allowed_token_ids))
            _check("allowed_token_ids", self.allowed_token_ids, bool(self.allowed_token_ids), "at least one id")
        if self.logit_bias is not None:
            _check("logit_bias", self.logit_bias, isinstance(self.logit_bias, Mapping), "a mapping of ids to numbers")
            _ids("logit_bias", list(self.logit_bias))
            for token, bias in self.logit_bias.items():
                _check_number(f"logit_bias[{token}]", bias, -100, 100)

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """How a request is treated, besides how its tokens are chosen.

    Attributes:
        priority: lower runs first, under the `priority` and `fair` policies.
        client: whose request it is, under the `fair` policy.
        queue_timeout: seconds in the queue after which it ends unrun.
        timeout: seconds after which it ends, wherever it is.
        cache_salt: requests share cached prefixes with those of the same salt only (against guessing by timing).

    Raises:
        RequestError: a value out of range.
    """

    priority: int = 0
    client: str = ""
    queue_timeout: float | None = None
    timeout: float | None = None
    cache_salt: str = ""

    def __post_init__(self) -> None:
        _check("priority", self.priority, _is_int(self.priority) and abs(self.priority) < 2**31, "a 32-bit integer")
        for name in ("client", "cache_salt"):
            value = getattr(self, name)
            right = isinstance(value, str) and len(value) <= 256 and not any("\ud800" <= c <= "\udfff" for c in value)
            _check(name, str(value)[:80], right, "at most 256 characters of valid Unicode")
        for name in ("queue_timeout", "timeout"):
            value = getattr(self, name)
            right = value is None or (_is_number(value) and math.isfinite(value) and value > 0)
            _check(name, value, right, "None, or seconds above 0")


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments as those of `SamplingParams` and those of `RequestOptions`.

    Raises:
        RequestError: one is of neither.
    """
    sampling, treatment = SamplingParams.__dataclass_fields__, RequestOptions.__dataclass_fields__
    if unknown := sorted(options.keys() - sampling.keys() - treatment.keys()):
        raise RequestError(f"unknown option {unknown[0]!r}; known: {', '.join([*sampling, *treatment])}")
    return (
        {name: value for name, value in options.items() if name in sampling},
        {name: value for name, value in options.items() if name in treatment},
    )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check(name: str, value: object, right: bool, expected: str) -> None:
    if not right:
        raise RequestError(f"{name}={value!r}: expected {expected}")


def _check_number(name: str, value: object, low: float, high: float) -> None:
    right = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    _check(name, value, right, f"{low:g} to {high:g}")


def _texts(name: str, values: object, *, most: int, longest: int) -> tuple[str, ...]:
    right = isinstance(values, Sequence) and not isinstance(values, str | bytes) and len(values) <= most
    if not right or not all(isinstance(value, str) and 0 < len(value) <= longest for value in values):  # type: ignore[attr-defined]
        raise RequestError(f"{name}={str(values)[:80]!r}: expected at most {most} texts of 1 to {longest} characters")
    return tuple(values)  # type: ignore[arg-type]


def _ids(name: str, values: object, *, most: int = MAX_LIST) -> tuple[int, ...]:
    right = isinstance(values, Sequence) and not isinstance(values, str | bytes) and len(values) <= most
    if not right or not all(_is_int(value) and 0 <= value < 2**31 for value in values):  # type: ignore[attr-defined]
        raise RequestError(f"{name}={str(values)[:80]!r}: expected at most {most} token ids")
    return tuple(values)  # type: ignore[arg-type]
