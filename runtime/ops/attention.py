"""The attention ops: schema, fake and reference implementation of each in one place.

    optc::attention          stateless causal attention over whole sequences (capture, scoring)
    optc::kv_cache_write     puts this step's keys and values into the paged cache, in place
    optc::paged_attention    attention of packed tokens over the paged cache (the step program)

The reference implementations are plain PyTorch, run on any device, and are the oracle of every kernel. They compute in
float32 and return the dtype of `q`. Native kernels register for their device under the same names (see `kernels.py`).

A layer's cache is one buffer [num_blocks, kv_heads, block_size, k_dim + v_dim]: the row of a token holds its key and
then its value. A slot is block * block_size + offset.

A cache of dtype int8 or float8_e4m3fn is quantized: `kv_cache_write` stores codes, `paged_attention` attends to codes
times scales. Every token and head has a scale of its key and a scale of its value, chosen as the token is written: the
largest magnitude over the largest code. The buffer is [num_blocks, kv_heads, block_size, k_dim + v_dim + 8], contiguous,
and the block_size * (k_dim + v_dim + 8) bytes of a block and head are

    codes   [block_size, k_dim + v_dim]   rows as above: they start at multiples of 64 where k_dim + v_dim is one
    scales  f32[2, block_size]            of the keys, then of the values: those of adjacent tokens are adjacent

Attention weights follow one definition everywhere, for query position i and key position j of the same sequence:

    s_ij = scale * <q_i, k_j>,  then softcap * tanh(s_ij / softcap) if softcap > 0      (Gemma 2)
    j is visible iff j <= i, and i - j < window if window > 0                            (Mistral 7B)
    p_ij = exp(s_ij) / (sum over visible j of exp(s_ij) + exp(sink_h))                   (gpt-oss; no last term without sinks)
"""

from __future__ import annotations

import torch
from torch import Tensor

LIBRARY = torch.library.Library("optc", "FRAGMENT")

LARGEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The dtypes of a quantized cache."""


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Float x [..., D] -> codes [..., D] of `dtype` and scale f32[..., 1], so that codes * scale is near x.

    A row that holds NaN or an infinity gets codes of zero and that as its scale: it stays NaN when it is read.
    """
    x = x.float()
    smallest = torch.finfo(torch.float32).tiny  # rows of zeros have a scale too
    scale = (x.abs().amax(-1, keepdim=True) / LARGEST_CODE[dtype]).clamp_min(smallest)
    codes = torch.where(scale.isfinite(), x / scale, 0.0)
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale


def _as_bytes(x: Tensor) -> Tensor:
    """The bytes of x [..., D]: int8 [..., D * itemsize]."""
    return x.contiguous().view(torch.int8)


def _codes_and_scales(blocks: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Views of the parts of quantized blocks, all as bytes.

    blocks int8 [n, KV, S, width + 8], contiguous -> codes [n, KV, S, width], scales [n, KV, 2, S, 4].
    """
    count, heads, size, row = blocks.shape
    flat = blocks.view(count, heads, size * row)
    return flat[..., : size * width].unflatten(2, (size, width)), flat[..., size * width :].unflatten(2, (2, size, 4))


def read_blocks(kv_cache: Tensor, blocks: Tensor, k_dim: int, v_dim: int) -> Tensor:
    """The rows [n, KV, block_size, k_dim + v_dim] of blocks i64[n]: in the cache's dtype, or f32 if it is quantized."""
    if kv_cache.dtype not in LARGEST_CODE:
        return kv_cache[blocks]
    codes, scales = _codes_and_scales(kv_cache.view(torch.int8)[blocks], k_dim + v_dim)
    values = codes.contiguous().view(kv_cache.dtype).float()
    key_scale, value_scale = scales.clone(memory_format=torch.contiguous_format).view(torch.float32).unbind(2)
    return torch.cat([values[..., :k_dim] * key_scale, values[..., k_dim:] * value_scale], dim=-1)


def _probabilities(scores: Tensor, visible: Tensor, softcap: float, sinks: Tensor | None) -> Tensor:
    """Scores f32[KV, R, Q, S] already scaled, visible bool[Q, S], sinks [KV * R] or None -> weights f32[KV, R, Q, S]."""
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    kv_heads, group = scores.shape[:2]
    sink = sinks.float().view(kv_heads, group, 1, 1).expand(*scores.shape[:3], 1)
    return torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]


def _visible(query_positions: Tensor, key_positions: Tensor, window: int) -> Tensor:
    """bool[Q, S]: which keys each query may see."""
    distance = query_positions[:, None] - key_positions[None, :]
    visible = distance >= 0
    return visible & (distance < window) if window > 0 else visible


