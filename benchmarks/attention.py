"""How fast the paged attention kernel is: decode against memory bandwidth, prefill in GFLOP/s, both beside torch SDPA.

    python benchmarks/attention.py [--threads 2] [--seconds 1.0] [--dtype bfloat16] [--kv-cache int8]

Both sides read the same numbers, SDPA from contiguous tensors (of `dtype` even if our cache is quantized), in turns
within one run. Decode cycles through enough caches to leave no KV data in the processor's caches, as the layers of a model
do; "warm" is one cache over and over. Times are the best of all rounds, calls from Python included.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator

import click
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from optc.optimizer.lowering.native import build_kernels
from optc.runtime.ops.kernels import REQUIRED_FLAGS, host_isa, load_kernels

HEADS, KV_HEADS, DIM, BLOCK_SIZE = 16, 8, 64, 16
SCALE = DIM**-0.5
COLD_BYTES = 128 << 20  # several times the last-level cache
QUANTIZED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}

DECODE = [(1, 128), (1, 1024), (1, 4096), (1, 8192), (16, 512)]  # sequences, tokens of each
PREFILL = [(512, 512), (2048, 2048), (64, 2048)]  # new tokens, all tokens


def best_times(calls: list[Callable[[], object]], seconds: float) -> list[float]:
    """The shortest time of each call in seconds, the calls taken in turns."""
    best = [float("inf")] * len(calls)
    for call in calls:
        call()
    deadline = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < deadline:
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def memory_bandwidth(seconds: float) -> float:
    """Bytes a second that torch reads when it sums a tensor far larger than any cache."""
    data = torch.ones(64 << 20, dtype=torch.float32)
    (best,) = best_times([data.sum], seconds)
    return data.nbytes / best


def paged(k: Tensor, v: Tensor, cache_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """k, v [B, KV, L, D] -> kv_cache [num_blocks, KV, block_size, 2 D (+ 8)] and its shuffled block_table i32[B, P]."""
    batch, kv_heads, length, dim = k.shape
    blocks = length // BLOCK_SIZE
    table = torch.randperm(batch * blocks).view(batch, blocks)
    row = 2 * dim + (8 if cache_dtype in QUANTIZED.values() else 0)
    cache = torch.zeros(batch * blocks, kv_heads, BLOCK_SIZE, row, dtype=cache_dtype)
    slots = (table[..., None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()
    keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (k, v))
    torch.ops.optc.kv_cache_write(keys, values, cache, slots)
    return cache, table.int()


def calls(
    batch: int, queries: int, length: int, copies: int, dtype: torch.dtype, cache_dtype: torch.dtype
) -> list[Callable[[], object]]:
    """paged_attention and SDPA on the same data, `copies` times over to be taken in turns."""

    def data() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for _ in range(copies):
            k, v = torch.randn(2, batch, KV_HEADS, length, DIM, dtype=dtype)
            yield torch.randn(batch, HEADS, queries, DIM, dtype=dtype), k, v

    contiguous = list(data())
    packed = [(q.transpose(1, 2).reshape(-1, HEADS, DIM), *paged(k, v, cache_dtype)) for q, k, v in contiguous]
    starts = torch.arange(batch + 1, dtype=torch.int32) * queries
    lengths = torch.full((batch,), length, dtype=torch.int32)
    mask = None if queries in (1, length) else torch.ones(queries, length, dtype=torch.bool).tril(length - queries)
    ours, theirs = itertools.cycle(packed), itertools.cycle(contiguous)

    def native() -> Tensor:
        q, cache, table = next(ours)
        out: Tensor = torch.ops.optc.paged_attention(q, cache, table, starts, lengths, DIM, SCALE, 0, 0.0, None)
        return out

    def sdpa() -> Tensor:
        q, k, v = next(theirs)
        is_causal = queries == length
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=SCALE, enable_gqa=True)

    atol = 1e-1 if cache_dtype in QUANTIZED.values() else 2e-2
    torch.testing.assert_close(native(), sdpa().transpose(1, 2).reshape(-1, HEADS, DIM), atol=atol, rtol=2e-2)
    return [native, sdpa]


def empty_call(dtype: torch.dtype, cache_dtype: torch.dtype) -> Callable[[], object]:
    """A call with nothing to attend to: what the dispatcher and the checks cost."""
    cache, table = paged(*torch.randn(2, 1, KV_HEADS, BLOCK_SIZE, DIM, dtype=dtype), cache_dtype)
    none = torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    q = torch.empty(0, HEADS, DIM, dtype=dtype)
    return lambda: torch.ops.optc.paged_attention(q, cache, table, *none, DIM, SCALE, 0, 0.0, None)


@click.command()
@click.option("--threads", default=2, show_default=True, help="Threads of torch's pool.")
@click.option("--seconds", default=1.0, show_default=True, help="Measuring time per case and side.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16", show_default=True)
@click.option("--kv-cache", type=click.Choice(["auto", *QUANTIZED]), default="auto", show_default=True)
@click.option("--isa", type=click.Choice(list(REQUIRED_FLAGS)), default=None, help="Default: the best here.")
def main(threads: int, seconds: float, dtype: str, kv_cache: str, isa: str | None) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    load_kernels(build_kernels(isa or host_isa()))
    float_dtype: torch.dtype = getattr(torch, dtype)
    types = float_dtype, QUANTIZED.get(kv_cache, float_dtype)
    floor = memory_bandwidth(seconds)
    click.echo(f"{isa or host_isa()}, {threads} threads, {dtype}, {HEADS} heads, {KV_HEADS} KV heads, dim {DIM}")
    click.echo(f"KV cache {types[1]}; memory bandwidth (sum of 256 MiB): {floor / 1e9:.1f} GB/s")
    (empty,) = best_times([empty_call(*types)], seconds)
    click.echo(f"a call with no tokens: {empty * 1e6:.1f} us\n")
    click.echo(f"{'case':<22}{'optc':>10}{'SDPA':>10}{'speedup':>9}   rate")
    row = 2 * DIM * types[1].itemsize + (8 if kv_cache in QUANTIZED else 0)
    for batch, length in DECODE:
        size = batch * length * KV_HEADS * row
        native, sdpa = best_times(calls(batch, 1, length, max(2, COLD_BYTES // size), *types), seconds)
        rate = f"{size / native / 1e9:.1f} GB/s of KV ({size / native / floor:.0%} of memory bandwidth)"
        report(f"decode {batch} x {length}", native, sdpa, rate)
    native, sdpa = best_times(calls(1, 1, 128, 1, *types), seconds)
    report("decode 1 x 128, warm", native, sdpa, f"{native * 1e6:.1f} us")
    for queries, length in PREFILL:
        native, sdpa = best_times(calls(1, queries, length, 2, *types), seconds)
        flops = 4 * DIM * HEADS * queries * (length - (queries - 1) / 2)  # only what causal attention needs
        report(f"prefill {queries} of {length}", native, sdpa, f"{flops / native / 1e9:.0f} GFLOP/s")


def report(case: str, native: float, sdpa: float, rate: str) -> None:
    click.echo(f"{case:<22}{native * 1e6:>7.0f} us{sdpa * 1e6:>7.0f} us{sdpa / native:>8.2f}x   {rate}")


if __name__ == "__main__":
    main()
