"""The field's figures of served requests: TTFT, TPOT, ITL, E2E, throughput, goodput."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import UsageError

_SECONDS = {"ms": 1e-3, "s": 1.0}


@dataclass
class Served:
    """When the tokens of one request came, in seconds on one clock.

    Attributes:
        sent: when it was sent.
        arrivals: (moment, how many tokens) of each output.
        error: why it failed.
    """

    prompt_tokens: int
    sent: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    error: str | None = None

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count in self.arrivals)

    @property
    def ttft(self) -> float:
        """Time to first token."""
        return self.arrivals[0][0] - self.sent

    @property
    def e2e(self) -> float:
        """From sending to the last token."""
        return self.arrivals[-1][0] - self.sent

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None if there is only one."""
        return (self.e2e - self.ttft) / (self.num_tokens - 1) if self.num_tokens > 1 else None

    @property
    def itl(self) -> list[float]:
        """Times between outputs; of one with several tokens each has its share."""
        found = []
        for (before, _), (after, count) in zip(self.arrivals, self.arrivals[1:], strict=False):
            found += [(after - before) / count] * count
        return found


def parse_slo(text: str) -> dict[str, float]:
    """Limits such as `ttft:500ms,tpot:50ms,e2e:10s`, in seconds.

    Raises:
        UsageError: anything else.
    """
    found = {}
    for part in text.split(","):
        match = re.fullmatch(r"(ttft|tpot|e2e):(\d+(?:\.\d+)?)(ms|s)", part.strip())
        if match is None:
            raise UsageError(f"--slo {text!r}: expected limits such as ttft:500ms,tpot:50ms,e2e:10s")
        found[match[1]] = float(match[2]) * _SECONDS[match[3]]
    return found


def summarize(served: Sequence[Served], seconds: float, slo: dict[str, float]) -> dict[str, Any]:
    """Figures of all requests; times in milliseconds, rates a second."""
    done = [one for one in served if one.error is None and one.arrivals]
    generated, prompts = sum(one.num_tokens for one in done), sum(one.prompt_tokens for one in done)
    times = {
        "ttft": [one.ttft for one in done],
        "tpot": [one.tpot for one in done if one.tpot is not None],
        "itl": [value for one in done for value in one.itl],
        "e2e": [one.e2e for one in done],
    }
    found: dict[str, Any] = {
        "requests": len(served),
        "failed": len(served) - len(done),
        **rates(len(done), prompts, generated, seconds),
        **{f"{name}_ms": distribution(values) for name, values in times.items() if values},
    }
    if slo:
        good = sum(_keeps(one, slo) for one in done)
        found |= {"slo_ms": {name: limit * 1e3 for name, limit in slo.items()}, "goodput": good / seconds}
        found["goodput_share"] = good / len(served)
    return found


def rates(done: int, prompt_tokens: int, generated_tokens: int, seconds: float) -> dict[str, Any]:
    """Requests and tokens a second."""
    return {
        "seconds": seconds,
        "prompt_tokens": prompt_tokens,
        "generated_tokens": generated_tokens,
        "requests_per_second": done / seconds,
        "output_tokens_per_second": generated_tokens / seconds,
        "total_tokens_per_second": (prompt_tokens + generated_tokens) / seconds,
    }


def _keeps(one: Served, slo: dict[str, float]) -> bool:
    measured = {"ttft": one.ttft, "tpot": one.tpot, "e2e": one.e2e}
    return all((value := measured[name]) is None or value <= limit for name, limit in slo.items())


def distribution(seconds: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles of times, in milliseconds."""
    ordered = sorted(value * 1e3 for value in seconds)
    return {
        "mean": statistics.fmean(ordered),
        **{f"p{share}": _percentile(ordered, share / 100) for share in (50, 95, 99)},
    }


def _percentile(ordered: Sequence[float], share: float) -> float:
    """Linear between the two nearest ranks, as numpy's default."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