def _attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float, sinks: Tensor | None
) -> Tensor:
    """Q [Q, H, Dk], k [S, KV, Dk], v [S, KV, Dv], visible bool[Q, S] -> f32[Q, H, Dv]."""
    queries, heads, k_dim = q.shape
    kv_heads, v_dim = k.shape[1], v.shape[2]
    grouped = q.float().view(queries, kv_heads, heads // kv_heads, k_dim)
    scores = torch.einsum("qgrd,sgd->grqs", grouped, k.float()) * scale
    weights = _probabilities(scores, visible, softcap, sinks)
    return torch.einsum("grqs,sgd->qgrd", weights, v.float()).reshape(queries, heads, v_dim)


LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, float scale, int window, float softcap, Tensor? sinks, int layer) -> Tensor"
)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float, sinks: Tensor | None, layer: int
) -> Tensor:
    """Causal attention over whole sequences, positions 0 .. T-1.

    q [B, H, T, Dk], k [B, KV, T, Dk], v [B, KV, T, Dv] (H divisible by KV), sinks [H] or None -> [B, T, H, Dv] in q's
    dtype. `window` 0 means unlimited, `softcap` 0 means none. `layer` names the layer and does not change the result.
    """
    positions = torch.arange(q.shape[2], device=q.device)
    visible = _visible(positions, positions, window)
    out = [
        _attend(qb.transpose(0, 1), kb.transpose(0, 1), vb.transpose(0, 1), visible, scale, softcap, sinks)
        for qb, kb, vb in zip(q, k, v, strict=True)
    ]
    return torch.stack(out).to(q.dtype)


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float, sinks: Tensor | None, layer: int
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


LIBRARY.impl("attention", attention_reference, "CompositeExplicitAutograd")
torch.library.register_fake("optc::attention", _attention_fake, lib=LIBRARY)


LIBRARY.define("kv_cache_write(Tensor k, Tensor v, Tensor(a!) kv_cache, Tensor slot_mapping) -> ()")


def kv_cache_write_reference(k: Tensor, v: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """Store each token's key and value in its slot.

    k [T, KV, Dk], v [T, KV, Dv], kv_cache [num_blocks, KV, block_size, Dk + Dv] (written in place; if quantized, 8 more a
    row), slot_mapping i64[T]; a slot of -1 is padding and is written nowhere.
    """
    real = slot_mapping >= 0
    slots = slot_mapping[real]
    blocks, offsets = slots // kv_cache.shape[2], slots % kv_cache.shape[2]
    k, v = k[real], v[real]
    if kv_cache.dtype not in LARGEST_CODE:
        kv_cache[blocks, :, offsets] = torch.cat([k, v], dim=-1).to(kv_cache.dtype)
        return
    (k_codes, k_scale), (v_codes, v_scale) = (quantize_rows(x, kv_cache.dtype) for x in (k, v))
    codes, scales = _codes_and_scales(kv_cache.view(torch.int8), k.shape[2] + v.shape[2])
    codes[blocks, :, offsets] = torch.cat([_as_bytes(k_codes), _as_bytes(v_codes)], dim=-1)
    scales[blocks, :, :, offsets] = torch.stack([_as_bytes(k_scale), _as_bytes(v_scale)], dim=2)


def _kv_cache_write_fake(k: Tensor, v: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    return None


LIBRARY.impl("kv_cache_write", kv_cache_write_reference, "CompositeExplicitAutograd")
torch.library.register_fake("optc::kv_cache_write", _kv_cache_write_fake, lib=LIBRARY)


LIBRARY.define(
    "paged_attention(Tensor q, Tensor kv_cache, Tensor block_table, Tensor query_start_loc, Tensor seq_lens, "
    "int v_dim, float scale, int window, float softcap, Tensor? sinks) -> Tensor"
)


def paged_attention_reference(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    v_dim: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of T packed tokens of B sequences over the paged cache, which already holds this step's keys and values.

    q [T, H, Dk], kv_cache [num_blocks, KV, block_size, Dk + Dv] (if quantized, 8 more a row), block_table i32[B, P]
    (physical blocks of each sequence in order), query_start_loc i32[B + 1] (tokens query_start_loc[b] ..
    query_start_loc[b+1] of T belong to sequence b and are its last ones), seq_lens i32[B] (length of each sequence,
    these tokens included), sinks [H] or None -> [T, H, Dv] in q's dtype. Tokens at or after query_start_loc[B] are
    padding; their rows are zero.
    """
    block_size, k_dim = kv_cache.shape[2], q.shape[2]
    out = q.new_zeros(q.shape[0], q.shape[1], v_dim)
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    for b, length in enumerate(lengths):
        start, end = starts[b], starts[b + 1]
        if start == end:
            continue
        blocks = block_table[b, : -(-length // block_size)].long()
        rows = read_blocks(kv_cache, blocks, k_dim, v_dim)
        rows = rows.transpose(1, 2).flatten(0, 1)[:length]  # [length, KV, Dk + Dv]
        key_positions = torch.arange(length, device=q.device)
        visible = _visible(key_positions[length - (end - start) :], key_positions, window)
        attended = _attend(q[start:end], rows[..., :k_dim], rows[..., k_dim:], visible, scale, softcap, sinks)
        out[start:end] = attended.to(q.dtype)
    return out


def _paged_attention_fake(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    v_dim: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v_dim)


LIBRARY.impl("paged_attention", paged_attention_reference, "CompositeExplicitAutograd")
torch.library.register_fake("optc::paged_attention", _paged_attention_fake, lib=LIBRARY)
