"""The bundled model is what its card says, and survives compilation."""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import optc
from optc.runtime import LLM

MODEL = Path(__file__).resolve().parents[1] / "examples/tiny-llama"
WINDOW = 1024


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM(optc.compile(MODEL, tmp_path_factory.mktemp("tiny") / "tiny.optc", backend="eager"))


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def held_out_windows(llm: LLM) -> list[list[int]]:
    """Non-overlapping windows, each with BOS, as in the model card."""
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode((MODEL / "heldout.txt").read_text(encoding="utf-8"), add_special_tokens=False)
    return [[0, *ids[start : start + WINDOW - 1]] for start in range(0, len(ids), WINDOW - 1)]


def test_size_and_shape(llm: LLM) -> None:
    checkpoint = sum(path.stat().st_size for path in MODEL.iterdir() if path.suffix != ".txt")
    assert checkpoint <= 12e6
    config = AutoModelForCausalLM.from_pretrained(MODEL).config
    assert config.hidden_size % 256 == 0 and config.intermediate_size % 256 == 0
    assert config.vocab_size == 4096 and config.tie_word_embeddings
    tied = {"lm_head.weight", "model.embed_tokens.weight"} & llm.manifest.constants.keys()
    assert tied == {"model.embed_tokens.weight"}  # stored once, under the name in the file


def test_it_learned_python(llm: LLM) -> None:
    """A quarter of the held-out text: the card's perplexity is within reach, a random model's would be 4096."""
    card = float(re.search(r"\*\*(\d+\.\d+)\*\*", (MODEL / "README.md").read_text(encoding="utf-8"))[1])  # type: ignore[index]
    windows = held_out_windows(llm)[::4]
    scores = [score for window in windows for score in llm.score(window)[0]]
    assert 0.75 * card < math.exp(-sum(scores) / len(scores)) < 1.25 * card
    text = llm.generate("import os\nimport sys\n\ndef main():\n", max_tokens=48)[0].text
    assert text is not None
    ast.parse("def main():\n" + text.rsplit("\n", 1)[0] + "\n    pass\n")


@torch.no_grad()
def test_scores_are_those_of_transformers(llm: LLM, reference: torch.nn.Module) -> None:
    window = held_out_windows(llm)[3][:300]
    ids = torch.tensor(window)[None]
    logits = reference(ids).logits[0, :-1]
    expected = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0]
    found = torch.tensor(llm.score(window)[0])
    # bf16 arithmetic against fp32 on the same weights: single scores move by rounding, their mean hardly.
    assert abs((found - expected).mean().item()) < 5e-3
    assert (found - expected).abs().max().item() < 0.5
