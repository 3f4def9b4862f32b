"""Artifacts: complete or absent, checked before use, without pickles, and nothing native unless asked for."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import pickletools
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from pydantic import ValidationError

import optc
from optc.errors import ArtifactError, OptcError, UsageError
from optc.optimizer import package
from optc.optimizer.package import writing
from optc.runtime import LLM
from optc.runtime.artifact import open_artifact, read_manifest
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


# ------------------------------------------------------------------------------------------------- native code


def edit_code(folder: Path, edit_manifest: Edit, **fields: Any) -> None:
    edit_manifest(folder, lambda content: content["native"][0].update(fields))


def test_code_for_another_processor(
    editable_native: Path, edit_manifest: Edit, caplog: pytest.LogCaptureFixture
) -> None:
    """Never an illegal instruction: the reason, and the portable program."""
    edit_code(editable_native, edit_manifest, cpu_features=["avx", "avx8192", "mmx"])
    llm = LLM(editable_native)
    assert not llm.engine.executor.is_native and len(tokens(llm)) == len(PROMPTS)
    assert "needs avx8192, which this processor lacks; running the portable program" in caplog.text


def test_code_for_another_torch(editable_native: Path, edit_manifest: Edit) -> None:
    edit_code(editable_native, edit_manifest, torch_version="1.0")
    with pytest.raises(ArtifactError, match=r"made for torch 1\.0, this is torch .*; compile .*--no-native"):
        LLM(editable_native)


def test_constants_of_the_code(editable_native: Path, edit_manifest: Edit) -> None:
    """Running code with an unbound constant is a segmentation fault, so it must be refused."""
    names = read_manifest(editable_native).native[0].constants
    edit_code(editable_native, edit_manifest, constants=dict(list(names.items())[1:]))
    with pytest.raises(ArtifactError, match=r"step\.pt2: wants the constant .*, which the manifest does not map"):
        LLM(editable_native)
    edit_code(editable_native, edit_manifest, constants=dict.fromkeys(names, "no.such.weight"))
    with pytest.raises(ArtifactError, match=r"no\.such\.weight"):
        LLM(editable_native)


@pytest.mark.parametrize("name", ["step", "kernels"])
def test_ready_code_without_its_files(name: str, editable_native: Path, edit_manifest: Edit) -> None:
    edit_code(editable_native, edit_manifest, **{name: None})
    with pytest.raises(ArtifactError, match=rf"manifest.*{name}"):
        LLM(editable_native)


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x05\x06" + b"\0" * 18], ids=["empty", "text", "empty zip"])
def test_a_step_program_that_is_none(content: bytes, editable_native: Path, edit_manifest: Edit) -> None:
    (editable_native / "code/native/step.pt2").write_bytes(content)
    edit_manifest(editable_native)
    with pytest.raises(ArtifactError, match=r"step\.pt2: cannot be loaded"):
        LLM(editable_native)


PROBE = """
import json, sys
events = []
def hook(event, arguments):
    if event in ("pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect"):
        events.append([event, str(arguments)])
import torch
from optc.errors import OptcError
from optc.runtime import LLM
sys.addaudithook(hook)
try:
    llm = LLM(sys.argv[1], native=sys.argv[2] == "native")
    results = llm.generate(json.loads(sys.argv[3]), max_tokens=12, ignore_eos=True)
    found = {"tokens": [r.token_ids for r in results], "is_native": llm.engine.executor.is_native}
except OptcError as error:
    found = {"error": f"{type(error).__name__}: {error}"}
