"""Writing an artifact: into a temporary folder beside the target, synced, then renamed. Either all of it exists or nothing."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
from torch import Tensor

from ..errors import ArtifactError, UsageError
from ..runtime.artifact import MANIFEST, file_sha256
from ..runtime.manifest import ConstantRecord, FileRecord, Layout, Manifest, PanelsRecord, RowsRecord

SHARD_BYTES = 5 * 10**9
CHECKPOINT_FOLDER = "checkpoint"
_ALL_PLAIN: Mapping[str, Layout] = {}
_NOT_MERGED: Mapping[str, tuple[RowsRecord, ...]] = {}
_NOT_PACKED: Mapping[str, PanelsRecord] = {}


@contextmanager
def writing(output: Path, *, force: bool) -> Iterator[Path]:
    """A temporary folder that becomes `output` when the block ends well, and vanishes when it does not.

    Raises:
        UsageError: `output` exists and `force` is off, or is something that must not be replaced.
        ArtifactError: the disk is full or the folder cannot be written.
    """
    check_output(output, force=force)
    temporary = output.parent / f".{output.name}.{secrets.token_hex(4)}.tmp"
    lock = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(output)
        temporary.mkdir()
        lock = _lock(temporary)
        yield temporary
        _sync(temporary)
        check_output(output, force=force)
        _replace(temporary, output)
    except OSError as error:
        what = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise ArtifactError(f"{output}: cannot write the artifact: {what}; nothing was left behind") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def check_output(output: Path, *, force: bool) -> None:
    """Refuse an output path before any work starts. An artifact that a killed --force had moved away comes back first.

    Raises:
        UsageError: it exists and `force` is off, or is no artifact (which `force` does not replace).
    """
    _put_back(output)
    if not output.exists():
        return
    if not force:
        raise UsageError(f"{output} exists; choose another -o, or replace it with --force")
    if not output.is_dir() or (any(output.iterdir()) and not (output / MANIFEST).is_file()):
        raise UsageError(f"{output} exists and is not an artifact; --force replaces artifacts only")


def _left(output: Path, suffix: str) -> list[Path]:
    """The folders `.NAME.*SUFFIX` that compiles to `output` left or still use."""
    return list(output.parent.glob(f".{glob.escape(output.name)}.*{suffix}"))


def _put_back(output: Path) -> None:
    """Rename the old artifact back that a compile moved away before it was killed; the newest, if there are several."""
    if output.exists():
        return
    with contextlib.suppress(OSError):  # what cannot be put back stays where it is, and is not deleted either
        for old in sorted(_left(output, ".old"), key=lambda path: path.stat().st_ctime_ns, reverse=True):
            lock = _lock(old)
            if lock is not None:
                old.rename(output)
                os.close(lock)
                return


def _remove_abandoned(output: Path) -> None:
    """Remove what compiles that were killed left; one that runs holds a lock on its folder and is left alone.

    An old artifact goes only if a whole one stands in its place.
    """
    replaced = _left(output, ".old") if (output / MANIFEST).is_file() else []
    for folder in [*_left(output, ".tmp"), *replaced]:
        lock = _lock(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """A lock on `folder` that ends with this process, or when the descriptor is closed; None if another holds it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(temporary: Path, output: Path) -> None:
    """Rename `temporary` to `output`. Until it stands there, the old artifact is kept as `.old`; see `_put_back`."""
    old = temporary.with_suffix(".old")
    lock = _lock(output) if output.exists() else None  # goes along, so that no other compile puts `old` back meanwhile
    try:
        if output.exists():
            output.rename(old)
        try:
            temporary.rename(output)
        except OSError:
            with contextlib.suppress(OSError):
                old.rename(output)
            raise
        with contextlib.suppress(OSError):  # the artifact stands; some file systems cannot sync folders
            _sync_one(output.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if lock is not None:
            os.close(lock)


def write_weights(
    folder: Path,
    weights: dict[str, Tensor],
    sources: dict[str, str],
    layouts: Mapping[str, Layout] = _ALL_PLAIN,
    merged: Mapping[str, tuple[RowsRecord, ...]] = _NOT_MERGED,
    panels: Mapping[str, PanelsRecord] = _NOT_PACKED,
) -> dict[str, ConstantRecord]:
    """Write the weights as safetensors, in shards of at most 5 GB, in their order; equal weights give equal bytes.

    `sources` and the rest are those of `passes.graph.Program`: a weight that is not in them is the checkpoint's, as is.
    """
    records: dict[str, ConstantRecord] = {}
    for file, shard in _shards(weights, "weights").items():
        _save(shard, folder / file)
        for name, weight in shard.items():
            dtype = str(weight.dtype).removeprefix("torch.")
            records[name] = ConstantRecord(
                file=file,
                dtype=dtype,
                shape=tuple(weight.shape),
                source=sources.get(name, name),
                layout=layouts.get(name, "plain"),
                merged=merged.get(name, ()),
                panels=panels.get(name),
            )
    return records


def write_checkpoint(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Write the weights as a checkpoint has them: model.safetensors, or shards and their index."""
    shards = _shards(weights, "model")
    for file, shard in shards.items():
        _save(shard, folder / file, {"format": "pt"})
    if len(shards) > 1:
        size = sum(weight.numel() * weight.element_size() for weight in weights.values())
        places = {name: file for file, shard in shards.items() for name in shard}
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _shards(weights: Mapping[str, Tensor], stem: str) -> dict[str, dict[str, Tensor]]:
    """The weights in files of at most 5 GB, by the files' names."""
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, weight in weights.items():
        size = weight.numel() * weight.element_size()
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = _apart(weight.detach().contiguous(), shards[-1])
        filled += size
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _apart(weight: Tensor, others: dict[str, Tensor]) -> Tensor:
    """`weight`, or a copy if it shares memory with one of `others`, which safetensors refuses to write."""

    def ends(tensor: Tensor) -> tuple[int, int]:
        return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()

    start, end = ends(weight)
    shared = any(begin < end and start < stop for begin, stop in map(ends, others.values()))
    return weight.clone() if shared else weight


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    try:
        safetensors.torch.save_file(tensors, path, metadata)
        path.chmod(0o644)
    except safetensors.SafetensorError as error:
        full = "No space left" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error


def file_records(folder: Path, known: dict[str, FileRecord] | None = None) -> dict[str, FileRecord]:
    """Size and digest of every file in `folder`, by its path inside; those in `known` are not hashed again."""
    records = dict(known or {})
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST):
        name = path.relative_to(folder).as_posix()
        if name not in records:
            records[name] = FileRecord(size=path.stat().st_size, sha256=file_sha256(path))
    return records


def write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")
