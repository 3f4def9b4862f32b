"""`optc eval`: how well an artifact predicts a text, and how far it is from the checkpoint it was made of.

The protocol (docs/evaluation.md): the text is tokenized without special tokens and cut into non-overlapping windows. Each
window starts with what the tokenizer puts before a text, such as BOS, which is not predicted; every other token is, the
last, shorter window's too. The artifact runs its own step program; a checkpoint runs in float32 by transformers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from torch import Tensor

from ..errors import UsageError
from ..runtime.artifact import MANIFEST, Artifact, open_artifact
from ..runtime.manifest import AccuracyRecord
from ..runtime.scorer import Scorer
from .accuracy import Logits, measure

DEFAULT_WINDOW = 1024


@dataclass(frozen=True)
class Windows:
    """A text as token sequences to predict.

    Attributes:
        tokens: i64[n] each, n at most `length`.
        length: tokens of a whole window.
        prefix: the token ids that every window starts with.
        text: what was cut.
        source: what it is called.
    """

    tokens: tuple[Tensor, ...]
    length: int
    prefix: tuple[int, ...]
    text: str
    source: str

    @property
    def skip(self) -> int:
        """How many tokens of each window are not predicted."""
        return max(1, len(self.prefix))

    def sha256(self) -> str:
        """Over the token ids."""
        return hashlib.sha256(torch.cat(self.tokens).numpy().tobytes()).hexdigest()


def evaluate(
    artifact: str | Path,
    text: str | Path,
    *,
    against: str | Path | None = None,
    window: int | None = None,
    max_windows: int | None = None,
    native: bool = True,
    on_fraction: Callable[[float], None] = lambda fraction: None,
) -> AccuracyRecord:
    """Measure an artifact on a text.

    Args:
        artifact: the folder.
        text: file of UTF-8 text.
        against: what to compare it with: a checkpoint (folder or hub id), run in float32, or another artifact.
        window: tokens of a window; the context length by default, at most 1024.
        max_windows: take only the first so many windows.
        native: use native code; off, only data is loaded.
        on_fraction: called with the fraction that is done.

    Raises:
        UsageError: the text cannot be read or is shorter than a window, or the reference has another vocabulary.
        ArtifactError, CheckpointError, UnsupportedModelError: a model cannot be loaded.
        ExecutionError: a model gave logits that are not finite.
    """
    content = read_text(Path(text))
    opened = open_artifact(artifact)
    windows = artifact_windows(opened, content, Path(text).name, window=window, max_windows=max_windows)
    reference = load_reference(against, opened, windows, native=native) if against is not None else None
    return evaluate_windows(
        opened,
        windows,
        reference,
        against=None if against is None else str(against),
        native=native,
        on_fraction=on_fraction,
    )


def evaluate_windows(
    artifact: Artifact,
    windows: Windows,
    reference: Logits | None,
    *,
    against: str | None,
    native: bool = True,
    on_fraction: Callable[[float], None] = lambda fraction: None,
) -> AccuracyRecord:
    """Measure an opened artifact; `against` is what the record calls the reference."""
    scorer = Scorer(artifact, native=native, max_length=windows.length)
    figures = measure(scorer, windows.tokens, reference, skip=windows.skip, on_fraction=on_fraction)
    return AccuracyRecord(
        text=windows.source,
        text_sha256=windows.sha256(),
        window=windows.length,
        prefix=windows.prefix,
        reference=against,
        native=scorer.executor.is_native,
        figures=figures,
    )


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        UsageError: there is none, it is empty, or it is not text.
    """
    if not path.is_file():
        raise UsageError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; expected a file of UTF-8 text")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte {error.start} is {content[error.start]:#x}"
        raise UsageError(f"{path}: not UTF-8 text: {found}; expected a file of plain text") from error
    if "\0" in text:
        raise UsageError(f"{path}: not text: character {text.index(chr(0))} is NUL; expected a file of plain text")
    if not text.strip():
        raise UsageError(f"{path}: empty; expected a file of text")
    return text


def artifact_windows(
    artifact: Artifact, text: str, source: str, *, window: int | None = None, max_windows: int | None = None
) -> Windows:
    """The windows of a text by the artifact's tokenizer and context length; see `make_windows`."""
    record = artifact.manifest.tokenizer
    if record is None:
        raise UsageError(f"{artifact.path}: has no tokenizer, so it cannot be evaluated on a text")
    tokenizer = tokenizers.Tokenizer.from_file(str(artifact.file(record.tokenizer)))
    limit = artifact.manifest.model.max_model_len
    return make_windows(tokenizer, text, source, limit=limit, window=window, max_windows=max_windows)


