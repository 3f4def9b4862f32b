"""The native code of artifacts: refused where it does not fit, not loaded unless asked for, and without pickles."""

from __future__ import annotations

import json
import logging
import pickletools
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import optc
from optc.errors import ArtifactError
from optc.runtime import LLM
from optc.runtime.artifact import read_manifest

from .artifact_cases import PROMPTS, Edit, files_of, tokens


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
        extracted = [name for name in found["maps"] if "step.so" in name]
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
    assert not [name for name in found["maps"] if "step.so" in name]
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
