"""From what the user asks for (a preset, a scheme, a recipe file) to the recipe of the quantization pass."""

from __future__ import annotations

import difflib
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..errors import TargetError, UsageError
from ..passes.quantize.given import GivenWeight
from ..passes.quantize.recipe import KEEP, ROUNDINGS, TRANSFORMS, Recipe, Rounding, Rule, Transform, rounding_for
from ..runtime.scheme import Scheme, find_scheme
from .quantized_checkpoint import Quantized
from .targets import TARGETS, Target

PRESETS = ("int8", "int4", "fp8")
CPU_HEAD = "w8a8g-g128"  # of an INT8 or INT4 model: in bfloat16 the head would be a third of what a step reads


def make_recipe(
    quantize: str | Path | Recipe | None,
    target: Target,
    *,
    algorithm: str | None = None,
    kv_cache: str | None = None,
    with_head: bool = True,
) -> Recipe | None:
    """The recipe to compile by, checked against the target.

    Args:
        quantize: a preset (int8, int4, fp8), the name of a scheme, a recipe or its YAML file, or none. A `Path`, or a
            string that ends in .yaml or .yml, is a file.
        target: what a preset chooses by.
        algorithm: how codes are chosen, in place of what the recipe says: see `parse_algorithm`.
        kv_cache: int8 or fp8, in place of what the recipe says.
        with_head: whether a preset is for the head too, where the target's presets are.

    Raises:
        UsageError: an unknown scheme or algorithm, one that no scheme is for, a wrong recipe file, or nothing to quantize.
        TargetError: the target cannot compute in what the recipe asks for.
    """
    if quantize is not None and not isinstance(quantize, Recipe | str | Path):
        raise UsageError(
            f"quantize={quantize!r}: expected a preset, the name of a scheme, a recipe, or the path of one"
        )
    if isinstance(quantize, Recipe):
        recipe = quantize
    elif quantize is None:
        recipe = Recipe()
    elif isinstance(quantize, Path) or quantize.endswith((".yaml", ".yml")):
        recipe = read_recipe(Path(quantize))
    elif quantize in PRESETS:
        scheme = preset_scheme(quantize, target)
        of_head = target.device == "cpu" and with_head and find_scheme(scheme).weights.type == "int"
        rules = (Rule(role="lm_head", scheme=CPU_HEAD),) if of_head else ()
        recipe = Recipe(default=scheme, rules=rules, adapt=True)
    else:
        recipe = Recipe(default=quantize)
    if kv_cache not in (None, "int8", "fp8"):
        raise UsageError(f"KV cache {kv_cache!r}: expected int8 or fp8")
    if kv_cache is not None:
        recipe = recipe.model_copy(update={"kv_cache": kv_cache})
    if algorithm is not None:
        recipe = _with_algorithm(recipe, algorithm)
    recipe.check_names()
    for name in recipe.scheme_names():
        check_target(name, find_scheme(name), target)
    if quantize is None and recipe.quantizes_nothing:
        return None
    _check_quantizes(recipe)
    return recipe


def _check_quantizes(recipe: Recipe) -> None:
    if recipe.quantizes_nothing:
        raise UsageError(
            f"the recipe quantizes nothing: default is {KEEP}, no rule has a scheme, and there is no kv_cache; set one, or leave "
            "quantization out"
        )


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file whose keys are the fields of `Recipe` and `Rule`.

    Raises:
        UsageError: not a readable file, not YAML, or not a recipe; names the key and, if it is unknown, near ones.
    """
    try:
        # utf-8-sig: a byte order mark is no part of the text
        documents = list(yaml.load_all(path.read_text(encoding="utf-8-sig"), Loader=_Loader))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a readable recipe file: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not YAML: {error}") from error
    if not documents or documents == [None]:
        raise UsageError(f"{path}: an empty recipe; expected keys among {', '.join(Recipe.model_fields)}")
    if len(documents) > 1:
        raise UsageError(
            f"{path}: {len(documents)} YAML documents, expected one recipe; put them in files of their own"
        )
    content = documents[0]
    if not isinstance(content, dict):
        raise UsageError(
            f"{path}: holds a {type(content).__name__}, expected a mapping with keys among {', '.join(Recipe.model_fields)}"
        )
    try:
        recipe = Recipe.model_validate(content)
        recipe.check_names()
        _check_quantizes(recipe)
    except ValidationError as error:
        raise UsageError(f"{path}: {_explain(error)}") from error
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    return recipe


class _Loader(yaml.SafeLoader):
    """YAML's safe subset; a key that comes twice is an error, not the last one's."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"line {node.start_mark.line + 1}: the key {key} comes twice")
        return super().construct_mapping(node, deep)


