"""Weights that the checkpoint already has as codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ...runtime.ops.quantized import StoredWeight
from ...runtime.scheme import QuantizationArgs, Scheme, find_scheme, scheme_names


@dataclass(frozen=True)
class GivenWeight:
    """A weight as another tool quantized it.

    Attributes:
        stored: its codes and scales, [N, K].
        input_activations: how the checkpoint has the layer's inputs rounded; none leaves them.
        input_scale: f32[1], where that is static.
    """

    stored: StoredWeight = field(repr=False)
    input_activations: QuantizationArgs | None = None
    input_scale: Tensor | None = field(default=None, repr=False)

    @property
    def scheme(self) -> Scheme:
        return Scheme(weights=self.stored.args, input_activations=self.input_activations)


def name_schemes(given: Mapping[str, GivenWeight]) -> dict[Scheme, str]:
    """A name for each scheme: the one that `find_scheme` knows it by, or given-0, given-1, ... in the order of the weights."""
    known = {find_scheme(name): name for name in scheme_names()}
    found: dict[Scheme, str] = {}
    for weight in given.values():
        others = sum(name.startswith("given-") for name in found.values())
        found.setdefault(weight.scheme, known.get(weight.scheme, f"given-{others}"))
    return found
