"""From what the user asks for (a preset, a scheme, a recipe file) to the recipe of the quantization pass."""

from __future__ import annotations

from pathlib import Path

from ..errors import TargetError
from ..passes.quantize.recipe import KEEP, ROUNDINGS, Recipe, Rounding
from ..runtime.scheme import Scheme, find_scheme
from .targets import TARGETS, Target

PRESETS = ("int8", "int4", "fp8")


def make_recipe(
    quantize: str | Path | Recipe | None, target: Target, *, algorithm: str | None = None, kv_cache: str | None = None
) -> Recipe | None:
    """The recipe to compile by, checked against the target.

    Args:
        quantize: a preset (int8, int4, fp8), the name of a scheme, a recipe or its YAML file, or none.
        target: what a preset chooses by.
        algorithm: how codes are chosen: rtn, rtn-minmax, hqq, gptq, or transforms before it, as in awq+gptq.
        kv_cache: int8 or fp8.

    Raises:
        UsageError: an unknown scheme or algorithm, or a wrong recipe file.
        TargetError: the target cannot compute in what the recipe asks for.
    """
    if quantize is None and kv_cache is None:
        return None
    if isinstance(quantize, Recipe):
        recipe = quantize
    elif quantize is None:
        recipe = Recipe(rounding="rtn")
    elif quantize in PRESETS:
        recipe = Recipe(default=preset_scheme(str(quantize), target), adapt=True)
    else:
        recipe = Recipe(default=str(quantize))
    if kv_cache is not None:
        recipe = recipe.model_copy(update={"kv_cache": kv_cache})
    if algorithm is not None:
        recipe = recipe.model_copy(update={"rounding": _rounding(algorithm)})
    recipe.check_names()
    for name in {recipe.default, *(rule.scheme for rule in recipe.rules)} - {KEEP}:
        check_target(name, find_scheme(name), target)
    return recipe


def preset_scheme(preset: str, target: Target) -> str:
    """The scheme that a preset means for a target."""
    if preset == "int8":
        return "w8a8"
    if preset == "int4":
        return "w4a16-g128"
    return "fp8-dynamic" if "fp8" in target.tflops else "fp8-weight"


def check_target(name: str, scheme: Scheme, target: Target) -> None:
    """Raises TargetError: the scheme computes in FP8, and the target has no such arithmetic."""
    activations = scheme.input_activations
    if activations is not None and activations.type == "float" and "fp8" not in target.tflops:
        able = ", ".join(found.name for found in TARGETS.values() if "fp8" in found.tflops)
        raise TargetError(
            f"{name} for {target.name}: {target.architecture} has no FP8 arithmetic; targets that have: {able}; or store "
            "the weights alone as FP8 with --scheme fp8-weight, or use --int8"
        )


def _rounding(algorithm: str) -> Rounding:
    for known in ROUNDINGS:
        if known == algorithm:
            return known
    raise TargetError(f"unknown algorithm {algorithm!r}; known: {', '.join(ROUNDINGS)}")
