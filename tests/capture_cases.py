"""What the tests of capture share: a compiled model beside the one it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optc
from optc.runtime import LLM

from .families import VOCAB_SIZE

EXACT = 1e-4


def random_ids(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def log_probabilities(model: nn.Module, ids: list[int]) -> Tensor:
    """Of each token after the first, as `LLM.score` gives them."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids)[1:, None])[:, 0]


def assert_scores(llm: LLM, reference: nn.Module, ids: list[int]) -> None:
    assert llm.score(ids)[0] == pytest.approx(log_probabilities(reference, ids).tolist(), abs=EXACT)


def compiled(checkpoint: Path, **options: Any) -> LLM:
    output = checkpoint.with_name(f"{checkpoint.name}.{options.get('max_model_len')}.optc")
    return LLM(optc.compile(checkpoint, output, backend="eager", **options), kv_cache_memory=2**22)
