"""What the tests of the accuracy budget share."""

from __future__ import annotations

import shutil
from pathlib import Path

from optc.runtime.manifest import BudgetRecord

from .conftest import TEXT

FEW = ("--calibration-samples", 8, "--calibration-length", 64)


def chosen(record: BudgetRecord) -> list[str | None]:
    return [group.chosen for group in record.groups]


def with_text(checkpoint: Path, folder: Path) -> Path:
    """The tiny checkpoint with a text to measure on."""
    copied = Path(shutil.copytree(checkpoint, folder / "tiny"))
    (copied / "calibration.txt").write_text(TEXT * 40, encoding="utf-8")
    return copied