maps = {line.split(maxsplit=5)[-1] for line in open("/proc/self/maps").read().splitlines() if "/" in line}
print(json.dumps(found | {"events": events, "maps": sorted(maps)}))
"""


def probe(folder: Path, native: str) -> dict[str, Any]:
    """What a fresh process sees and does that runs the artifact."""
    command = [sys.executable, "-c", PROBE, str(folder), native, json.dumps(PROMPTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_without_native_nothing_native_is_loaded(native_artifact: Path, artifact: Path) -> None:
    """In a process of its own: no code of the artifact is mapped, no process started, nothing unpickled."""
    known = Path(torch.__file__).parents[1]
    for native in ("native", "portable"):
        found = probe(native_artifact, native)
        foreign = [name for name in found["maps"] if ".so" in name and str(native_artifact) in name]
        extracted = [name for name in found["maps"] if name.endswith("wrapper.so")]
        assert found["tokens"] == tokens(LLM(artifact))
        assert found["is_native"] is (native == "native")
        assert bool(foreign) is bool(extracted) is (native == "native")
        assert found["events"] == []
        assert str(known) in "".join(found["maps"])


def test_a_kernels_library_that_is_none(editable_native: Path, edit_manifest: Edit) -> None:
    (editable_native / "code/native/kernels.so").write_bytes(b"\x7fELF not really")
    edit_manifest(editable_native)
    found = probe(editable_native, "native")
    assert found["error"].startswith("ArtifactError: cannot load the kernels library")
    assert "kernels.so" in found["error"]
    assert not [name for name in found["maps"] if name.endswith("wrapper.so")]
    assert found["error"].endswith("compile the model again here")


def test_there_is_no_pickle(native_artifact: Path) -> None:
    contents = {name: (native_artifact / name).read_bytes() for name in files_of(native_artifact)}
    with zipfile.ZipFile(native_artifact / "code/native/step.pt2") as archive:
        contents |= {name: archive.read(name) for name in archive.namelist()}
    assert len(contents) > 15
    for name, content in contents.items():
        assert Path(name).suffix not in (".pkl", ".pickle", ".pt", ".pth", ".bin", ".py", ".pyc"), name
        assert not is_pickle(content), name


def is_pickle(content: bytes) -> bool:
    if content[:1] != b"\x80":
        return False
    try:
        return any(opcode.name == "STOP" for opcode, _, _ in pickletools.genops(content))
    except Exception:
        return False


def test_pending_code(
    checkpoint: Path, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """For a GPU, compiled without one and without a C++ compiler: the portable program runs, and that is said."""
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setenv("PATH", "/nonexistent")
    output = optc.compile(checkpoint, tmp_path / "h100.optc", target="h100", block_size=16)
    (code,) = read_manifest(output).native
    assert (code.target, code.status, code.step, code.kernels) == ("h100", "pending", None, None)
    assert not (output / "code").exists()
    with caplog.at_level(logging.WARNING, logger="optc"):
        llm = LLM(output)
    assert "no native code yet" in caplog.text
    assert "h100" in caplog.text
    assert tokens(llm) == tokens(LLM(artifact))


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


# ------------------------------------------------------------------------------------------------- identity


def test_equal_inputs_give_equal_weights_and_identity(artifact: Path, checkpoint: Path, tmp_path: Path) -> None:
    elsewhere = Path(shutil.copytree(checkpoint, tmp_path / "elsewhere"))
    again = compile_eager(elsewhere, tmp_path / "again.optc")
    for name in files_of(artifact):
        if name not in ("manifest.json", "report.html"):
            assert (again / name).read_bytes() == (artifact / name).read_bytes(), name
    assert read_manifest(again).identity == read_manifest(artifact).identity


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"max_model_len": 128}, {"block_size": 32}], ids=str)
def test_other_inputs_give_another_identity(
    options: dict[str, Any], artifact: Path, checkpoint: Path, tmp_path: Path
) -> None:
    other = compile_eager(checkpoint, tmp_path / "other.optc", **options)
    assert read_manifest(other).identity != read_manifest(artifact).identity
    assert len(tokens(LLM(other))) == len(PROMPTS)


def test_other_weights_give_another_identity(artifact: Path, editable_checkpoint: Path, tmp_path: Path) -> None:
    path = editable_checkpoint / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["model.norm.weight"][3] += 1e-3
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    other = compile_eager(editable_checkpoint, tmp_path / "other.optc")
    assert read_manifest(other).identity != read_manifest(artifact).identity


# ------------------------------------------------------------------------------------------------- weights


def mapped(path: Path) -> list[range]:
    """Where the file is mapped in this process."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            start, _, end = line.split()[0].partition("-")
            found.append(range(int(start, 16), int(end, 16)))
    return found


