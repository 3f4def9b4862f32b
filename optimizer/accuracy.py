"""How well a model predicts windows of text, and how far it is from a reference: perplexity, KL divergence, same top token.

Windows are the independent units: every standard error is over them, since the tokens of one window are correlated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import ExecutionError
from ..runtime.manifest import Accuracy, Estimate

Logits = Callable[[Tensor], Tensor]
"""A model as a function: token ids i64[n] of one sequence -> logits f32[n, V], row i for the token after token i."""

RESAMPLES = 1000
_ROWS = 128  # of logits at a time in float64
_HOPELESS = 100.0  # nats a token, where a uniform guess has 12; past it the perplexity of a broken model says no more


@dataclass(frozen=True)
class Tokenwise:
    """Measurements at each predicted token of one window, f64[m] each; of the reference only if there is one."""

    nll: np.ndarray
    reference_nll: np.ndarray | None = None
    kl: np.ndarray | None = None
    same_top: np.ndarray | None = None


def measure(
    logits: Logits,
    windows: Sequence[Tensor],
    reference: Logits | None = None,
    *,
    skip: int = 1,
    on_fraction: Callable[[float], None] = lambda fraction: None,
) -> Accuracy:
    """Run the windows one by one, so that no more than one window's logits exist at a time.

    Args:
        logits: the model to measure.
        windows: i64[n] each.
        reference: what to compare it with, over the same vocabulary.
        skip: how many tokens of each window are not predicted, such as BOS; at least 1.
        on_fraction: called with the fraction that is done.

    Raises:
        ExecutionError: logits that are not finite.
    """
    found = []
    for number, window in enumerate(windows):
        found.append(compare(window, logits(window), reference(window) if reference else None, skip=skip))
        on_fraction((number + 1) / len(windows))
    return summarize(found)


@torch.no_grad()
def compare(window: Tensor, logits: Tensor, reference: Tensor | None = None, *, skip: int = 1) -> Tokenwise:
    """Compare two models' logits f32[n, V] of a window i64[n], in float64.

    Raises:
        ExecutionError: logits that are not finite.
    """
    nll, reference_nll, kl, same_top = [], [], [], []
    for start in range(skip - 1, len(window) - 1, _ROWS):
        rows = slice(start, min(start + _ROWS, len(window) - 1))
        targets = window[rows.start + 1 : rows.stop + 1, None]
        log_q = _log_softmax(logits[rows])
        nll.append(-log_q.gather(1, targets)[:, 0])
        if reference is not None:
            log_p = _log_softmax(reference[rows])
            reference_nll.append(-log_p.gather(1, targets)[:, 0])
            kl.append((log_p.exp() * (log_p - log_q)).sum(1))
            same_top.append((log_p.argmax(1) == log_q.argmax(1)).double())
    if reference is None:
        return Tokenwise(torch.cat(nll).numpy())
    return Tokenwise(*(torch.cat(part).numpy() for part in (nll, reference_nll, kl, same_top)))


def _log_softmax(logits: Tensor) -> Tensor:
    if not bool(torch.isfinite(logits).all()):
        raise ExecutionError(
            "the model gave logits that are not finite (a float16 model may overflow: compile with --dtype bfloat16)"
        )
    return torch.log_softmax(logits.double(), -1)


def summarize(windows: Sequence[Tokenwise]) -> Accuracy:
    """The figures over all predicted tokens, with standard errors from the differences between windows.

    Means are ratio estimators over clusters (Cochran, Sampling Techniques, 6.4), functions of them go by the delta
    method, quantiles by a bootstrap of whole windows (Efron 1979) with a fixed seed.
    """
    counts = np.array([len(window.nll) for window in windows], dtype=np.float64)
    nll = _Mean(counts, [window.nll for window in windows])
    perplexity = math.exp(min(nll.value, _HOPELESS))
    figures = {
        "windows": len(windows),
        "tokens": int(counts.sum()),
        "perplexity": nll.estimate(perplexity, perplexity * nll.influence),
    }
    if windows[0].kl is None:
        names = (
            "reference_perplexity",
            "perplexity_delta",
            "perplexity_increase",
            "kl_mean",
            "kl_p99",
            "kl_p999",
            "same_top",
        )
        return Accuracy(**figures, **dict.fromkeys(names))  # type: ignore[arg-type]
    reference = _Mean(counts, _column(windows, "reference_nll"))
    kl, same_top = _Mean(counts, _column(windows, "kl")), _Mean(counts, _column(windows, "same_top"))
    base = math.exp(min(reference.value, _HOPELESS))
    p99, p999 = _quantiles(_column(windows, "kl"), (0.99, 0.999))
    return Accuracy(
        **figures,  # type: ignore[arg-type]
        reference_perplexity=reference.estimate(base, base * reference.influence),
        perplexity_delta=nll.estimate(perplexity - base, perplexity * nll.influence - base * reference.influence),
        perplexity_increase=nll.estimate(
            perplexity / base - 1, perplexity / base * (nll.influence - reference.influence)
        ),
        kl_mean=kl.estimate(kl.value, kl.influence),
        kl_p99=p99,
        kl_p999=p999,
        same_top=same_top.estimate(same_top.value, same_top.influence),
    )


def _column(windows: Sequence[Tokenwise], name: str) -> list[np.ndarray]:
    return [getattr(window, name) for window in windows]


class _Mean:
    """The mean over all tokens: the sum over windows of sums, over that of counts. `influence` is what each window adds."""

    def __init__(self, counts: np.ndarray, values: Sequence[np.ndarray]) -> None:
        sums = np.array([window.sum() for window in values])
        self.value = float(sums.sum() / counts.sum())
        self.influence = (sums - self.value * counts) / counts.sum()

    @staticmethod
    def estimate(value: float, influence: np.ndarray) -> Estimate:
        """A figure whose linear approximation is the sum of `influence` over windows."""
        count = len(influence)
        error = math.sqrt(count / (count - 1) * float((influence**2).sum())) if count > 1 else None
        return Estimate(value=value, standard_error=error)


def _quantiles(values: Sequence[np.ndarray], quantiles: Sequence[float]) -> list[Estimate]:
    """Each quantile q is the smallest value that at least a share q of all are not above."""
    everything = np.concatenate(values)
    owner = np.repeat(np.arange(len(values)), [len(window) for window in values])
    order = np.argsort(everything, kind="stable")
    everything, owner = everything[order], owner[order]

    def at(weights: np.ndarray) -> list[float]:
        """The quantiles where window w counts weights[w] times."""
        reached = weights[owner].cumsum()
        # A sliver of slack: the product may lie just above the whole number that it means.
        return [float(everything[np.searchsorted(reached, q * reached[-1] - 1e-6)]) for q in quantiles]

    found = at(np.ones(len(values), dtype=np.int64))
    if len(values) == 1:
        return [Estimate(value=value, standard_error=None) for value in found]
    generator = np.random.default_rng(0)
    draws = (
        np.bincount(generator.integers(len(values), size=len(values)), minlength=len(values)) for _ in range(RESAMPLES)
    )
    errors = np.std([at(draw) for draw in draws], axis=0, ddof=1)
    return [Estimate(value=value, standard_error=float(error)) for value, error in zip(found, errors, strict=True)]
