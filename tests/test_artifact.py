"""Artifacts are checked before use: damaged files, wrong manifests, wrong content; digests once."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch

from optc.errors import ArtifactError
from optc.runtime import LLM
from optc.runtime.artifact import open_artifact, read_manifest

from .artifact_cases import Edit, change, files_of

# ------------------------------------------------------------------------------------------------- damaged files

NATIVE_FILES = [
    "checkpoint/config.json",
    "checkpoint/generation_config.json",
    "checkpoint/tokenizer_config.json",
    "code/native/kernels.so",
    "code/native/step.pt2",
    "program/score.json",
    "program/step.json",
    "tokenizer/chat_template.jinja",
    "tokenizer/tokenizer.json",
    "weights.safetensors",
]


def test_the_list_of_files_is_whole(native_artifact: Path) -> None:
    assert set(NATIVE_FILES) == set(files_of(native_artifact)) - {"manifest.json", "report.html"}
    assert set(read_manifest(native_artifact).files) == set(files_of(native_artifact)) - {"manifest.json"}


@pytest.mark.parametrize("name", [*NATIVE_FILES, "report.html"])
@pytest.mark.parametrize("at", [0, 0.5, 1])
def test_a_flipped_bit(name: str, at: float, editable_native: Path) -> None:
    path = editable_native / name
    content = bytearray(path.read_bytes())
    content[min(int(len(content) * at), len(content) - 1)] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{name}.*sha256.*damaged"):
        open_artifact(editable_native)


def test_a_flipped_bit_of_the_manifest(editable: Path) -> None:
    """Anywhere: in a brace, a name, a digit or a space. Only a change that leaves every value as it was is none."""
    path = editable / "manifest.json"
    good = path.read_bytes()
    for at in {0, len(good) - 1, *range(0, len(good), 23)}:
        bad = bytearray(good)
        bad[at] ^= 1
        path.write_bytes(bad)
        try:
            open_artifact(editable)
        except ArtifactError as error:
            assert "manifest.json" in str(error)
        else:
            assert json.loads(bad) == json.loads(good), at


def test_a_changed_manifest(editable: Path) -> None:
    path = editable / "manifest.json"
    good = json.loads(path.read_text())
    path.write_text(json.dumps(good | {"eos_token_ids": [7]}))
    with pytest.raises(ArtifactError, match=rf"manifest\.json: .*{good['checksum'][:16]}.*damaged, copy the artifact"):
        read_manifest(editable)
    path.write_text(json.dumps(good, indent=4, sort_keys=True))
    assert read_manifest(editable).checksum == good["checksum"]


@pytest.mark.parametrize("name", NATIVE_FILES)
def test_missing_and_truncated_files(name: str, editable_native: Path) -> None:
    path = editable_native / name
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(ArtifactError, match=rf"{name}: {size - 1} bytes, the manifest says {size}"):
        open_artifact(editable_native)
    path.unlink()
    with pytest.raises(ArtifactError, match=rf"{name}: missing.*copy or compile it again"):
        open_artifact(editable_native)
    path.mkdir()
    with pytest.raises(ArtifactError, match=rf"{name}: missing"):
        open_artifact(editable_native)


def test_what_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such artifact"):
        LLM(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match=r"holds no manifest\.json"):
        LLM(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match=r"holds no manifest\.json"):
        LLM(tmp_path / "file")


# ------------------------------------------------------------------------------------------------- the manifest


@pytest.mark.parametrize(
    ("version", "way_out"),
    [
        (4, "update optc"),
        (999, "update optc"),
        (1, "compile the model again"),
        (-1, "compile"),
        (2, "compile the model again"),
        ("3", "compile"),
        (None, "compile"),
    ],
)
def test_schema_versions(version: object, way_out: str, editable: Path) -> None:
    change(editable, schema_version=version)
    with pytest.raises(
        ArtifactError, match=rf"manifest\.json: schema version {version!r}; this runtime reads 3: {way_out}"
    ):
        open_artifact(editable)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", "\ufeff{}", '"x"', "[" * 100_000, "{}"], ids=lambda t: t[:5] or "empty"
)
def test_manifests_that_are_none(text: str, editable: Path) -> None:
    (editable / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        open_artifact(editable)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\x80\x04}"])
def test_manifests_that_are_no_text(content: bytes, editable: Path) -> None:
    (editable / "manifest.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"manifest\.json: not readable as JSON"):
        open_artifact(editable)


def test_fields_of_the_manifest(editable: Path) -> None:
    path = editable / "manifest.json"
    good = json.loads(path.read_text())
    for name in good:
        path.write_text(json.dumps({key: value for key, value in good.items() if key != name}))
        with pytest.raises(ArtifactError, match=rf"manifest\.json: .*{name}.*compile|schema version"):
            open_artifact(editable)
        for wrong in (None, 3.5, "x", [[]], {"x": {}}):
            if wrong == good[name]:
                continue
            path.write_text(json.dumps(good | {name: wrong}))
            try:
                read_manifest(editable)
            except ArtifactError as error:
                assert name in str(error) or "schema version" in str(error) or "the checksum" in str(error)
            else:
                pytest.fail(f"{name}: {wrong!r} was read")
    path.write_text(json.dumps(good | {"surprise": 1}))
    with pytest.raises(ArtifactError, match="surprise"):
        open_artifact(editable)


@pytest.mark.parametrize(
    "name",
    ["/etc/hostname", "../outside.json", "program/../../outside.json", "program/../program/step.json", "a\0b", "", "."],
)
@pytest.mark.parametrize("where", ["files", "step", "constants", "tokenizer"])
def test_paths_that_leave_the_folder(name: str, where: str, editable: Path) -> None:
    (editable.parent / "outside.json").write_text("{}")
    content = json.loads((editable / "manifest.json").read_text())
    if where == "files":
        content["files"][name] = {"size": 0, "sha256": ""}
    elif where == "step":
        content["step"]["file"] = name
    elif where == "constants":
        next(iter(content["constants"].values()))["file"] = name
    else:
        content["tokenizer"]["tokenizer"] = name
    change(editable, **content)
    with pytest.raises(ArtifactError, match=r"manifest\.json: names the file.*lies outside the artifact"):
        open_artifact(editable)


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "program"])
def test_links_that_leave_the_folder(name: str, editable: Path) -> None:
    outside = editable.parent / "outside"
    (editable / name).rename(outside)
    (editable / name).symlink_to(outside)
    with pytest.raises(ArtifactError, match="lies outside the artifact"):
        open_artifact(editable)


def test_a_linked_artifact_is_fine(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(artifact)
    assert open_artifact(tmp_path / "link").manifest == open_artifact(artifact).manifest


def test_files_that_are_used_but_not_listed(editable: Path) -> None:
    for name in ("program/step.json", "program/score.json", "tokenizer/tokenizer.json", "weights.safetensors"):
        content = json.loads((editable / "manifest.json").read_text())["files"]
        del content[name]
        shutil.copy(editable / "manifest.json", editable.parent / "kept.json")
        change(editable, files=content)
        with pytest.raises(ArtifactError, match=rf"manifest\.json: uses the file '{name}' without listing it"):
            open_artifact(editable)
        shutil.copy(editable.parent / "kept.json", editable / "manifest.json")


@pytest.mark.parametrize("op", ["optc.no_such_op.default", "aten.from_file.default", "aten.add_.Tensor", "os.system"])
def test_unknown_required_ops(op: str, editable: Path) -> None:
    change(editable, required_ops=[op])
    with pytest.raises(ArtifactError, match=rf"copy\.optc.*{op}"):
        open_artifact(editable)


# ----------------------------------------------------------------------- content that is wrong behind right digests


@pytest.mark.parametrize(
    "op", ["os.system", "aten.from_file.default", "aten.save.default", "aten.mul_.Tensor", "optc.no.default"]
)
def test_programs_outside_the_vocabulary(op: str, editable: Path, edit_manifest: Edit) -> None:
    path = editable / "program/step.json"
    program = json.loads(path.read_text())
    program["nodes"].append([op, ["x"], {}])
    path.write_text(json.dumps(program))
    edit_manifest(editable)
    with pytest.raises(ArtifactError, match=op):
        LLM(editable)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[" * 100_000, "[]", '{"version": 1}', '{"version": 9}', "\xff"],
    ids=lambda c: c[:8] or "empty",
)
def test_programs_that_are_none(content: str, editable: Path, edit_manifest: Edit) -> None:
    (editable / "program/step.json").write_text(content, encoding="latin-1")
    edit_manifest(editable)
    with pytest.raises(ArtifactError, match=r"step\.json"):
        LLM(editable)


def test_a_program_with_other_inputs(editable: Path, edit_manifest: Edit) -> None:
    def swap(content: dict[str, Any]) -> None:
        inputs = content["step"]["inputs"]
        inputs[0], inputs[1] = inputs[1], inputs[0]

    edit_manifest(editable, swap)
    with pytest.raises(ArtifactError, match=r"the step program takes .* the manifest says"):
        LLM(editable)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"\xff" * 8 + b"{}"])
def test_weights_that_are_none(content: bytes, editable: Path, edit_manifest: Edit) -> None:
    (editable / "weights.safetensors").write_bytes(content)
    edit_manifest(editable)
    with pytest.raises(ArtifactError, match=r"weights\.safetensors.*compile it again"):
        LLM(editable)


@pytest.mark.parametrize(
    ("field", "value"),
    [("shape", [64, 321]), ("shape", []), ("dtype", "bfloat16"), ("file", "tokenizer/tokenizer.json")],
)
def test_constants_that_are_not_as_the_manifest_says(
    field: str, value: object, editable: Path, edit_manifest: Edit
) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["constants"]["lm_head.weight"][field] = value

    edit_manifest(editable, edit)
    with pytest.raises(
        ArtifactError, match=r"lm_head\.weight is float32\[320, 64\], the manifest says|tokenizer\.json"
    ):
        LLM(editable)


def test_a_constant_that_is_not_there(editable: Path, edit_manifest: Edit) -> None:
    path = editable / "weights.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["other"] = weights.pop("lm_head.weight").clone()
    safetensors.torch.save_file(weights, path)
    edit_manifest(editable)
    with pytest.raises(ArtifactError, match=r"weights\.safetensors.*lm_head\.weight"):
        LLM(editable)
    edit_manifest(editable, lambda content: content["constants"].pop("lm_head.weight"))
    with pytest.raises(ArtifactError, match=r"needs the constant 'lm_head\.weight'"):
        LLM(editable)


@pytest.mark.parametrize("dtype", ["nonsense", "load", "__class__"])
def test_a_cache_of_no_dtype(dtype: str, editable: Path, edit_manifest: Edit) -> None:
    edit_manifest(editable, lambda content: content["kv_cache"][0].update(dtype=dtype))
    with pytest.raises(ArtifactError, match=dtype):
        LLM(editable)


def test_an_unreadable_tokenizer(editable: Path, edit_manifest: Edit) -> None:
    (editable / "tokenizer/tokenizer.json").write_text("{}")
    edit_manifest(editable)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: not a readable tokenizer"):
        LLM(editable)


# ------------------------------------------------------------------------------------------------- digests, once


def hashed(folder: Path, **options: Any) -> list[str]:
    seen: list[str] = []
    open_artifact(folder, on_hash=seen.append, **options)
    return seen


def test_digests_are_checked_once(editable: Path, edit_manifest: Edit) -> None:
    everything = sorted(set(files_of(editable)) - {"manifest.json"})
    assert sorted(hashed(editable)) == everything
    assert hashed(editable) == []
    assert sorted(hashed(editable, verify=True)) == everything
    assert hashed(editable) == []
    (editable / "program/step.json").touch()
    assert sorted(hashed(editable)) == everything
    assert hashed(editable) == []
    edit_manifest(editable)
    assert sorted(hashed(editable)) == everything
    moved = editable.rename(editable.parent / "moved.optc")
    assert sorted(hashed(moved)) == everything


def test_a_change_that_keeps_size_and_time_is_found(editable: Path) -> None:
    hashed(editable)
    path = editable / "program/step.json"
    status = path.stat()
    path.write_bytes(path.read_bytes().replace(b"aten", b"aton"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ArtifactError, match="sha256"):
        open_artifact(editable)


def test_a_damaged_artifact_is_not_noted_as_good(editable: Path) -> None:
    with (editable / "weights.safetensors").open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"\x7f")
    for _ in range(2):
        with pytest.raises(ArtifactError, match="sha256"):
            open_artifact(editable)


def test_a_cache_folder_that_cannot_be_written(editable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTC_CACHE", "/proc/nothing")
    assert hashed(editable)
    assert hashed(editable)
