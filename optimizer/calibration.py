"""Calibration data: files of text or conversations, as token sequences."""

from __future__ import annotations

from pathlib import Path

import tokenizers
import torch

from ..errors import UsageError
from ..passes.quantize.calibrate import Calibration
from .checkpoint import TokenizerData


def load_calibration(
    path: Path, tokenizer: TokenizerData, *, num_samples: int = 128, sequence_length: int = 512, seed: int = 0
) -> Calibration:
    """Token sequences of `sequence_length` drawn from the text in `path`."""
    text = path.read_text(encoding="utf-8")
    ids = tokenizers.Tokenizer.from_str(tokenizer.json).encode(text).ids
    if len(ids) < sequence_length:
        raise UsageError(f"{path}: {len(ids)} tokens, expected at least one sequence of {sequence_length}")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(ids) - sequence_length + 1, (num_samples,), generator=generator).tolist()
    return Calibration(tuple(torch.tensor(ids[s : s + sequence_length]) for s in starts), path.name, seed)