def test_weights_of_the_portable_program_are_mapped_not_copied(artifact: Path) -> None:
    """Those of native programs are copied: see test_huge_pages.py."""
    llm = LLM(artifact)
    tokens(llm)
    places = mapped((artifact / "weights.safetensors").resolve())
    for name, tensor in llm.engine.executor.constants.items():
        assert any(tensor.data_ptr() in place for place in places), name


def test_several_shards(checkpoint: Path, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "SHARD_BYTES", 100_000)
    output = compile_eager(checkpoint, tmp_path / "sharded.optc")
    shards = sorted(path.name for path in output.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0] == f"weights-00001-of-{len(shards):05d}.safetensors"
    assert all((output / name).stat().st_size < 110_000 for name in shards)
    manifest = read_manifest(output)
    assert {record.file for record in manifest.constants.values()} == set(shards)
    assert tokens(LLM(output)) == tokens(LLM(artifact))
    (output / shards[1]).unlink()
    with pytest.raises(ArtifactError, match=rf"{shards[1]}: missing"):
        LLM(output)


def test_weights_that_share_memory(tmp_path: Path) -> None:
    whole = torch.randn(8, 4)
    weights = {"whole": whole, "top": whole[:4], "flat": whole.view(-1), "turned": whole.t(), "none": whole[:0]}
    package.write_weights(tmp_path, weights, {})
    found = safetensors.torch.load_file(tmp_path / "weights.safetensors")
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


def test_a_shard_is_never_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "SHARD_BYTES", 10)
    weights = {name: torch.ones(size) for name, size in (("a", 5), ("b", 1), ("c", 1), ("d", 9))}
    records = package.write_weights(tmp_path, weights, {})
    assert [records[name].file[8:13] for name in "abcd"] == ["00001", "00002", "00002", "00003"]


# ------------------------------------------------------------------------------------------------- writing


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("where", ["weights", "manifest", "sync"])
def test_a_full_disk(where: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        if where == "weights":
            raise safetensors.SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            )
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "weights":
        monkeypatch.setattr(safetensors.torch, "save_file", full)
    elif where == "manifest":
        monkeypatch.setattr("optc.optimizer.assemble.write_manifest", full)
    else:
        monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        ArtifactError, match=r"out\.optc: cannot write the artifact: the disk is full; nothing was left"
    ):
        compile_eager(checkpoint, tmp_path / "out.optc")
    assert left_in(tmp_path) == []


def test_an_output_in_a_place_that_cannot_be_written(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OptcError, match=r"file/out\.optc"):
        compile_eager(checkpoint, tmp_path / "file/out.optc")


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), writing(tmp_path / "out.optc", force=False) as folder:
        (folder / "weights").touch()
        raise KeyboardInterrupt
    assert left_in(tmp_path) == []


def test_existing_output(artifact: Path, editable: Path, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"copy\.optc exists.*--force"):
        compile_eager(checkpoint, editable)
    (editable / "leftover").touch()
    compile_eager(checkpoint, editable, force=True)
    assert files_of(editable) == files_of(artifact)
    assert tokens(LLM(editable)) == tokens(LLM(artifact))
    assert left_in(tmp_path) == ["copy.optc"]


def test_force_replaces_artifacts_only(checkpoint: Path, tmp_path: Path) -> None:
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "thesis.tex").write_text("ten years")
    (tmp_path / "file").write_text("x")
    for output in (precious, tmp_path / "file"):
        for force in (False, True):
            with pytest.raises(UsageError, match="exists"):
                compile_eager(checkpoint, output, force=force)
    assert (precious / "thesis.tex").read_text() == "ten years"
    (tmp_path / "empty").mkdir()
    compile_eager(checkpoint, tmp_path / "empty", force=True)
    open_artifact(tmp_path / "empty")


def test_what_replaces_an_artifact_is_whole_or_not_there(editable: Path, tmp_path: Path) -> None:
    before = files_of(editable)
    with pytest.raises(RuntimeError), writing(editable, force=True) as folder:
        (folder / "half").touch()
        raise RuntimeError
    assert files_of(editable) == before
    assert left_in(tmp_path) == ["copy.optc"]


