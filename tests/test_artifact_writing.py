"""What `optc compile` writes: the same from the same inputs, complete or absent, whatever stops it."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from optc.errors import ArtifactError, OptcError, UsageError
from optc.optimizer import package
from optc.optimizer.package import writing
from optc.runtime import LLM
from optc.runtime.artifact import open_artifact, read_manifest

from .artifact_cases import PROMPTS, compile_eager, files_of, tokens

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
