"""How long a step of so many tokens takes, learnt from the steps that ran."""

from __future__ import annotations

from bisect import bisect_left

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)
WEIGHT = 0.3  # of the newest step in the mean


class StepCosts:
    """Mean seconds of a step by its number of tokens, for the sizes met, in between by straight lines.

    A step of few tokens reads all weights, one of many computes: the line through both ends alone would be wrong by
    several times, so sizes in between correct it as they occur. Beyond the largest size met, time is taken to grow with
    the number of tokens, which is the most it does.
    """

    def __init__(self) -> None:
        self._mean: dict[int, tuple[float, float]] = {}  # bucket -> mean tokens, mean seconds

    def add(self, num_tokens: int, seconds: float) -> None:
        """A step of `num_tokens` took so long."""
        bucket = bisect_left(SIZES, num_tokens)
        tokens, mean = self._mean.get(bucket, (float(num_tokens), seconds))
        self._mean[bucket] = (tokens + WEIGHT * (num_tokens - tokens), mean + WEIGHT * (seconds - mean))

    def seconds(self, num_tokens: int) -> float | None:
        """What a step of `num_tokens` takes; None before the first step."""
        points = sorted(self._mean.values())
        if not points:
            return None
        above = next((number for number, point in enumerate(points) if point[0] >= num_tokens), None)
        if above is None:
            tokens, mean = points[-1]
            return mean * num_tokens / tokens
        if above == 0:
            return points[0][1]
        (low, low_seconds), (high, high_seconds) = points[above - 1], points[above]
        return low_seconds + (high_seconds - low_seconds) * (num_tokens - low) / (high - low)

    def most_tokens(self, least: int, most: int, stretch: float) -> int:
        """The most tokens, `least` to `most`, of a step that takes at most `stretch` times as long as one of `least`."""
        base = self.seconds(least)
        if base is None:
            return most
        low, high = least, most
        while low < high:
            middle = (low + high + 1) // 2
            seconds = self.seconds(middle)
            assert seconds is not None
            low, high = (middle, high) if seconds <= stretch * base else (low, middle - 1)
        return low