def killed_in(block: Callable[[Path], None], output: Path) -> None:
    """Run `writing` in a child that is killed inside."""
    child = os.fork()
    if child == 0:
        try:
            with writing(output, force=True) as folder:
                block(folder)
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


def test_a_killed_compile_is_cleaned_up_by_the_next(tmp_path: Path) -> None:
    output = tmp_path / "out.optc"
    killed_in(lambda folder: (folder / "weights").touch(), output)
    assert not output.exists()
    (left,) = left_in(tmp_path)
    assert left.startswith(".out.optc.")
    with writing(output, force=False) as folder:
        (folder / "whole").touch()
    assert left_in(tmp_path) == ["out.optc"]
    assert left_in(output) == ["whole"]


def test_a_compile_killed_while_it_replaced_loses_nothing(editable: Path, tmp_path: Path) -> None:
    """Killed between the two renames: the old artifact comes back first, and nothing else is left."""
    whole = files_of(editable)
    kill_between_the_renames(editable)
    assert not editable.exists()
    with pytest.raises(UsageError, match="exists"):
        package.check_output(editable, force=False)
    assert files_of(editable) == whole

    kill_between_the_renames(editable)
    with pytest.raises(RuntimeError), writing(editable, force=True):
        raise RuntimeError
    assert left_in(tmp_path) == ["copy.optc"]
    open_artifact(editable)

    kill_between_the_renames(editable)
    with writing(editable, force=True) as folder:
        (folder / "whole").touch()
    assert left_in(tmp_path) == ["copy.optc"]
    assert left_in(editable) == ["whole"]


def test_an_old_artifact_is_kept_until_another_stands(editable: Path, tmp_path: Path) -> None:
    """Something else took its place meanwhile: then it is not deleted."""
    kill_between_the_renames(editable)
    editable.mkdir()
    with pytest.raises(RuntimeError), writing(editable, force=True):
        raise RuntimeError
    (old,) = tmp_path.glob(".copy.optc.*.old")
    open_artifact(old)


def kill_between_the_renames(output: Path) -> None:
    """Run a --force compile in a child that dies when it has moved the old artifact away."""
    real = Path.rename

    def rename_then_die(self: Path, target: Path) -> Path:
        real(self, target)
        os.kill(os.getpid(), signal.SIGKILL)
        return target

    child = os.fork()
    if child == 0:
        try:
            Path.rename = rename_then_die  # type: ignore[assignment, method-assign]
            with writing(output, force=True) as folder:
                (folder / "new").touch()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


def test_a_process_with_the_same_number_is_no_obstacle(tmp_path: Path) -> None:
    """In containers the process that was killed and the next one often have the same process id."""
    killed_in(lambda folder: None, tmp_path / "out.optc")
    with writing(tmp_path / "out.optc", force=False) as folder:
        (folder / "whole").touch()
    assert left_in(tmp_path) == ["out.optc"]


def test_a_compile_that_runs_is_left_alone(tmp_path: Path) -> None:
    """Two compiles to one place: the second does not take the first one's folder away; whoever ends first stays."""
    output = tmp_path / "out.optc"
    with pytest.raises(UsageError, match="exists"), writing(output, force=False) as first:
        (first / "first").touch()
        with writing(output, force=False) as second:
            (second / "second").touch()
        assert (first / "first").exists()
    assert left_in(output) == ["second"]
    assert left_in(tmp_path) == ["out.optc"]


COMPILE = """
import sys
import optc
optc.compile(sys.argv[1], sys.argv[2], max_model_len=77)
"""


def test_kill_during_code_generation(checkpoint: Path, tmp_path: Path) -> None:
    """Kill -9 while AOTInductor compiles: no artifact, and the next compile leaves nothing of it."""
    output = tmp_path / "out.optc"
    command = [sys.executable, "-c", COMPILE, str(checkpoint), str(output)]
    running = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(".out.optc.*/code/native/kernels.so")):
            assert running.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.5)
        running.kill()
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    assert not output.exists()
    assert len(left_in(tmp_path)) == 1
    compile_eager(checkpoint, output)
    assert left_in(tmp_path) == ["out.optc"]
    open_artifact(output)
