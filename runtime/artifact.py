"""Reading an artifact: everything is checked before anything of it is used, and before anything native is loaded."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import safetensors
import torch
from pydantic import ValidationError
from torch import Tensor, fx

from ..errors import ArtifactError
from .cache import cache_folder
from .manifest import SCHEMA_VERSION, Manifest, checksum_of
from .program import decode_program, find_op

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Artifact:
    """An opened artifact whose files were checked against its manifest."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        return self.path / name

    def program(self, file: str) -> dict[str, Any]:
        """A portable program, as JSON."""
        try:
            content: dict[str, Any] = json.loads(self.file(file).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{self.file(file)}: not a program: {error}") from error
        return content

    def load_program(
        self, file: str, constants: dict[str, Tensor], device: torch.device
    ) -> tuple[fx.GraphModule, list[str]]:
        """A portable program as a callable graph, and the names of its inputs; see `decode_program`."""
        try:
            return decode_program(self.program(file), constants, device)
        except ArtifactError as error:
            found = str(error).removeprefix(f"{self.file(file)}: ")
            raise ArtifactError(f"{self.file(file)}: {found}") from error

    def constants(self) -> dict[str, Tensor]:
        """Every constant by name, memory-mapped: nothing is read until it is used.

        Raises:
            ArtifactError: a tensor is missing, or has another shape or dtype than the manifest says.
        """
        found: dict[str, Tensor] = {}
        by_file: dict[str, list[str]] = {}
        for name, record in self.manifest.constants.items():
            by_file.setdefault(record.file, []).append(name)
        for file, names in by_file.items():
            try:
                with safetensors.safe_open(self.file(file), "pt", device="cpu") as opened:
                    found |= {name: opened.get_tensor(name) for name in names}
            except Exception as error:
                raise ArtifactError(f"{self.file(file)}: {error}; the artifact is damaged, compile it again") from error
        for name, record in self.manifest.constants.items():
            tensor = found[name]
            dtype = str(tensor.dtype).removeprefix("torch.")
            if (dtype, tuple(tensor.shape)) != (record.dtype, record.shape):
                raise ArtifactError(
                    f"{self.file(record.file)}: {name} is {dtype}{list(tensor.shape)}, the manifest says {record.dtype}{list(record.shape)}"
                )
        return found


def open_artifact(
    path: Path | str, *, verify: bool = False, on_hash: Callable[[str], None] = lambda file: None
) -> Artifact:
    """Open the artifact in the folder `path`.

    The sizes of all files are checked always. Their digests are checked the first time an artifact is opened on this
    machine, whenever a file changed since, and always with `verify`.

    Args:
        path: folder that `optc compile` wrote.
        verify: hash every file even if nothing seems to have changed.
        on_hash: called with the name of each file before it is hashed.

    Raises:
        ArtifactError: not an artifact, of another schema version, incomplete, damaged, pointing outside its folder, or
            needing ops that this runtime lacks.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    for name in (*manifest.files, *_named_files(manifest)):
        _check_inside(folder, name)
    _check_listed(folder, manifest)
    _check_sizes(folder, manifest)
    stamp = _stamp(folder, manifest)
    if verify or not stamp.exists():
        _check_digests(folder, manifest, on_hash)
        with contextlib.suppress(OSError):  # a read-only home only costs the next start its time
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.touch()
    for op in manifest.required_ops:
        try:
            find_op(op)
        except ArtifactError as error:
            raise ArtifactError(f"{folder}: {error}") from error
    return Artifact(folder, manifest)


def read_manifest(folder: Path) -> Manifest:
    """The manifest alone, checked against the schema and its own checksum and against nothing else.

    Raises:
        ArtifactError: there is none, it is not JSON, of another schema version, or damaged.
    """
    path = folder / MANIFEST
    if not folder.exists():
        raise ArtifactError(f"{folder}: no such artifact")
    if not path.is_file():
        raise ArtifactError(f"{folder}: holds no {MANIFEST}; expected a folder that `optc compile` wrote")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ArtifactError(f"{path}: not readable as JSON: {error}") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        way_out = "update optc" if isinstance(version, int) and version > SCHEMA_VERSION else "compile the model again"
        raise ArtifactError(f"{path}: schema version {version!r}; this runtime reads {SCHEMA_VERSION}: {way_out}")
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ArtifactError(
            f"{path}: {where}: {first['msg']}; the manifest is damaged, compile the model again"
        ) from error
    if (found := checksum_of(manifest)) != manifest.checksum:
        raise ArtifactError(
            f"{path}: content has the checksum {found[:16]}, the file says {manifest.checksum[:16]!r}; the manifest is "
            "damaged, copy the artifact again or compile the model again"
        )
    return manifest


def _named_files(manifest: Manifest) -> list[str]:
    names = [manifest.step.file, manifest.score.file, *(record.file for record in manifest.constants.values())]
    names += [name for native in manifest.native for name in (native.step, native.kernels) if name is not None]
    if manifest.tokenizer:
        names += [manifest.tokenizer.tokenizer]
        names += [] if manifest.tokenizer.chat_template is None else [manifest.tokenizer.chat_template]
    return names


def _check_inside(folder: Path, name: str) -> None:
    path = PurePosixPath(name)
    plain = str(path) == name and name != "." and not path.is_absolute() and ".." not in path.parts and "\0" not in name
    if not plain or not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(
            f"{folder / MANIFEST}: names the file {name!r}, which lies outside the artifact; do not trust it"
        )


def _check_listed(folder: Path, manifest: Manifest) -> None:
    for name in _named_files(manifest):
        if name not in manifest.files:
            raise ArtifactError(
                f"{folder / MANIFEST}: uses the file {name!r} without listing it; the manifest is damaged"
            )


def _check_sizes(folder: Path, manifest: Manifest) -> None:
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{path}: missing; the artifact is incomplete, copy or compile it again")
        if (size := path.stat().st_size) != record.size:
            raise ArtifactError(f"{path}: {size} bytes, the manifest says {record.size}; the artifact is damaged")


def _check_digests(folder: Path, manifest: Manifest, on_hash: Callable[[str], None]) -> None:
    for name, record in manifest.files.items():
        on_hash(name)
        if file_sha256(folder / name) != record.sha256:
            raise ArtifactError(
                f"{folder / name}: content does not match its sha256 in the manifest; the artifact is damaged"
            )


def file_sha256(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _stamp(folder: Path, manifest: Manifest) -> Path:
    """A file whose presence says that these very files were hashed on this machine."""
    digest = hashlib.sha256(str(folder.resolve()).encode())
    digest.update((folder / MANIFEST).read_bytes())
    for name in manifest.files:
        status = (folder / name).stat()
        digest.update(f"{name} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}\n".encode())
    return cache_folder() / "verified" / digest.hexdigest()
