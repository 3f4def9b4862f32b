"""Quantized KV caches: what the reference ops store and read, and whole artifacts with them, portable and native."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import optc
from optc.runtime import LLM
from optc.runtime.artifact import open_artifact
from optc.runtime.executor import Executor
from optc.runtime.manifest import KVCacheSpec
from optc.runtime.ops.attention import (
    LARGEST_CODE,
    kv_cache_write_reference,
    paged_attention_reference,
    quantize_rows,
    read_blocks,
)

DTYPES = list(LARGEST_CODE)
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def empty_cache(blocks: int, heads: int, size: int, k_dim: int, v_dim: int, dtype: torch.dtype) -> Tensor:
    """A quantized cache whose scales are NaN."""
    name = str(dtype).removeprefix("torch.")
    spec = KVCacheSpec(layer=0, kv_heads=heads, k_dim=k_dim, v_dim=v_dim, window=0, dtype=name)
    return torch.full((blocks, heads, size, spec.row_size), -1, dtype=torch.int8).view(dtype)


def rows_of(cache: Tensor, k_dim: int, v_dim: int) -> Tensor:
    """All rows [num_blocks * block_size, KV, Dk + Dv], dequantized."""
    return read_blocks(cache, torch.arange(len(cache)), k_dim, v_dim).transpose(1, 2).flatten(0, 1)


@settings(max_examples=60)
@given(
    tokens=st.integers(0, 20),
    heads=st.integers(1, 3),
    dims=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    size=st.sampled_from([1, 5, 8, 16]),
    magnitudes=st.tuples(st.integers(-30, 30), st.integers(-30, 30)),
    dtype=st.sampled_from(DTYPES),
    x_dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 1000),
)
def test_what_is_read_is_near_what_was_written(
    tokens: int,
    heads: int,
    dims: tuple[int, int],
    size: int,
    magnitudes: tuple[int, int],
    dtype: torch.dtype,
    x_dtype: torch.dtype,
    seed: int,
) -> None:
    """INT8 errs by half a step at most, E4M3 by a sixteenth of the element, or half its smallest step."""
    torch.manual_seed(seed)
    k, v = (
        (torch.randn(tokens, heads, dim) * 10.0**power).to(x_dtype).nan_to_num()
        for dim, power in zip(dims, magnitudes, strict=True)
    )
    blocks = tokens // size + 2
    cache = empty_cache(blocks, heads, size, *dims, dtype)
    slots = torch.randperm(blocks * size)[:tokens]
    slots[torch.rand(tokens) < 0.2] = -1
    kv_cache_write_reference(k, v, cache, slots)
    found = rows_of(cache, *dims)
    written = torch.zeros(blocks * size, dtype=torch.bool)
    written[slots[slots >= 0]] = True
    assert found[~written].isnan().all(), "padding and other tokens are left alone"
    for x, rows in zip((k, v), found.split(dims, dim=-1), strict=True):
        x = x.float()[slots >= 0]
        step = x.abs().amax(-1, keepdim=True) / LARGEST_CODE[dtype] + 2e-38
        bound = step / 2 if dtype == torch.int8 else torch.maximum(x.abs() / 16, step * 2**-10)
        assert ((rows[slots[slots >= 0]] - x).abs() <= bound * 1.00001).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_denormals_and_huge_values(dtype: torch.dtype) -> None:
    x = torch.zeros(4, 16)
    x[1], x[2, 0], x[3] = 1e-40, 1e38, -3e38
    codes, scale = quantize_rows(x, dtype)
    found = codes.float() * scale
    assert found[0].eq(0).all()
    torch.testing.assert_close(found, x, atol=1e-38, rtol=1e-6)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_broken_key_stays_broken_and_alone(dtype: torch.dtype, broken: float) -> None:
    """One head of one token of the first sequence: its later tokens turn NaN there, all else keeps its bits."""
    torch.manual_seed(0)
    k, v, q = torch.randn(12, 2, 8), torch.randn(12, 2, 8), torch.randn(4, 4, 8)
    where = (
        torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
        torch.tensor([0, 2, 4], dtype=torch.int32),
        torch.tensor([6, 6], dtype=torch.int32),
    )
    slots = torch.tensor([0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13])

    def attend(k: Tensor) -> tuple[Tensor, Tensor]:
        cache = empty_cache(4, 2, 4, 8, 8, dtype)
        kv_cache_write_reference(k, v, cache, slots)
        return rows_of(cache, 8, 8), paged_attention_reference(q, cache, *where, 8, 0.3, 0, 0.0, None)

    rows, out = attend(k)
    k[3, 1, 5] = broken
    broken_rows, broken_out = attend(k)
    changed = (broken_rows != rows).any(-1)[slots]
    assert changed.nonzero().tolist() == [[3, 1]]
    assert broken_rows[3, 1, :8].isnan().all() and torch.equal(broken_rows[3, 1, 8:], rows[3, 1, 8:])
    assert broken_out[:2, 2:].isnan().all(), "both heads that share the KV head"
    assert torch.equal(broken_out[:2, :2], out[:2, :2]) and torch.equal(broken_out[2:], out[2:])


def test_the_manifest_and_the_ops_agree_on_what_is_quantized() -> None:
    for name in ("int8", "float8_e4m3fn", "float32", "bfloat16", "float16"):
        spec = KVCacheSpec(layer=0, kv_heads=2, k_dim=24, v_dim=16, window=0, dtype=name)
        dtype = getattr(torch, name)
        assert spec.row_size == 24 + 16 + (8 if dtype in LARGEST_CODE else 0)
        assert spec.bytes_per_token(dtype.itemsize) == 2 * spec.row_size * dtype.itemsize


@pytest.fixture(scope="module")
def artifacts(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny checkpoint with native code and that KV cache; made once each."""
    made: dict[str, Path] = {}

    def make(kv_cache: str) -> Path:
        if kv_cache not in made:
            output = tmp_path_factory.mktemp("kv") / f"{kv_cache}.optc"
            made[kv_cache] = optc.compile(checkpoint, output, kv_cache=kv_cache, block_size=16)
        return made[kv_cache]

    return make


