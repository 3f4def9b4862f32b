"""optc::grouped_mm: each run of rows times the matrix of its group, as mixture-of-experts layers need."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import LIBRARY

LIBRARY.define("grouped_mm(Tensor x, Tensor weight, Tensor offsets) -> Tensor")


def grouped_mm_reference(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """X [S, K] with rows sorted by group, weight [G, K, N], offsets i32[G] (end of each group's rows) -> [S, N].

    Rows at or after offsets[G - 1] belong to no group; they are zero.
    """
    out = x.new_zeros(x.shape[0], weight.shape[2])
    start = 0
    for group, end in enumerate(offsets.tolist()):
        if end > start:
            out[start:end] = x[start:end] @ weight[group]
        start = end
    return out


def _grouped_mm_fake(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


LIBRARY.impl("grouped_mm", grouped_mm_reference, "CompositeExplicitAutograd")
torch.library.register_fake("optc::grouped_mm", _grouped_mm_fake, lib=LIBRARY)
