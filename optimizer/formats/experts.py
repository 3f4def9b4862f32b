"""Experts that a checkpoint holds one by one, as the one matrix that an artifact has of a layer's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...passes.quantize.given import GivenWeight
from ...runtime.ops.quantized import QuantizedWeight


def stack(weights: Sequence[GivenWeight]) -> GivenWeight | None:
    """Weights [n, K] one below the other, their codes and scales to the bit; none where one matrix cannot hold them.

    A scale for a whole weight becomes one for each of its rows. Of static scales of activations the largest counts. What
    one matrix cannot hold: different schemes, different group indices, or blocks that do not end where a weight does.
    """
    parts = [_by_rows(given.stored.unpack()) for given in weights]
    first, block_rows = parts[0], parts[0].block[0]
    alike = all(
        part.args == first.args
        and part.codes.shape[1] == first.codes.shape[1]
        and part.scale.dtype == first.scale.dtype
        and _same(part.group_index, first.group_index)
        and given.input_activations == weights[0].input_activations
        for part, given in zip(parts, weights, strict=True)
    )
    if not alike or any(part.codes.shape[0] % block_rows for part in parts):
        return None
    zeros = [part.zero for part in parts if part.zero is not None]
    stacked = replace(
        first,
        codes=torch.cat([part.codes for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        zero=torch.cat(zeros) if zeros else None,
    )
    scales = [given.input_scale for given in weights if given.input_scale is not None]
    return GivenWeight(
        stacked.pack(), weights[0].input_activations, torch.stack(scales).amax(dim=0) if scales else None
    )


def _by_rows(weight: QuantizedWeight) -> QuantizedWeight:
    if weight.args.strategy != "tensor":
        return weight
    rows = weight.codes.shape[0]
    zero = None if weight.zero is None else weight.zero.repeat(rows, 1)
    args = weight.args.model_copy(update={"strategy": "channel"})
    return replace(weight, scale=weight.scale.repeat(rows, 1), zero=zero, args=args)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
