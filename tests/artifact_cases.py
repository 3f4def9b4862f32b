"""What the tests of artifacts share."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import optc
from optc.runtime import LLM
from optc.runtime.manifest import Manifest, checksum_of

Edit = Callable[..., None]
PROMPTS = [[7], [9, 8, 7], [100, 200, 5, 5]]


def tokens(llm: LLM) -> list[list[int]]:
    return [result.token_ids for result in llm.generate(PROMPTS, max_tokens=12, ignore_eos=True)]


def compile_eager(checkpoint: Path, output: Path, **options: Any) -> Path:
    return optc.compile(checkpoint, output, **{"backend": "eager", "block_size": 16, **options})


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def change(folder: Path, **fields: Any) -> None:
    """Overwrite fields of the manifest, right or wrong, under a checksum that is right if the schema is."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text()) | fields
    with contextlib.suppress(ValidationError):
        content["checksum"] = checksum_of(Manifest.model_validate(content))
    path.write_text(json.dumps(content))
