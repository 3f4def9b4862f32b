"""The best mix of schemes at a size: a multiple-choice knapsack over what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_UNITS = 4096


@dataclass(frozen=True)
class Option:
    """One scheme for a group of weights.

    Attributes:
        scheme: its name; none is full precision.
        num_bytes: that the group takes in it.
        divergence: mean KL divergence in nats of the model with only this group in it.
    """

    scheme: str
    num_bytes: int
    divergence: float


@dataclass(frozen=True)
class Mix:
    """A choice for every group: its size, and the sum of the divergences."""

    choice: tuple[Option, ...]

    @property
    def num_bytes(self) -> int:
        return sum(option.num_bytes for option in self.choice)

    @property
    def divergence(self) -> float:
        return sum(option.divergence for option in self.choice)


def frontier(groups: Sequence[Sequence[Option]]) -> list[Mix]:
    """Mixes of the options, one of each group, from the smallest to the largest; each diverges less than all before it.

    Divergences are taken to add up, which holds to first order; who uses a mix measures it. Exact by dynamic programming
    but for the sizes, which are counted in units of a 4096th of the span between the smallest and the largest mix and
    rounded up, so that a mix is never larger than it seems.
    """
    bases = [min(option.num_bytes for option in options) for options in groups]
    span = sum(max(option.num_bytes for option in options) for options in groups) - sum(bases)
    unit = max(1, span // _UNITS)
    costs = [
        [-(-(option.num_bytes - base) // unit) for option in options]
        for options, base in zip(groups, bases, strict=True)
    ]
    width = span // unit + len(groups) + 1
    best = np.zeros(width)
    choices = np.zeros((len(groups), width), dtype=np.int16)
    for row, options in enumerate(groups):
        reached = np.full((len(options), width), np.inf)
        for index, (cost, option) in enumerate(zip(costs[row], options, strict=True)):
            reached[index, cost:] = best[: width - cost] + option.divergence
        choices[row], best = reached.argmin(axis=0), reached.min(axis=0)
    found: list[Mix] = []
    for size in range(width):
        if found and best[size] >= found[-1].divergence:
            continue
        mix = _trace(groups, costs, choices, size)
        while found and found[-1].num_bytes >= mix.num_bytes:
            found.pop()
        found.append(mix)
    return found


def _trace(groups: Sequence[Sequence[Option]], costs: list[list[int]], choices: np.ndarray, size: int) -> Mix:
    """The mix behind one cell of the table."""
    chosen: list[Option] = []
    for row in range(len(groups) - 1, -1, -1):
        index = int(choices[row, size])
        chosen.append(groups[row][index])
        size -= costs[row][index]
    return Mix(tuple(reversed(chosen)))
