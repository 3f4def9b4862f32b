"""Sampling parameters, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import RequestError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of a request are chosen.

    Attributes:
        max_tokens: most tokens to generate; the context length limits it further.
        temperature: 0 takes the most likely token; above, logits are divided by it.
        top_k: sample among the k most likely tokens; 0 is all.
        top_p: sample among the fewest tokens whose probabilities add up to p (nucleus sampling, Holtzman et al. 2020).
        seed: same seed, same tokens, whatever else is in the batch; None draws one.
        logprobs: how many of the most likely tokens to report at each position, besides the chosen one; None is none.
        ignore_eos: go on after an end-of-sequence token.

    Raises:
        RequestError: a value out of range.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check("max_tokens", self.max_tokens, _is_int(self.max_tokens) and self.max_tokens >= 1, "at least 1")
        warmth = _is_number(self.temperature) and 0 <= self.temperature <= 100
        _check("temperature", self.temperature, warmth, "0 to 100")
        _check("top_k", self.top_k, _is_int(self.top_k) and self.top_k >= 0, "0 (all) or more")
        _check("top_p", self.top_p, _is_number(self.top_p) and 0 < self.top_p <= 1, "above 0, at most 1")
        seed = self.seed is None or (_is_int(self.seed) and 0 <= self.seed < 2**63)
        _check("seed", self.seed, seed, "None, or 0 to 2**63 - 1")
        logprobs = self.logprobs is None or (_is_int(self.logprobs) and 0 <= self.logprobs <= 100)
        _check("logprobs", self.logprobs, logprobs, "None, or 0 to 100")
        _check("ignore_eos", self.ignore_eos, isinstance(self.ignore_eos, bool), "True or False")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check(name: str, value: object, right: bool, expected: str) -> None:
    if not right:
        raise RequestError(f"{name}={value!r}: expected {expected}")
