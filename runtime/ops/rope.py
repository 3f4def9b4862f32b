"""Rotary position embedding of queries and keys, alone and together with what surrounds it in the step program.

    optc::rope(q, k, cos, sin)                                  both rotated
    optc::rope_kv_write(q, k, v, cos, sin, q_weight?, k_weight?, eps, weight_offset, kv_cache, slot_mapping)
        both normed if there are weights, both rotated, keys and values put into the paged cache; gives the queries

A head of D numbers is rotated in its first R, the columns of cos and sin, by halves:

    out[i] = x[i] * cos[i] - x[i + R/2] * sin[i]
    out[i + R/2] = x[i + R/2] * cos[i + R/2] + x[i] * sin[i + R/2]        for i < R/2

in float32, rounded to x's dtype once; the rest stays as it is. `rope_kv_write` gives to the bit what `rms_norm`, `rope` and
`kv_cache_write` give one after the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import LIBRARY, kv_cache_write_reference
from .norm import rms_norm_reference

LIBRARY.define("rope(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)")


def rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Q [B, H, T, D], k [B, KV, T, D], cos and sin [B, T, R] with R even and at most D -> the shapes of q and k."""
    cos, sin = cos[:, None], sin[:, None]
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """X [..., D], cos and sin [..., R] that broadcast."""
    values, width = x.float(), cos.shape[-1]
    first, second, rest = values.tensor_split([width // 2, width], dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    rotated = values[..., :width] * cos.float() + turned * sin.float()
    return torch.cat([rotated, rest], dim=-1).to(x.dtype)


def _rope_fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


LIBRARY.impl("rope", rope_reference, "CompositeExplicitAutograd")
torch.library.register_fake("optc::rope", _rope_fake, lib=LIBRARY)


LIBRARY.define(
    "rope_kv_write(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight, float eps, "
    "float weight_offset, Tensor(a!) kv_cache, Tensor slot_mapping) -> Tensor"
)


def rope_kv_write_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    weight_offset: float,
    kv_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """The queries, rotated; keys and values go into the cache.

    q [T, H, D], k [T, KV, D], v [T, KV, Dv] of one dtype, cos and sin [T, R], q_weight and k_weight [D] of RMSNorms over the
    heads, or none; kv_cache and slot_mapping as in `kv_cache_write` -> [T, H, D].
    """
    if q_weight is not None:
        q = rms_norm_reference(q, q_weight, eps, weight_offset)
    if k_weight is not None:
        k = rms_norm_reference(k, k_weight, eps, weight_offset)
    cos, sin = cos[:, None], sin[:, None]
    kv_cache_write_reference(_rotate(k, cos, sin), v, kv_cache, slot_mapping)
    return _rotate(q, cos, sin)


def _rope_kv_write_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    weight_offset: float,
    kv_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    return q.new_empty(q.shape)


LIBRARY.impl("rope_kv_write", rope_kv_write_reference, "CompositeExplicitAutograd")
torch.library.register_fake("optc::rope_kv_write", _rope_kv_write_fake, lib=LIBRARY)