def _explain(error: ValidationError) -> str:
    """One thing that is wrong, an unknown key before others: where, what was found, what was expected."""
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    *outer, last = first["loc"]
    inside = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in outer).lstrip(".")
    where = f"{inside}.{last}" if inside and not isinstance(last, int) else f"{inside}[{last}]" if inside else f"{last}"
    known = list((Rule if "rules" in outer else Recipe).model_fields)
    match first["type"]:
        case "extra_forbidden":
            near = difflib.get_close_matches(str(last), known, n=2) or known
            return f"unknown key {where}; keys like it: {', '.join(near)}"
        case "missing":
            return f"{inside} lacks the key {last}"
        case "literal_error":
            return f"{where} is {first['input']!r}; expected {first['ctx']['expected']}"
    return f"{where} is {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def parse_algorithm(text: str) -> tuple[tuple[Transform, ...], Rounding]:
    """The transforms and the rounding that an algorithm's name stands for.

    Transforms, and after them at most one rounding, are joined by +. Transforms alone round to nearest: awq is awq+rtn.

    Raises:
        UsageError: an unknown name, one that comes twice, or a rounding that is not the last.
    """
    names = text.split("+")
    transforms = tuple(known for name in names for known in TRANSFORMS if known == name)
    roundings = tuple(known for name in names for known in ROUNDINGS if known == name)
    for name in names:
        if name not in (*TRANSFORMS, *ROUNDINGS):
            raise UsageError(
                f"unknown algorithm {name!r} in {text!r}; expected one of {', '.join(ROUNDINGS)}, or transforms "
                f"({', '.join(TRANSFORMS)}) before it, joined by +, as in awq+gptq"
            )
    if len(set(names)) < len(names) or len(roundings) > 1 or (roundings and names[-1] != roundings[0]):
        raise UsageError(
            f"algorithm {text!r}: expected different transforms ({', '.join(TRANSFORMS)}) and then at most one of "
            f"{', '.join(ROUNDINGS)}"
        )
    return transforms, roundings[0] if roundings else "rtn"


def _with_algorithm(recipe: Recipe, algorithm: str) -> Recipe:
    transforms, rounding = parse_algorithm(algorithm)
    schemes = [find_scheme(name) for name in recipe.scheme_names()]
    if not schemes:
        raise UsageError(
            f"--algorithm {algorithm}: no weights are quantized; choose --int8, --int4, --fp8, --scheme or --recipe"
        )
    if all(rounding_for(scheme, rounding) != rounding for scheme in schemes):
        raise UsageError(
            f"--algorithm {algorithm}: {', '.join(recipe.scheme_names())} has FP8 codes, which are rounded to nearest; leave "
            "--algorithm out, or choose rtn or rtn-minmax"
        )
    return recipe.model_copy(update={"transforms": transforms, "rounding": rounding})


def preset_schemes(target: Target) -> dict[str, str | None]:
    """The scheme that each preset means for a target, and none where the target lacks what it takes.

    INT8 computes in INT8: every target has integer dot products. On CPUs INT4 does too, with activations of 8 bits and one
    scale for each group of columns that the weights have, and so does the head; elsewhere activations stay as they are,
    which is the most accurate. FP8 computes in FP8 where there is such arithmetic; CPUs store it and compute in the model's
    dtype.
    """
    fp8 = "fp8-dynamic" if "fp8" in target.tflops else "fp8-weight" if target.device == "cpu" else None
    if target.device == "cpu":
        return {"int8": "w8a8g-g128", "int4": "w4a8g-g128", "fp8": fp8}
    return {"int8": "w8a8", "int4": "w4a16-g128", "fp8": fp8}


def preset_scheme(preset: str, target: Target) -> str:
    """The scheme that a preset means for a target.

    Raises:
        TargetError: a GPU without FP8 arithmetic.
    """
    scheme = preset_schemes(target)[preset]
    if scheme is None:
        raise TargetError(
            f"--{preset} for {target.name}: {target.architecture} has no FP8 tensor cores; use --int8, or --scheme "
            f"fp8-weight, which stores weights as FP8 and computes in the model's dtype; targets that have: {_with_fp8()}"
        )
    return scheme


def check_target(name: str, scheme: Scheme, target: Target) -> None:
    """Raises TargetError: the scheme computes in FP8, and the target has no such arithmetic."""
    activations = scheme.input_activations
    if activations is not None and activations.type == "float" and "fp8" not in target.tflops:
        raise TargetError(
            f"{name} for {target.name}: {target.architecture} has no FP8 arithmetic; targets that have: {_with_fp8()}; or "
            "store the weights alone as FP8 with --scheme fp8-weight, or use --int8"
        )


def given_weights(
    quantized: Quantized, target: Target, recipe: Recipe | None
) -> tuple[dict[str, GivenWeight], list[str]]:
    """The codes of a quantized checkpoint as the target computes with them, and notes on what that changes.

    Where the checkpoint has activations in FP8 and the target has no such arithmetic, they are not rounded: that costs no
    accuracy.
    """
    weights, notes = dict(quantized.weights), []
    if "fp8" not in target.tflops:
        rounded = [
            name
            for name, weight in weights.items()
            if weight.input_activations is not None and weight.input_activations.type == "float"
        ]
        weights |= {name: replace(weights[name], input_activations=None, input_scale=None) for name in rounded}
        if rounded:
            notes.append(
                f"{quantized.label}: {target.architecture} has no FP8 arithmetic: weights are expanded as they are used, and "
                f"the inputs of {len(rounded)} layers are not rounded to FP8; targets that have: {_with_fp8()}"
            )
    if quantized.kv_cache is not None and (recipe is None or recipe.kv_cache is None):
        notes.append(
            f"the KV cache is {quantized.kv_cache}, as the checkpoint says; its scales are computed from the data, the stored "
            "ones are not used"
        )
    return weights, notes


def given_recipe(quantized: Quantized, recipe: Recipe | None) -> Recipe:
    """The recipe of a quantized checkpoint: its weights as they are; the KV cache as it says, unless the user says it."""
    asked = recipe.kv_cache if recipe is not None else None
    return Recipe(kv_cache=asked or quantized.kv_cache)


def _with_fp8() -> str:
    return ", ".join(found.name for found in TARGETS.values() if "fp8" in found.tflops)
