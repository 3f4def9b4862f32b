"""What the user asks for, decided and frozen before work starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..passes.quantize.recipe import Recipe
from .budget import Budget
from .targets import Target

Backend = Literal["inductor", "eager"]


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """One compilation.

    Attributes:
        source: local folder or hub id.
        output: artifact folder to write.
        target: hardware the code is for.
        backend: inductor (native code) or eager (the portable program alone).
        dtype: auto, float32, bfloat16 or float16.
        adapter: LoRA adapter to merge.
        recipe: what to quantize and how; none quantizes nothing.
        calibration: file or folder of text to calibrate on; none takes what lies in the checkpoint, if anything does.
        calibration_samples: how many sequences.
        calibration_length: tokens of each.
        seed: of the draw.
        budget: accuracy or size that must be kept.
        choose: let the budget choose the schemes; else they are the user's, and it is only checked.
        evaluate: text to measure the artifact on, beside the checkpoint; none measures nothing.
        force: replace an artifact at `output`.
        dump: folder for the graph before and after every pass.
        verify: check the logits after every pass.
        block_size: tokens a block of the KV cache holds.
        max_model_len: largest number of tokens a sequence may have; None takes the model's own limit.
    """

    source: str
    output: Path
    target: Target
    backend: Backend = "inductor"
    dtype: str = "auto"
    adapter: Path | None = None
    recipe: Recipe | None = None
    calibration: Path | None = None
    calibration_samples: int = 128
    calibration_length: int = 512
    seed: int = 0
    budget: Budget | None = None
    choose: bool = False
    evaluate: Path | None = None
    force: bool = False
    dump: Path | None = None
    verify: bool = True
    block_size: int = 8
    max_model_len: int | None = None

    @property
    def uses_cpu_kernels(self) -> bool:
        """Whether the artifact gets optc's own CPU kernels, and so the ops and layouts that only they run fast."""
        return self.backend == "inductor" and self.target.isa is not None and self.target.can_build_here()
