"""SmoothQuant: outliers of the activations moved into the weights, where rounding hurts less."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..base import Pass, Result
from ..graph import Program, get_weight
from .calibrate import Calibration, Statistics
from .fold import Site, fold_calibrated
from .recipe import Assignment, Recipe, gains


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(Pass):
    """producer -> x -> linear(x, W)  becomes  producer / s -> x / s -> linear(x / s, W * s), with s for each channel of x

    s = max|x|^alpha / max|W|^(1 - alpha)  (Xiao et al. 2022, equation 4), where the recipe rounds x and x comes from a norm,
    as in the paper: behind other linear layers it costs more than it gains. `fold` says where a producer can be divided.
    Exact, up to the rounding of the new weights to the model's dtype.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})

    recipe: Recipe
    calibration: Calibration
    alpha: float = 0.5
    on_progress: Callable[[float], None] = field(default=lambda fraction: None, repr=False)

    def config(self) -> dict[str, Any]:
        return {"recipe": self.recipe, "calibration": self.calibration.config(), "alpha": self.alpha}

    def apply(self, program: Program) -> Result:
        def choose(site: Site, assignments: Mapping[str, Assignment], statistics: Statistics) -> Tensor:
            weights = [get_weight(program.module, name).detach().float() for name in assignments]
            return smoothing_factors(site, weights, statistics.largest, self.alpha)

        return fold_calibrated(
            program,
            self.recipe,
            self.calibration,
            choose,
            wanted=lambda scheme: gains("smoothquant", scheme),
            norms_only=True,
            on_progress=self.on_progress,
        )


def smoothing_factors(site: Site, weights: list[Tensor], largest: Tensor, alpha: float) -> Tensor:
    """Factors f32[P] of a site from its weights, each f32[N, K], and the largest magnitudes f32[K] of its input.

    Input channels that share a factor count with the largest of them. A common factor changes nothing, so the middle is 1.
    """
    of_input = site.per_channel(largest, "amax").clamp_min(1e-5)
    columns = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0)
    factors = of_input**alpha / site.per_channel(columns, "amax").clamp_min(1e-5) ** (1 - alpha)
    return site.centred(factors)
