"""compressed-tensors: pack-quantized, int-quantized, float-quantized, naive-quantized and mixtures of them.

    weight_packed      i32[N, ceil(K * bits / 32)]: codes + 2^(bits-1), packed from the lowest bit up, dense across words
    weight             int8 or e4m3 [N, K]: codes, where they are not packed
    weight_shape       i64[2]: N and K, beside packed codes
    weight_scale       [1] a tensor, [N, 1] a row, [N, groups], or [ceil(N / rows), ceil(K / columns)] blocks
    weight_zero_point  of the scale's shape; i32[ceil(N * bits / 32), groups] where codes are packed
    weight_g_idx       i32[K]: the group of each column (act-order)
    input_scale        [1], where activations are static

W = (code - zero) * scale.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...errors import CheckpointError, UnsupportedModelError
from ...passes.quantize.given import GivenWeight
from ...runtime.ops.quantized import FP8, QuantizedWeight, unpack_bits
from ...runtime.scheme import QuantizationArgs
from .module import SCALES, Format, QuantizedModule, index_of, integer, mapping, refuse_bits

_LAYOUTS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
_WEIGHTS = ("weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx")
_CODES = {"I8": torch.int8, "F8_E4M3": FP8}


@dataclass(frozen=True)
class Group:
    """A config group: what its modules' weights and inputs are rounded to."""

    targets: tuple[str, ...]
    weights: QuantizationArgs
    activations: QuantizationArgs | None


