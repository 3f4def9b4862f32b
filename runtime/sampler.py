"""From logits to tokens."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from ..errors import ExecutionError
from .request import Request

_COLDEST = 1e-6  # a temperature that divides logits without leaving the range of float32


def sample(logits: Tensor, requests: list[Request]) -> list[int]:
    """Choose the next token of each request and note the log-probabilities that were asked for.

    Args:
        logits: f32[L, V], one row a request.
        requests: L of them.

    Returns:
        L token ids. Row i depends on logits row i, the request's parameters, seed and length, and on nothing else.

    Raises:
        ExecutionError: a row holds NaN, or nothing finite; no request was changed.
    """
    table = logits.numpy()
    greedy = table.argmax(-1).tolist()  # NumPy's is several times as fast as PyTorch's; NaN counts as the largest
    if not all(math.isfinite(table[row, token]) for row, token in enumerate(greedy)):
        raise ExecutionError(
            "the model gave logits that are not finite (a float16 model may overflow: compile with --dtype bfloat16)"
        )
    tokens: list[int] = []
    reports: list[tuple[Request, dict[int, float]]] = []
    for row, request in enumerate(requests):
        params = request.params
        reported = torch.log_softmax(logits[row], dim=-1) if params.logprobs is not None else None
        token = greedy[row] if params.temperature == 0 else _draw(logits[row], request)
        if reported is not None:
            reports.append((request, _top_logprobs(reported, token, params.logprobs or 0)))
        tokens.append(token)
    for request, report in reports:
        request.logprobs.append(report)
    return tokens


def _draw(logits: Tensor, request: Request) -> int:
    params = request.params
    logits = (logits - logits.max()) / max(params.temperature, _COLDEST)
    if 0 < params.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(params.top_k).values[-1], float("-inf"))
    probabilities = torch.softmax(logits, dim=-1)
    if params.top_p < 1:
        probabilities = _nucleus(probabilities, params.top_p)
    # The largest p / e with e exponential is a draw from p (the exponential-race form of the Gumbel-max trick).
    noise = torch.empty_like(probabilities).exponential_(generator=_generator(request.seed, request.num_tokens))
    return int((probabilities / noise).argmax())


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero all but the fewest most likely tokens whose probabilities reach `top_p`."""
    # Only what top-k left can be in it; sorting a whole vocabulary costs milliseconds.
    values, order = probabilities.topk(int((probabilities > 0).sum()))
    before = values.cumsum(dim=-1) - values
    return torch.zeros_like(probabilities).scatter_(0, order, values.masked_fill(before >= top_p, 0.0))


def _generator(seed: int, position: int) -> torch.Generator:
    """Random numbers that depend on the request's seed and the position alone, so the batch has no say."""
    digest = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _top_logprobs(logprobs: Tensor, token: int, count: int) -> dict[int, float]:
    values, tokens = logprobs.topk(min(count, len(logprobs)))
    return {token: float(logprobs[token]), **dict(zip(tokens.tolist(), values.tolist(), strict=True))}
