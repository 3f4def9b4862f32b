"""From logits to tokens."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from torch import Tensor

from ..errors import ExecutionError, OptcError, RequestError
from .logits import penalize
from .request import Logprobs, Request

# All of this is NumPy on one thread: a parallel region of PyTorch costs more than a row of logits, and its threads would
# take the cores from the kernels'.
_COLDEST = 1e-6  # a temperature that divides logits without leaving the range of float32
NOT_FINITE = "the model gave logits that are not finite (a float16 model may overflow: compile with --dtype bfloat16)"
_BLOCK = 128  # tokens whose probabilities are summed up together
# How far below the largest logit candidates are looked for, until there are enough.
_CUTS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0, math.inf)


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
    table = logits.numpy()
    if rows is not None:
        table = table[rows]
    reporting = [number for number, request in enumerate(requests) if request.params.logprobs is not None]
    reported = table[reporting] if reporting else None
    failures = _constrain(table, requests)
    likeliest: list[int] = table.argmax(-1).tolist()  # NaN counts as the largest
    chosen: list[int | OptcError] = list(likeliest)
    drawing = []
    for number, request in enumerate(requests):
        if number in failures:
            chosen[number] = failures[number]
        elif not math.isfinite(table[number, likeliest[number]]):
            chosen[number] = _failure(table[number], request)
        elif request.params.temperature > 0:
            drawing.append(number)
    if drawing:
        drawn = _draw(table[drawing], [requests[number] for number in drawing])
        for number, token in zip(drawing, drawn, strict=True):
            chosen[number] = token
    if reported is not None:
        _note_logprobs(reported, [requests[number] for number in reporting], [chosen[number] for number in reporting])
    return chosen


def _constrain(table: np.ndarray, requests: Sequence[Request]) -> dict[int, OptcError]:
    """Mask, bias and penalize rows; of those that cannot be (a grammar grew too complex), why."""
    failures: dict[int, OptcError] = {}
    penalized, constraints = [], []
    for number, request in enumerate(requests):
        if request.constraints is not None:
            try:
                request.constraints.mask(table[number], request.token_ids, request.num_output_tokens)
            except OptcError as error:
                failures[number] = error
                continue
            if request.constraints.counts is not None:
                penalized.append(number)
                constraints.append(request.constraints)
    if penalized:
        penalize(table, penalized, constraints)
    return failures


def _failure(row: np.ndarray, request: Request) -> OptcError:
    if request.constraints is not None and not np.isnan(row).any() and row.max() == -np.inf:
        return RequestError("no token is left: the masks, the allowed tokens and the bad words exclude all of them")
    return ExecutionError(NOT_FINITE)


def _draw(table: np.ndarray, requests: Sequence[Request]) -> list[int]:
    """Draw a token from each row f32[R, V] by inversion: one uniform number a row, so a row costs one hash."""
    warmth = np.array([max(request.params.temperature, _COLDEST) for request in requests], np.float32)
    table -= table.max(-1, keepdims=True)
    table /= warmth[:, None]
    weights = np.exp(table)
    free = [row for row, request in enumerate(requests) if not _is_filtered(request)]
    tokens = dict(zip(free, _draw_of_all(weights[free], [requests[row] for row in free]), strict=True)) if free else {}
    return [
        tokens[row] if row in tokens else _draw_filtered(table[row], weights[row], request)
        for row, request in enumerate(requests)
    ]


def _is_filtered(request: Request) -> bool:
    return request.params.top_k > 0 or request.params.top_p < 1 or request.params.min_p > 0


def _draw_of_all(weights: np.ndarray, requests: Sequence[Request]) -> list[int]:
    """By weights f32[R, V]: first a block of tokens by the blocks' sums, then a token in it."""
    count, size = weights.shape
    whole = size // _BLOCK * _BLOCK
    sums = weights[:, :whole].reshape(count, -1, _BLOCK).sum(-1)
    if whole < size:
        sums = np.concatenate([sums, weights[:, whole:].sum(-1, keepdims=True)], -1)
    bounds = sums.cumsum(-1, dtype=np.float64)
    tokens = []
    for row, request in enumerate(requests):
        point = _uniform(request) * bounds[row, -1]
        block = int(bounds[row].searchsorted(point, side="right"))
        inside = weights[row, block * _BLOCK : (block + 1) * _BLOCK].cumsum(dtype=np.float64)
        point -= bounds[row, block - 1] if block else 0.0
        # Rounding may put the point behind the last token of its block: then it is that one.
        last = int(inside.searchsorted(inside[-1]))
        tokens.append(block * _BLOCK + min(int(inside.searchsorted(point, side="right")), last))
    return tokens


def _draw_filtered(scaled: np.ndarray, weights: np.ndarray, request: Request) -> int:
    """After top-k, top-p and min-p, from a row f32[V] of logits over temperature, the largest 0, and their exponentials."""
    params = request.params
    needed = params.top_p * float(weights.sum(dtype=np.float64)) if params.top_p < 1 and not params.top_k else None

    def is_enough(candidates: np.ndarray, cut: float) -> bool:
        """Whether no token that is left out could be among those to draw from."""
        if params.top_k and len(candidates) >= params.top_k:
            return True
        if needed is not None and weights[candidates].sum(dtype=np.float64) >= needed:
            return True
        return params.min_p >= math.exp(-cut)

    order = _likeliest(scaled, is_enough)
    if params.top_k:
        order = order[: params.top_k]
    chances = weights[order].astype(np.float64)
    kept = chances >= params.min_p
    if params.top_p < 1:
        before = chances.cumsum() - chances
        kept &= before < (params.top_p * chances.sum() if needed is None else needed)
    kept[0] = True
    bounds = np.where(kept, chances, 0).cumsum()
    return int(order[bounds.searchsorted(_uniform(request) * bounds[-1], side="right")])


def _likeliest(row: np.ndarray, is_enough: Callable[[np.ndarray, float], bool]) -> np.ndarray:
    """Tokens of a row f32[V] whose largest is 0, the largest first and equal ones by id: as many as `is_enough` says.

    Comparing a whole row is cheap and sorting it is not, so the cut is lowered until there are enough above it.
    """
    for cut in _CUTS:
        candidates = np.flatnonzero(row >= -cut)
        if cut == math.inf or is_enough(candidates, cut):
            break
    return candidates[np.argsort(-row[candidates], kind="stable")]


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


def _note_logprobs(table: np.ndarray, requests: Sequence[Request], chosen: Sequence[int | OptcError]) -> None:
    counts = [request.params.logprobs or 0 for request in requests]
    tokens = [token if isinstance(token, int) else 0 for token in chosen]
    for request, token, report in zip(requests, chosen, report_logprobs(table, tokens, counts), strict=True):
        if isinstance(token, int):
            request.logprobs.append(report)


def report_logprobs(table: np.ndarray, tokens: Sequence[int], counts: Sequence[int]) -> list[Logprobs]:
    """Of each row of logits f32[R, V] the log-probabilities of its token and of its `count` likeliest ones."""
    with np.errstate(invalid="ignore"):  # of rows that are no numbers nothing is kept
        shifted = table - table.max(-1, keepdims=True)
    totals = np.log(np.exp(shifted).sum(-1, dtype=np.float64))
    reports = []
    for row, total, token, count in zip(shifted, totals, tokens, counts, strict=True):
        report = {token: float(row[token] - total)}
        if count:
            found = _likeliest(row, partial(_has, count))[:count]
            report |= {int(each): float(row[each] - total) for each in found}
        reports.append(report)
    return reports


def _has(count: int, candidates: np.ndarray, cut: float) -> bool:
    return len(candidates) >= count