@dataclass(frozen=True, kw_only=True)
class CompressedTensors(Format):
    """A checkpoint of llm-compressor, or of any tool that writes with compressed-tensors."""

    leaves: ClassVar[frozenset[str]] = frozenset({*_WEIGHTS, "input_scale", "input_zero_point"})

    groups: tuple[Group, ...]
    ignore: tuple[str, ...]

    @classmethod
    def parse(cls, config: Mapping[str, Any], path: str) -> CompressedTensors:
        """Raises UnsupportedModelError: a layout that optc does not read. CheckpointError: a config that is none."""
        layout = str(config.get("format"))
        groups = mapping(config, "config_groups", path)
        layouts = {layout, *(str(group["format"]) for group in groups.values() if _has(group, "format"))}
        status = config.get("quantization_status", "compressed")
        refused = sorted(layouts - set(_LAYOUTS)) or ([f"{layout} ({status})"] if status != "compressed" else [])
        refused += (
            ["sparse weights"] if (mapping(config, "sparsity_config", path).get("format") or "dense") != "dense" else []
        )
        refused += (
            ["rotations (transform_config)"] if mapping(config, "transform_config", path).get("config_groups") else []
        )
        if refused:
            raise UnsupportedModelError(
                f"{path}: compressed-tensors with {refused[0]}; optc reads {', '.join(_LAYOUTS)} as compressed: take a "
                "checkpoint in one of those, or the unquantized one"
            )
        if not groups:
            raise CheckpointError(
                f"{path}: quantization_config has no config_groups; it says nothing about the weights"
            )
        parsed, notes = [], []
        for name, group in groups.items():
            found, note = _parse_group(name, group, path)
            parsed.append(found)
            notes += note
        kv_cache, note = _kv_cache(mapping(config, "kv_cache_scheme", path))
        first = parsed[0].weights
        label = f"compressed-tensors {layout}, {'FP8' if first.type == 'float' else f'{first.num_bits} bits'}"
        ignore = tuple(map(str, config.get("ignore") or ()))
        return cls(
            groups=tuple(parsed),
            ignore=ignore,
            label=label,
            kv_cache=kv_cache,
            notes=tuple(dict.fromkeys([*notes, *note])),
        )

    def is_coded(self, tensors: Mapping[str, str]) -> bool:
        return "weight_packed" in tensors or tensors.get("weight") in _CODES

    def read(self, module: QuantizedModule) -> GivenWeight:
        group = self._group(module)
        args = group.weights
        codes = self._codes(module, args)
        rows, columns = codes.shape
        block = args.block(rows, columns)
        grid = (-(-rows // block[0]), -(-columns // block[1]))
        scale = _grid(module, "weight_scale", SCALES, grid)
        zero = self._zero(module, args, grid)
        group_index = None
        if "weight_g_idx" in module:
            found = module.take("weight_g_idx", (torch.int32, torch.int64), (columns,)).to(torch.int32)
            if not (found == -1).all():  # which stands for columns in their order
                group_index = index_of(found, block[1])
        if group_index is not None:
            args = args.model_copy(update={"actorder": "group"})
        stored = module.store(QuantizedWeight(codes, scale, zero, group_index, args))
        activations, input_scale = group.activations, None
        if activations is not None and not activations.dynamic:
            input_scale = module.take("input_scale", SCALES, (), (1,), (1, 1)).float().reshape(1)
        return GivenWeight(stored, activations, input_scale)

    def _group(self, module: QuantizedModule) -> Group:
        """The group whose targets have the module: by its exact name first, then by pattern, then by class."""

        def by_name(target: str) -> bool:
            return target == module.name

        def by_pattern(target: str) -> bool:
            return target.startswith("re:") and re.match(target.removeprefix("re:"), module.name) is not None

        def by_class(target: str) -> bool:
            return target == module.kind

        ways = (by_name, by_pattern, by_class)
        found = [group for way in ways for group in self.groups if any(map(way, group.targets))]
        if not found or any(way(target) for way in ways for target in self.ignore):
            raise CheckpointError(
                f"{module.path}: {module.name} is quantized, and quantization_config {'ignores' if found else 'does not target'} "
                "it; the config is for other weights"
            )
        return found[0]

    def _codes(self, module: QuantizedModule, args: QuantizationArgs) -> Tensor:
        if "weight_packed" not in module:
            return module.take("weight", (FP8 if args.type == "float" else torch.int8,), (None, None))
        shape = module.take("weight_shape", (torch.int64, torch.int32), (2,)).tolist()
        words = -(-shape[1] * args.num_bits // 32)
        packed = module.take("weight_packed", (torch.int32,), (shape[0], words))
        return unpack_bits(packed, args.num_bits, shape[1])

    def _zero(self, module: QuantizedModule, args: QuantizationArgs, grid: tuple[int, int]) -> Tensor | None:
        if args.symmetric and "weight_zero_point" not in module:
            return None
        is_packed = "weight_packed" in module and args.strategy in ("group", "channel")
        if is_packed:
            packed = module.take("weight_zero_point", (torch.int32,), (-(-grid[0] * args.num_bits // 32), grid[1]))
            zero = unpack_bits(packed.t().contiguous(), args.num_bits, grid[0]).t().contiguous()
        else:
            zero = _grid(module, "weight_zero_point", (torch.int8,), grid)
        if args.symmetric and zero.any():
            raise CheckpointError(
                f"{module.path}: {module.name}.weight_zero_point is not zero, and quantization_config says symmetric; the "
                "config is for other weights"
            )
        return None if args.symmetric else zero


def _grid(module: QuantizedModule, leaf: str, dtypes: tuple[torch.dtype, ...], grid: tuple[int, int]) -> Tensor:
    """A scale or zero point [rows, columns]; one of a single number or of a row each may have fewer dimensions."""
    flat: list[tuple[int, ...]] = [(grid[0],)] if grid[1] == 1 else []
    flat += [()] if grid == (1, 1) else []
    return module.take(leaf, dtypes, grid, *flat).reshape(grid).contiguous()


def _has(group: object, key: str) -> bool:
    return isinstance(group, dict) and group.get(key) is not None


def _parse_group(name: str, group: Any, path: str) -> tuple[Group, list[str]]:
    if (
        not _has(group, "weights")
        or not isinstance(group["weights"], dict)
        or not isinstance(group.get("targets"), list)
    ):
        raise CheckpointError(
            f"{path}: the config group {name} has no weights or no targets; optc reads groups that spell both out"
        )
    if _has(group, "output_activations"):
        raise UnsupportedModelError(
            f"{path}: {name} quantizes output activations, which optc does not; use another checkpoint"
        )
    weights = _weights(mapping(group, "weights", path), name, path)
    activations, notes = None, []
    if raw := mapping(group, "input_activations", path):
        activations = _activations(raw)
        if activations is None:
            notes = [f"the config group {name} rounds activations in a way that optc has not; they are not rounded"]
    return Group(tuple(map(str, group["targets"])), weights, activations), notes


def _weights(raw: Mapping[str, Any], name: str, path: str) -> QuantizationArgs:
    bits, group_size = integer({"num_bits": 8, **raw}, "num_bits", path), raw.get("group_size")
    kind, symmetric = raw.get("type", "int"), raw.get("symmetric", True)
    strategy: Any = raw.get("strategy") or (
        "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    )
    if kind == "int":
        refuse_bits(bits, path, "compressed-tensors")
    elif (kind, bits, symmetric) != ("float", 8, True):
        raise UnsupportedModelError(
            f"{path}: {name} has {kind} weights of {bits} bits{'' if symmetric else ' with zero points'}; optc reads 8-bit "
            "floats (E4M3) without: take another checkpoint, or the unquantized one"
        )
    block = raw.get("block_structure")
    if isinstance(block, str):
        block = [int(size) for size in re.findall(r"\d+", block)]
    if strategy not in ("tensor", "channel", "group", "block") or (strategy == "block" and not symmetric):
        raise UnsupportedModelError(
            f"{path}: {name} has weights with a scale by {strategy}{'' if symmetric else ' and zero points'}; optc reads "
            "tensor, channel, group and block: take another checkpoint, or the unquantized one"
        )
    if (strategy == "group" and not (isinstance(group_size, int) and group_size > 0)) or (
        strategy == "block" and not (isinstance(block, list) and len(block) == 2)
    ):
        raise CheckpointError(f"{path}: {name} has weights by {strategy} without the size of one")
    return QuantizationArgs(
        num_bits=bits,
        type=kind,
        symmetric=symmetric,
        strategy=strategy,
        group_size=group_size if strategy == "group" else None,
        block_structure=(block[0], block[1]) if strategy == "block" and block else None,
    )


def _activations(raw: Mapping[str, Any]) -> QuantizationArgs | None:
    """The rounding of a layer's inputs, if optc has it."""
    group_size, dynamic = raw.get("group_size"), raw.get("dynamic", False)
    strategy = raw.get("strategy") or ("tensor" if group_size is None else "group")
    kind = raw.get("type", "int")
    if raw.get("num_bits", 8) != 8 or not raw.get("symmetric", True) or kind not in ("int", "float"):
        return None
    match strategy, dynamic:
        case "token", True:
            return QuantizationArgs(type=kind, strategy="token", dynamic=True)
        case "tensor", False:
            return QuantizationArgs(type=kind, strategy="tensor")
        case "group", True if isinstance(group_size, int) and group_size > 0:
            return QuantizationArgs(type=kind, strategy="group", group_size=group_size, dynamic=True)
    return None


def _kv_cache(raw: Mapping[str, Any]) -> tuple[Literal["int8", "fp8"] | None, list[str]]:
    if not raw:
        return None, []
    if raw.get("num_bits", 8) != 8 or raw.get("type") not in ("int", "float"):
        return None, ["the KV cache stays in the model's dtype: optc has no cache as kv_cache_scheme says"]
    return ("int8" if raw["type"] == "int" else "fp8"), []
