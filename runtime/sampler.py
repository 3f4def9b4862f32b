"""From logits to tokens."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import ExecutionError, OptcError, RequestError
from .logits import penalize
from .request import Logprobs, Request

_COLDEST = 1e-6  # a temperature that divides logits without leaving the range of float32
_CANDIDATES = 256  # how many of the likeliest tokens are sorted first, to find a nucleus among them
_BLOCK = 128  # tokens whose probabilities are summed up together


def sample(logits: Tensor, requests: Sequence[Request], rows: Sequence[int] | None = None) -> list[int | OptcError]:
    """Choose the next token of each request and note the log-probabilities that were asked for.

    Args:
        logits: f32[L, V]. They are changed.
        requests: those that get a token.
        rows: the row of each; by default one after the other. Several completions of a prompt begin with the same row.

    Returns:
        A token id for each request, or why it has none. It depends on its row, the request's parameters, seed and tokens,
        and on nothing else.
    """
    if rows is not None:
        logits = logits[torch.tensor(rows)]
    reporting = [number for number, request in enumerate(requests) if request.params.logprobs is not None]
    reported = torch.log_softmax(logits[torch.tensor(reporting)], -1) if reporting else None
    table = logits.numpy()
    _constrain(table, requests)
    likeliest: list[int] = table.argmax(-1).tolist()  # faster than PyTorch's; NaN counts as the largest
    chosen: list[int | OptcError] = list(likeliest)
    drawing = []
    for number, request in enumerate(requests):
        if not math.isfinite(table[number, likeliest[number]]):
            chosen[number] = _failure(table[number], request)
        elif request.params.temperature > 0:
            drawing.append(number)
    if drawing:
        drawn = _draw(logits[torch.tensor(drawing)], [requests[number] for number in drawing])
        for number, token in zip(drawing, drawn, strict=True):
            chosen[number] = token
    if reported is not None:
        for number, report in zip(reporting, _top_logprobs(reported, requests, reporting, chosen), strict=True):
            if report is not None:
                requests[number].logprobs.append(report)
    return chosen


def _constrain(table: np.ndarray, requests: Sequence[Request]) -> None:
    penalized, constraints = [], []
    for number, request in enumerate(requests):
        if request.constraints is not None:
            request.constraints.mask(table[number], request.output_token_ids)
            if request.constraints.counts is not None:
                penalized.append(number)
                constraints.append(request.constraints)
    if penalized:
        penalize(table, penalized, constraints)


def _failure(row: np.ndarray, request: Request) -> OptcError:
    if request.constraints is not None and not np.isnan(row).any() and row.max() == -np.inf:
        return RequestError("no token is left: the masks, the allowed tokens and the bad words exclude all of them")
    return ExecutionError(
        "the model gave logits that are not finite (a float16 model may overflow: compile with --dtype bfloat16)"
    )


def _draw(logits: Tensor, requests: Sequence[Request]) -> list[int]:
    """Draw a token from each row of f32[R, V] by inversion: one uniform number a row, so a row costs one hash."""
    warmth = torch.tensor([max(request.params.temperature, _COLDEST) for request in requests])
    scaled = (logits - logits.amax(-1, keepdim=True)) / warmth[:, None]
    tokens = [0] * len(requests)
    groups: dict[int, list[int]] = {}
    for row, request in enumerate(requests):
        groups.setdefault(_num_candidates(request, logits.shape[1]), []).append(row)
    for count, rows in groups.items():
        members = [requests[row] for row in rows]
        part = scaled if len(rows) == len(requests) else scaled[torch.tensor(rows)]
        found = _draw_among(part, members, count) if count else _draw_of_all(part, members)
        for row, token in zip(rows, found, strict=True):
            tokens[row] = token
    return tokens


def _num_candidates(request: Request, vocab_size: int) -> int:
    """How many of the likeliest tokens to sort; 0 if all may be drawn. Of the request alone, so that ties stay as they are."""
    params = request.params
    if 0 < params.top_k < vocab_size:
        return params.top_k
    return min(_CANDIDATES, vocab_size) if params.top_p < 1 or params.min_p > 0 else 0


def _draw_of_all(scaled: Tensor, requests: Sequence[Request]) -> list[int]:
    """From softmax(scaled) f32[R, V]: first a block of tokens by the blocks' sums, then a token in it."""
    weights = scaled.exp()
    rows, size = weights.shape
    padded = torch.nn.functional.pad(weights, (0, -size % _BLOCK))
    blocks = padded.view(rows, -1, _BLOCK)
    sums = blocks.sum(-1).numpy().cumsum(-1, dtype=np.float64)
    tokens = []
    for row, request in enumerate(requests):
        point = _uniform(request) * sums[row, -1]
        block = int(np.searchsorted(sums[row], point, side="right"))
        inside = blocks[row, block].numpy().cumsum(dtype=np.float64)
        point -= sums[row, block - 1] if block else 0.0
        # Rounding may put the point behind the last token of its block: then it is that one.
        place = min(int(np.searchsorted(inside, point, side="right")), int(np.searchsorted(inside, inside[-1])))
        tokens.append(block * _BLOCK + place)
    return tokens