def make_windows(
    tokenizer: tokenizers.Tokenizer,
    text: str,
    source: str,
    *,
    limit: int,
    window: int | None = None,
    max_windows: int | None = None,
) -> Windows:
    """Cut a text into windows.

    Args:
        tokenizer: the model's.
        text: what to cut.
        source: what to call it.
        limit: the context length.
        window: tokens of a window; `limit` by default, at most 1024.
        max_windows: take only the first so many.

    Raises:
        UsageError: the window does not fit the model, or the text does not fill one.
    """
    prefix = special_prefix(tokenizer)
    length = min(limit, DEFAULT_WINDOW) if window is None else window
    least = max(1, len(prefix)) + 1
    if not least <= length <= limit:
        raise UsageError(f"a window of {length} tokens: expected {least} to {limit}, the context length")
    if max_windows is not None and max_windows < 1:
        raise UsageError(f"max_windows {max_windows}: expected at least 1")
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    stride = length - len(prefix)
    if len(ids) < stride:
        raise UsageError(
            f"{source}: {len(ids)} tokens do not fill one window of {length}; give more text or a smaller window"
        )
    cut = [torch.tensor([*prefix, *ids[start : start + stride]]) for start in range(0, len(ids), stride)]
    cut = [tokens for tokens in cut if len(tokens) >= least][:max_windows]
    return Windows(tuple(cut), length, prefix, text, source)


def special_prefix(tokenizer: tokenizers.Tokenizer) -> tuple[int, ...]:
    """The token ids that the tokenizer puts before a text, such as BOS."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return tuple(whole[:start])


def load_reference(
    against: str | Path, artifact: Artifact, windows: Windows, *, adapter: Path | None = None, native: bool = True
) -> Logits:
    """What to compare an artifact with: another artifact, or a checkpoint in float32.

    Raises:
        UsageError: it has another vocabulary, or too few positions for the windows.
        ArtifactError, CheckpointError, UnsupportedModelError: it cannot be loaded.
    """
    if (Path(against) / MANIFEST).is_file():
        other = open_artifact(against)
        record, limits = other.manifest.tokenizer, other.manifest.model
        tokenizer = tokenizers.Tokenizer.from_file(str(other.file(record.tokenizer))) if record else None
        _check_reference(str(against), artifact, tokenizer, windows, limits.vocab_size, limits.max_model_len)
        return Scorer(other, native=native, max_length=windows.length)
    from .checkpoint import load_checkpoint

    checkpoint = load_checkpoint(str(against), dtype="float32", adapter=adapter)
    data, model = checkpoint.tokenizer, checkpoint.model
    tokenizer = tokenizers.Tokenizer.from_str(data.json) if data else None
    _check_reference(str(against), artifact, tokenizer, windows, checkpoint.config.vocab_size, checkpoint.max_model_len)

    @torch.inference_mode()
    def logits(token_ids: Tensor) -> Tensor:
        found: Tensor = model(input_ids=token_ids[None], use_cache=False).logits[0]
        return found.float()

    return logits


def _check_reference(
    name: str,
    artifact: Artifact,
    tokenizer: tokenizers.Tokenizer | None,
    windows: Windows,
    vocab_size: int,
    max_model_len: int,
) -> None:
    """Refuse a reference that gives logits over other tokens. One without a tokenizer is held to the size alone."""
    manifest = artifact.manifest
    if vocab_size != manifest.model.vocab_size:
        raise UsageError(
            f"{name}: a vocabulary of {vocab_size} tokens, {artifact.path} has {manifest.model.vocab_size}; compare it with "
            "the checkpoint it was made of"
        )
    assert manifest.tokenizer is not None
    if tokenizer is not None:
        own = tokenizers.Tokenizer.from_file(str(artifact.file(manifest.tokenizer.tokenizer)))
        same = own.get_vocab() == tokenizer.get_vocab() and special_prefix(tokenizer) == windows.prefix
        if not same or own.encode(windows.text).ids != tokenizer.encode(windows.text).ids:
            raise UsageError(
                f"{name}: its tokenizer is another than that of {artifact.path}; compare it with the checkpoint it was made of"
            )
    if windows.length > max_model_len:
        raise UsageError(
            f"{name}: takes {max_model_len} tokens, fewer than a window of {windows.length}; choose a smaller one"
        )
