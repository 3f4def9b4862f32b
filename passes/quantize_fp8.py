"""Store the weights of linear layers as FP8."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from .base import Pass, Result
from .graph import Program, add_weight, call, get_weight, replacing

aten, optc = torch.ops.aten, torch.ops.optc
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, kw_only=True)
class QuantizeFp8(Pass):
    """linear(x, weight [N, K], bias)  ->  optc.linear_fp8(x, weight as E4M3 [N, K], scale f32[N], bias)

    Round to nearest, scale = max |row| / 448. Left alone: the layer that gives the logits, weights that are also used
    elsewhere (tied embeddings), and computed weights.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    provides: ClassVar[frozenset[str]] = frozenset({"quantized"})
    # A lossy rewrite: E4M3 rounds each weight by up to 2**-4 of it, and the errors of all layers add up in the logits.
    tolerance: ClassVar[float] = 0.25

    def apply(self, program: Program) -> Result:
        result = Result()
        linears = program.graph.find_nodes(op="call_function", target=aten.linear.default)
        uses = Counter(node.target for node in program.graph.find_nodes(op="get_attr") for _ in node.users)
        for node in linears:
            x, weight, bias = (*node.args, None)[:3]
            if reason := _keep(weight, uses, is_last=node is linears[-1]):
                result.decline(node, reason)
                continue
            name = weight.target
            codes, scale = quantize_rows(get_weight(program.module, name))
            source = program.sources.get(name, name)
            is_transposed = program.layouts.get(name) == "transposed"
            add_weight(program, f"{name}_fp8", codes, source, layout="fp8_transposed" if is_transposed else "fp8")
            add_weight(program, f"{name}_scale", scale, source, layout="fp8_scale")
            with replacing(program.graph, node) as new:
                stored, scales = program.graph.get_attr(f"{name}_fp8"), program.graph.get_attr(f"{name}_scale")
                new.append(call(program.graph, optc.linear_fp8.default, x, stored, scales, bias))
            result.matches += 1
        return result


def _keep(weight: object, uses: Counter[Any], *, is_last: bool) -> str | None:
    """Why this layer stays in full precision; None if it does not."""
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return "its weight is computed"
    if is_last:
        return "it gives the logits"
    return "its weight is also used elsewhere" if uses[weight.target] > 1 else None


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [N, K] -> codes float8_e4m3fn[N, K] and scale f32[N], with weight ~ codes * scale. A row of zeros has scale 1."""
    largest = weight.detach().float().abs().amax(dim=1)
    scale = torch.where(largest > 0, largest / torch.finfo(FP8).max, torch.ones_like(largest))
    return (weight.detach().float() / scale[:, None]).to(FP8), scale