def _draw_among(scaled: Tensor, requests: Sequence[Request], count: int) -> list[int]:
    """From the `count` likeliest tokens of each row f32[R, V], after top-k, top-p and min-p."""
    values, order = scaled.topk(count)
    weights = values.double().exp().numpy()
    nucleus = [row for row, request in enumerate(requests) if request.params.top_p < 1]
    totals = weights.sum(-1)
    if nucleus and count < scaled.shape[1]:
        whole = [row for row in nucleus if not requests[row].params.top_k]
        if whole:
            totals[whole] = scaled[torch.tensor(whole)].double().exp().sum(-1).numpy()
    top_p = np.array([request.params.top_p for request in requests])
    min_p = np.array([request.params.min_p for request in requests])
    before = weights.cumsum(-1) - weights
    kept = weights >= min_p[:, None]
    if nucleus:
        kept &= (before < (top_p * totals)[:, None]) | (top_p == 1)[:, None]
    kept[:, 0] = True
    sums = np.where(kept, weights, 0).cumsum(-1)
    tokens = []
    for row, request in enumerate(requests):
        if kept[row, -1] and not request.params.top_k and count < scaled.shape[1]:  # more tokens belong to it
            tokens += _draw_among(scaled[row : row + 1], [request], scaled.shape[1])
            continue
        place = int(np.searchsorted(sums[row], _uniform(request) * sums[row, -1], side="right"))
        tokens.append(int(order[row, place]))
    return tokens


def _uniform(request: Request) -> float:
    """A number in [0, 1) that depends on the request's seed and the position alone, so the batch has no say."""
    digest = hashlib.blake2b(f"{request.seed} {request.num_tokens}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def derived_seed(seed: int, number: int) -> int:
    """The seed of completion `number` of a prompt; of the first it is the prompt's own."""
    if number == 0:
        return seed
    digest = hashlib.blake2b(f"{seed} completion {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _top_logprobs(
    logprobs: Tensor, requests: Sequence[Request], numbers: Sequence[int], chosen: Sequence[int | OptcError]
) -> list[Logprobs | None]:
    counts = [requests[number].params.logprobs or 0 for number in numbers]
    tokens = [chosen[number] for number in numbers]
    known = report_logprobs(logprobs, [token if isinstance(token, int) else 0 for token in tokens], counts)
    return [report if isinstance(token, int) else None for report, token in zip(known, tokens, strict=True)]


def report_logprobs(logprobs: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[Logprobs]:
    """Of each row f32[R, V] the log-probabilities of its token and of its `count` likeliest ones."""
    own = logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
    values, order = logprobs.topk(min(max(counts), logprobs.shape[1]))
    return [
        {token: value, **dict(zip(order[row, :count].tolist(), values[row, :count].tolist(), strict=True))}
        for row, (token, value, count) in enumerate(zip(tokens, own, counts, strict=True))
    ]
