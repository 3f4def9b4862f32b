"""From a plain module to a graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optc
from optc.errors import UnsupportedModelError, UsageError
from optc.runtime import LLM

from .capture_cases import random_ids
from .families import MAX_LEN, VOCAB_SIZE, randomize


class Attention(nn.Module):
    def __init__(self, *, is_causal: bool = True) -> None:
        super().__init__()
        self.qkv, self.out, self.is_causal = nn.Linear(64, 192), nn.Linear(64, 64), is_causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, 16)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        return self.out(out.transpose(1, 2).flatten(2))


class Plain(nn.Module):
    """A small GPT that knows nothing of transformers."""

    def __init__(self, attention: Callable[[], nn.Module] = Attention) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB_SIZE, 64), nn.Embedding(MAX_LEN, 64)
        self.layers = nn.ModuleList(attention() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, VOCAB_SIZE)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.positions(positions)
        for layer in self.layers:
            x = x + layer(self.norm(x))
        return self.head(self.norm(x))


EXAMPLE = (torch.zeros(1, 6, dtype=torch.long), torch.arange(6)[None])


def test_a_plain_module(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Plain()
    randomize(module)
    output = optc.compile(module, tmp_path / "a.optc", backend="eager", example_inputs=EXAMPLE, max_model_len=MAX_LEN)
    llm = LLM(output, kv_cache_memory=2**22)
    assert len(llm.manifest.kv_cache) == 2
    prompts = [random_ids(9), random_ids(3, seed=1), random_ids(30, seed=2)]
    for prompt, result in zip(prompts, llm.generate(prompts, max_tokens=20, temperature=0), strict=True):
        ids = list(prompt)
        for _ in range(20):
            with torch.no_grad():
                ids.append(int(module(torch.tensor([ids]), torch.arange(len(ids))[None])[0, -1].argmax()))
        assert result.token_ids == ids[len(prompt) :]


@pytest.mark.parametrize(
    "attention", [lambda: Attention(is_causal=False), lambda: nn.Linear(64, 64)], ids=["bidirectional", "no attention"]
)
def test_a_module_without_causal_attention_is_refused(attention: Callable[[], nn.Module], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"Plain.*scaled_dot_product_attention"):
        optc.compile(Plain(attention), tmp_path / "a.optc", backend="eager", example_inputs=EXAMPLE)
    assert not (tmp_path / "a.optc").exists()


def test_a_module_that_mixes_tokens_elsewhere_is_refused(tmp_path: Path) -> None:
    class Convolving(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv1d(64, 64, 3, padding=2)

        def forward(self, x: Tensor) -> Tensor:
            mixed = self.convolution(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
            return super().forward(mixed)

    with pytest.raises(UnsupportedModelError, match=r"Plain.*conv"):
        optc.compile(Plain(Convolving), tmp_path / "a.optc", backend="eager", example_inputs=EXAMPLE)


def test_a_module_needs_example_inputs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="example_inputs"):
        optc.compile(Plain(), tmp_path / "a.optc", backend="eager")


@pytest.mark.parametrize("length", [-3, 0, 1])
def test_a_module_needs_room_for_two_tokens(length: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"max_model_len {length}: expected at least 2"):
        optc.compile(Plain(), tmp_path / "a.optc", backend="eager", example_inputs=EXAMPLE, max_model_len=length)


@pytest.mark.parametrize("length", [None, MAX_LEN + 1])
def test_a_module_whose_positions_end_before_its_length(length: int | None, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=rf"max_model_len {length or 2048}: Plain fails at position {(length or 2048) - 1}"
    ):
        optc.compile(Plain(), tmp_path / "a.optc", backend="eager", example_inputs=EXAMPLE, max_model_len=length)


def test_a_module_without_parameters(tmp_path: Path) -> None:
    """All weights are buffers, one without dimensions."""

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            self.register_buffer("table", torch.randn(VOCAB_SIZE, 32, generator=generator).bfloat16())
            self.register_buffer("gain", torch.tensor(2.0, dtype=torch.bfloat16))
            self.register_buffer("steps", torch.tensor(3))

        def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
            x = nn.functional.embedding(input_ids, self.table) + positions[..., None] * 0.01
            heads = x.to(self.table.dtype).unflatten(-1, (2, 16)).transpose(1, 2)
            out = nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
            return nn.functional.linear(out.transpose(1, 2).flatten(2) * self.gain, self.table)

    module = Frozen()
    options: dict[str, Any] = {"backend": "eager", "example_inputs": EXAMPLE, "max_model_len": 64}
    first = LLM(optc.compile(module, tmp_path / "a.optc", **options), kv_cache_memory=2**22).manifest.model
    assert (first.dtype, first.parameters) == ("bfloat16", VOCAB_SIZE * 32 + 1)
    module.gain.fill_(3)
    second = LLM(optc.compile(module, tmp_path / "b.optc", **options), kv_cache_memory=2**22).manifest.model
    assert second.source_sha256 != first.source_sha256
