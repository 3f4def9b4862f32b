"""AWQ: the input channels that matter most made larger before rounding, so that rounding hurts them least."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..base import Pass, Result
from ..graph import Program, get_weight
from .calibrate import Calibration, Statistics
from .fold import Site, fold_calibrated
from .quantize import scale_dtype
from .recipe import Assignment, Recipe, gains
from .rtn import rtn

_EXPONENTS = [step / 20 for step in range(20)]
_ROWS = 256
_GRID = (1.0, 0.9, 0.8, 0.7, 0.6)  # coarse: what is compared are factors, not ranges


@dataclass(frozen=True, kw_only=True)
class AWQ(Pass):
    """producer -> x -> linear(x, W)  becomes  producer / s -> x / s -> linear(x / s, W * s), with s for each channel of x

    s = mean|x|^r, or mean|x|^r / mean|W|^(1 - r), whichever of them and of 20 exponents r gives the least error of the
    layers' outputs once W * s is rounded to nearest (Lin et al. 2023, equation 4). `fold` says where a producer can be
    divided. Exact, up to the rounding of the new weights to the model's dtype.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})

    recipe: Recipe
    calibration: Calibration
    on_progress: Callable[[float], None] = field(default=lambda fraction: None, repr=False)

    @property
    def name(self) -> str:
        return "awq"

    def config(self) -> dict[str, Any]:
        return {"recipe": self.recipe, "calibration": self.calibration.config()}

    def apply(self, program: Program) -> Result:
        def choose(site: Site, assignments: Mapping[str, Assignment], statistics: Statistics) -> Tensor:
            weights = {name: get_weight(program.module, name).detach() for name in assignments}
            return awq_factors(site, weights, assignments, statistics)

        return fold_calibrated(
            program,
            self.recipe,
            self.calibration,
            choose,
            wanted=lambda scheme: gains("awq", scheme),
            on_progress=self.on_progress,
        )


def awq_factors(
    site: Site, weights: Mapping[str, Tensor], assignments: Mapping[str, Assignment], statistics: Statistics
) -> Tensor:
    """Factors f32[P] of a site that give the least error of its layers' outputs; 1 where none gives less than that.

    The error of one layer is tr(dW H dW^T) over tr(W H W^T), dW = rounded(W s) / s - W and H the mean of x^T x: exactly
    the mean square of the change of its output. It is taken over every n-th row, 256 at most: rows are rounded apart.
    """
    sampled = {name: weight[:: -(-weight.shape[0] // _ROWS)].float() for name, weight in weights.items()}
    norms = {name: _output_energy(weight, statistics.hessian) for name, weight in sampled.items()}
    best, least = None, float("inf")
    for factors in _proposals(site, sampled, statistics):
        columns = factors[site.index]
        importance = statistics.hessian.diagonal() / columns.square()
        error = 0.0
        for name, weight in sampled.items():
            args = assignments[name].scheme.weights
            scaled = weight * columns
            dtype = scale_dtype(weights[name].dtype, scaled, args)
            rounded = rtn(scaled, args, dtype, importance=importance, grid=_GRID).dequantize() / columns
            error += _output_energy(rounded - weight, statistics.hessian) / max(norms[name], 1e-30)
        if error < least:
            best, least = factors, error
    assert best is not None
    return best


def _proposals(site: Site, weights: Mapping[str, Tensor], statistics: Statistics) -> Iterator[Tensor]:
    of_input = site.per_channel(statistics.mean, "mean").clamp_min(1e-8)
    columns = torch.cat([weight.abs() / weight.abs().mean().clamp_min(1e-30) for weight in weights.values()]).mean(
        dim=0
    )
    of_weight = site.per_channel(columns, "mean")
    for exponent in _EXPONENTS:
        yield site.centred(of_input**exponent)
        yield site.centred(of_input**exponent / (of_weight ** (1 - exponent) + 1e-4))


def _output_energy(weight: Tensor, hessian: Tensor) -> float:
    """tr(W H W^T) of W [N, K]: the sum of the mean squares of x W^T."""
    return ((weight @ hessian) * weight).sum().item()
