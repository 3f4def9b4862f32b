"""Calibration data: files of text or conversations, as token sequences drawn from them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor

from ..errors import RequestError, UsageError
from ..passes.quantize.calibrate import Calibration
from ..passes.quantize.recipe import Recipe
from ..runtime.tokenizer import render_chat
from .checkpoint import Checkpoint, TokenizerData
from .evaluate import read_text, special_prefix

SUFFIXES = (".txt", ".jsonl", ".parquet")
_KEYS = 'text (a string) or messages (a list of {"role": ..., "content": ...})'
_PIECE = 2**20  # characters: longer texts are tokenized in pieces
_SHINGLE = 32
_MEASURED = 32  # sequences that a budget is measured on, if their logits find room


@dataclass(frozen=True)
class _Document:
    """One text or conversation, and where it stands, for error messages."""

    where: str
    content: str | list[dict[str, Any]]


def prepare_calibration(
    recipe: Recipe,
    checkpoint: Checkpoint | None,
    given: Path | None,
    *,
    num_samples: int = 128,
    sequence_length: int = 512,
    seed: int = 0,
) -> tuple[Recipe, Calibration | None, list[str]]:
    """What a recipe needs to be carried out.

    Args:
        recipe: to carry out.
        checkpoint: with a tokenizer, and perhaps a file calibration.txt, .jsonl or .parquet; none for a module.
        given: file or folder that the user names; without it the checkpoint's own is taken.
        num_samples, sequence_length, seed: how many sequences of how many tokens are drawn, and how.

    Returns:
        The recipe, with rounding to nearest in place of a default that needs data that is not there; the data, if the
        recipe uses any; and notes about the two.

    Raises:
        UsageError: the data cannot be used, or there is none and the recipe asks by name for what needs it.
    """
    if not recipe.uses_calibration:
        unused = f"the calibration data is not used: no codes of {', '.join(recipe.scheme_names())} depend on it here"
        return recipe, None, [unused] if given is not None and recipe.scheme_names() else []
    path = given or (find_calibration(checkpoint.folder) if checkpoint is not None else None)
    tokenizer = checkpoint.tokenizer if checkpoint is not None else None
    if path is not None and tokenizer is not None:
        assert checkpoint is not None
        calibration, notes = load_calibration(
            path,
            tokenizer,
            num_samples=num_samples,
            sequence_length=min(sequence_length, checkpoint.max_model_len),
            seed=seed,
        )
        if sequence_length > checkpoint.max_model_len:
            notes.append(
                f"calibration sequences have {checkpoint.max_model_len} tokens, the most the model takes, not {sequence_length}"
            )
        return recipe, calibration, notes
    what = "a module" if checkpoint is None else "the checkpoint"
    if tokenizer is None and path is not None and given is not None:
        raise UsageError(
            f"{given}: cannot be used for calibration: {what} has no tokenizer; choose --algorithm rtn or hqq"
        )
    lack = "has no tokenizer" if tokenizer is None else f"holds no calibration{{{','.join(SUFFIXES)}}}"
    if (asked := recipe.requires_calibration) is not None:
        way_out = "give --calibration FILE" if tokenizer is not None else "choose a scheme and an algorithm without it"
        raise UsageError(f"{asked} needs calibration data, and {what} {lack}; {way_out}")
    advice = "; --calibration FILE makes them more accurate" if tokenizer is not None else ""
    return recipe.without_calibration(), None, [f"codes are rounded to nearest, not by GPTQ: {what} {lack}{advice}"]


def find_calibration(folder: Path) -> Path | None:
    """The calibration data that lies in a checkpoint, if any does."""
    return next((path for suffix in SUFFIXES if (path := folder / f"calibration{suffix}").is_file()), None)


def load_calibration(
    path: Path, tokenizer: TokenizerData, *, num_samples: int = 128, sequence_length: int = 512, seed: int = 0
) -> tuple[Calibration, list[str]]:
    """Token sequences of the texts and conversations in `path`, and notes about them.

    The documents, separated by the special tokens that the tokenizer puts around a text (EOS if it puts none), are one
    stream. Windows that do not overlap are drawn from it; each starts with what the tokenizer puts before a text.

    Args:
        path: a .txt file (one text), a .jsonl or .parquet file (rows of `text`, or of `messages` for the chat template), or
            a folder of such.
        tokenizer: the model's.
        num_samples: how many sequences; fewer if the data has no more.
        sequence_length: tokens of each.
        seed: of the draw.

    Raises:
        UsageError: names the file and the line that cannot be used, or says how many tokens there are.
    """
    encoder = tokenizers.Tokenizer.from_str(tokenizer.json)
    prefix = special_prefix(encoder)
    stream = _stream(_documents(path), encoder, tokenizer)
    step = sequence_length - len(prefix)
    if step < 1 or len(stream) < step:
        fits = len(stream) + len(prefix)
        way_out = f"or --calibration-length {fits}" if 2 <= fits < sequence_length else "or longer sequences"
        raise UsageError(
            f"{path}: {len(stream)} tokens do not make one sequence of {sequence_length}; give more text, {way_out}"
        )
    windows = stream.unfold(0, step, step)
    drawn = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:num_samples]
    samples = tuple(torch.cat([torch.tensor(prefix, dtype=torch.long), windows[index]]) for index in drawn)
    notes = []
    if len(samples) < num_samples:
        notes.append(
            f"{path.name} gives {len(samples)} calibration sequences of {sequence_length} tokens, not {num_samples}"
        )
    return Calibration(samples, path.name, seed), notes


def measuring_samples(
    checkpoint: Checkpoint | None, given: Path | None, *, num_samples: int, sequence_length: int, seed: int
) -> list[Tensor]:
    """Sequences of the calibration data, each i64[n], to measure an accuracy budget on: none of those that
    `prepare_calibration` draws with the same arguments.

    Raises:
        UsageError: there is no data, or none is left.
    """
    path = given or (find_calibration(checkpoint.folder) if checkpoint is not None else None)
    tokenizer = checkpoint.tokenizer if checkpoint is not None else None
    if path is None or tokenizer is None or checkpoint is None:
        lack = "a tokenizer" if tokenizer is None else "a text: give --calibration FILE"
        raise UsageError(f"an accuracy budget is measured on text, and that needs {lack}")
    found, _ = load_calibration(
        path,
        tokenizer,
        num_samples=num_samples + _MEASURED,
        sequence_length=min(sequence_length, checkpoint.max_model_len),
        seed=seed,
    )
    if len(found.samples) <= num_samples:
        raise UsageError(
            f"{path}: all of its {len(found.samples)} sequences are calibrated on, and an accuracy budget needs others to "
            f"measure on; give more text, or at most --calibration-samples {max(1, len(found.samples) * 7 // 8)}"
        )
    return list(found.samples[num_samples:])


def overlap(calibration: Calibration, evaluation: Sequence[Tensor]) -> float:
    """The share of the runs of 32 tokens in `evaluation` (each i64[n]) that also occur in the calibration data."""
    seen, asked = _shingles(calibration.samples), _shingles(evaluation)
    return torch.isin(asked, seen).float().mean().item() if len(asked) else 0.0


def _shingles(sequences: Sequence[Tensor]) -> Tensor:
    """A hash of every run of tokens: sums of products with fixed odd numbers, modulo 2^64."""
    factors = torch.randint(2**62, (_SHINGLE,), generator=torch.Generator().manual_seed(0)) * 2 + 1
    hashes = [
        sum(sequence[i : len(sequence) - _SHINGLE + 1 + i] * factor for i, factor in enumerate(factors))
        for sequence in sequences
        if len(sequence) >= _SHINGLE
    ]
    return torch.cat(hashes) if hashes else torch.empty(0, dtype=torch.long)


def check_calibration(path: Path) -> list[Path]:
    """The files that a path stands for, sorted.

    Raises:
        UsageError: there is none, or of no kind that can be read.
    """
    kinds = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
        if not found:
            raise UsageError(f"{path}: the folder holds no {kinds} file to calibrate on")
        return found
    if not path.is_file():
        raise UsageError(f"{path}: no such file or folder; expected calibration data in {kinds} files")
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: calibration data in a {path.suffix or 'nameless'} file; expected {kinds}")
    return [path]


def _documents(path: Path) -> Iterator[_Document]:
    for file in check_calibration(path):
        match file.suffix:
            case ".txt":
                yield _Document(str(file), read_text(file))
            case ".jsonl":
                yield from _json_lines(file)
            case ".parquet":
                yield from _parquet(file)


def _json_lines(file: Path) -> Iterator[_Document]:
    # Not splitlines, which also breaks at characters that JSON strings may hold.
    for number, line in enumerate(read_text(file).removeprefix("\ufeff").split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{where}: not JSON: {error}; expected an object with {_KEYS}") from error
        if not isinstance(row, dict):
            raise UsageError(f"{where}: a JSON {type(row).__name__}, expected an object with {_KEYS}")
        yield _document(where, row)


def _parquet(file: Path) -> Iterator[_Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise UsageError(
            f'{file}: reading parquet needs pyarrow: pip install "optc[parquet]"; or give .jsonl or .txt'
        ) from error
    try:
        opened = pyarrow.parquet.ParquetFile(file)
        columns = [name for name in ("text", "messages") if name in opened.schema_arrow.names]
        if not columns:
            found = ", ".join(opened.schema_arrow.names) or "none"
            raise UsageError(f"{file}: has the columns {found}; expected {_KEYS}")
        rows = (row for batch in opened.iter_batches(columns=columns) for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield _document(f"{file} row {number}", {key: value for key, value in row.items() if value is not None})
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{file}: not a readable parquet file: {error}") from error


def _document(where: str, row: dict[str, Any]) -> _Document:
    text, messages = row.get("text"), row.get("messages")
    if isinstance(text, str):
        return _Document(where, text)
    if isinstance(messages, list):
        return _Document(where, messages)
    if (key := next((key for key in ("text", "messages") if key in row), None)) is not None:
        raise UsageError(f"{where}: {key} is a {type(row[key]).__name__}; expected {_KEYS}")
    raise UsageError(f"{where}: has the keys {', '.join(row) or 'none'}; expected {_KEYS}")


def _stream(documents: Iterator[_Document], encoder: tokenizers.Tokenizer, tokenizer: TokenizerData) -> Tensor:
    """All documents as one sequence of tokens i64[n]."""
    prefix = special_prefix(encoder)
    separator = [*_special_suffix(encoder), *prefix]
    if not separator and tokenizer.eos_token is not None:
        found = encoder.token_to_id(tokenizer.eos_token)
        separator = [found] if found is not None else []
    stream: list[Tensor] = []
    while some := list(islice(documents, 64)):
        texts = [_text(document, tokenizer) for document in some]
        pieces = [(index, piece) for index, text in enumerate(texts) for piece in _pieces(text)]
        encodings = encoder.encode_batch_fast([piece for _, piece in pieces], add_special_tokens=False)
        bodies: list[list[int]] = [[] for _ in some]
        for (index, _), encoding in zip(pieces, encodings, strict=True):
            bodies[index] += encoding.ids
        for body in bodies:
            if prefix and tuple(body[: len(prefix)]) == prefix:  # a chat template begins with it
                del body[: len(prefix)]
            if body:
                stream += [torch.tensor(separator if stream else [], dtype=torch.long), torch.tensor(body)]
    return torch.cat(stream) if stream else torch.empty(0, dtype=torch.long)


def _text(document: _Document, tokenizer: TokenizerData) -> str:
    """The text of a document; of a conversation, what the chat template makes of it."""
    text = document.content
    if isinstance(text, list):
        if tokenizer.chat_template is None:
            raise UsageError(f"{document.where}: messages, and the checkpoint has no chat template; give text instead")
        try:
            text = render_chat(
                tokenizer.chat_template,
                text,
                bos_token=tokenizer.bos_token,
                eos_token=tokenizer.eos_token,
                add_generation_prompt=False,
            )
        except RequestError as error:
            raise UsageError(f"{document.where}: {error}") from error
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"{document.where}: a lone surrogate at character {error.start}; expected text") from error
    return text


def _pieces(text: str) -> Iterator[str]:
    """A text, cut behind a line about every million characters."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + _PIECE) + 1 or len(text)
        yield text[start:end]
        start = end


def _special_suffix(encoder: tokenizers.Tokenizer) -> list[int]:
    """The token ids that the tokenizer puts behind a text, such as EOS."""
    bare, whole = (encoder.encode("a", add_special_tokens=special).ids for special in (False, True))
    return whole[len(special_prefix(encoder)) + len(bare) :]