PROMPTS = [[5, 9, 20], list(range(30, 100)), [7], list(range(250, 200, -1)), [44] * 17]


@pytest.mark.parametrize("kv_cache", ["int8", "fp8"])
def test_greedy_tokens(artifacts: Callable[[str], Path], kv_cache: str) -> None:
    """Native and portable agree; company, and how prompts are cut into chunks, change nothing."""
    path = artifacts(kv_cache)
    options = {"max_tokens": 20, "temperature": 0.0, "ignore_eos": True}
    native, portable = LLM(path, kv_cache_memory=2**20), LLM(path, native=False, kv_cache_memory=2**20)
    assert native.engine.executor.is_native and not portable.engine.executor.is_native
    together = [result.token_ids for result in native.generate(PROMPTS, **options)]
    assert together == [result.token_ids for result in portable.generate(PROMPTS, **options)]
    assert together == [native.generate(prompt, **options)[0].token_ids for prompt in PROMPTS]
    chunked = LLM(path, kv_cache_memory=2**20, max_num_batched_tokens=13)
    assert together == [result.token_ids for result in chunked.generate(PROMPTS, **options)]


@pytest.mark.parametrize("kv_cache", ["int8", "fp8"])
def test_the_cache_is_that_small(artifacts: Callable[[str], Path], artifact: Path, kv_cache: str) -> None:
    """16 + 16 codes and 8 bytes of scales a head instead of 128 bytes of float32."""
    manifest, plain = open_artifact(artifacts(kv_cache)).manifest, open_artifact(artifact).manifest
    assert plain.memory.kv_bytes_per_token == 2 * 2 * 128
    assert manifest.memory.kv_bytes_per_token == 2 * 2 * 40
    assert manifest.quantization is not None and manifest.quantization.kv_cache_scheme is not None
    assert manifest.quantization.layers == ()
    assert "quantize_kv_cache" in [record.name for record in manifest.passes]
    executor = Executor(open_artifact(artifacts(kv_cache)), num_blocks=3, native=False)
    assert sum(cache.nbytes for cache in executor.caches.values()) == 3 * 16 * manifest.memory.kv_bytes_per_token
    memory = 2**16
    blocks = [
        LLM(path, native=False, kv_cache_memory=memory).engine.pool.num_blocks
        for path in (artifact, artifacts(kv_cache))
    ]
    assert blocks == [memory // (16 * 512), memory // (16 * 160)]


def test_identities_differ(checkpoint: Path, artifact: Path, tmp_path: Path) -> None:
    """By the cache alone; and the weights stay what they are."""
    made = [
        optc.compile(checkpoint, tmp_path / kind, kv_cache=kind, backend="eager", block_size=16)
        for kind in ("int8", "fp8")
    ]
    manifests = [open_artifact(path).manifest for path in (artifact, *made)]
    assert len({manifest.identity for manifest in manifests}) == 3
    assert len({manifest.files["weights.safetensors"].sha256 for manifest in manifests}) == 1
