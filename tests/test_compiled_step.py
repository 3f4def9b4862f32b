"""Compiled programs through their C interface, and the memory that is made ready ahead of them."""

from __future__ import annotations

import ctypes
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from optc.errors import ArtifactError
from optc.runtime import huge_pages, pages_ahead
from optc.runtime.artifact import open_artifact
from optc.runtime.compiled_step import CompiledStep, ProxiedStep, load_step
from optc.runtime.executor import Executor
from optc.runtime.pages_ahead import PagesAhead

_HOLDS_THE_LOCK = 0x4  # ctypes' flag of functions that are called with Python's global lock


def package(artifact: Path) -> Path:
    (code,) = open_artifact(artifact).manifest.native
    assert code.step is not None
    return artifact / code.step


def test_other_threads_run_during_a_step(native_artifact: Path) -> None:
    executor = Executor(open_artifact(native_artifact), num_blocks=4)
    step = executor._run.__self__  # type: ignore[attr-defined]
    assert isinstance(step, CompiledStep)
    run: Any = step._functions["Run"]
    assert isinstance(run, ctypes._CFuncPtr) and not type(run)._flags_ & _HOLDS_THE_LOCK


def test_inputs_and_constants_are_checked_before_native_code_sees_them(native_artifact: Path) -> None:
    Executor(open_artifact(native_artifact), num_blocks=4)  # loads the kernels that the program calls
    step = CompiledStep(package(native_artifact))
    with pytest.raises(AssertionError):
        step.run([])
    with pytest.raises(AssertionError):
        step.bind({})
    with pytest.raises(AssertionError):
        step.bind({**dict.fromkeys(step.constants, torch.zeros(1)), "other": torch.zeros(1)})


def test_inputs_are_not_used_up(native_artifact: Path) -> None:
    """A step takes handles of its inputs over, not the tensors: the caches live on, and nothing leaks."""
    import gc
    import weakref

    from optc.runtime import LLM

    with LLM(native_artifact) as llm:
        cache = next(iter(llm.engine.executor.caches.values()))
        for _ in range(3):
            llm.generate([5, 6, 7], max_tokens=20, ignore_eos=True)
        logits: list[Any] = []
        real = llm.engine.executor.run

        def run(inputs: Any) -> Any:
            found = real(inputs)
            logits.append(weakref.ref(found))
            return found

        llm.engine.executor.run = run  # type: ignore[method-assign]
        llm.generate([5, 6, 7], max_tokens=5, ignore_eos=True)
        gc.collect()
        assert len(logits) == 5 and all(each() is None for each in logits)
        assert torch.isfinite(cache).all()


def test_packages_that_cannot_be_loaded(native_artifact: Path, tmp_path: Path) -> None:
    good = package(native_artifact)
    bad = tmp_path / "step.pt2"
    for content in (b"", b"PK", good.read_bytes()[:1000]):
        bad.write_bytes(content)
        with pytest.raises(ArtifactError, match=r"cannot be loaded.*compile the model again"):
            CompiledStep(bad)
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("step/readme", "nothing")
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        CompiledStep(bad)
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("step/model.so", b"no library")
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        CompiledStep(bad)
    bad.write_bytes(b"PK")
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load_step(bad)
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("step/model.wrapper.json", "{}")
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load_step(bad)


def test_ops_without_c_functions_go_through_pytorchs_loader(tmp_path: Path) -> None:
    """Experts in full precision run `optc::grouped_mm`, which has none."""
    from transformers import AutoModelForCausalLM, MixtralConfig

    import optc
    from optc.runtime import LLM

    config = MixtralConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "model")
    output = optc.compile(tmp_path / "model", tmp_path / "model.optc", block_size=16)
    assert isinstance(load_step(package(output)), ProxiedStep)
    with LLM(output) as native, LLM(output, native=False) as portable:
        assert native.engine.executor.is_native
        found = native.generate([[5, 6, 7]], max_tokens=12, ignore_eos=True)[0].token_ids
        assert found == portable.generate([[5, 6, 7]], max_tokens=12, ignore_eos=True)[0].token_ids


@pytest.fixture
def caches() -> list[torch.Tensor]:
    return [huge_pages.zeros((1000, 4096), torch.uint8) for _ in range(2)]


def test_pages_are_ready_ahead_of_use(caches: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_ahead, "_AHEAD", 100 * 2 * 4096)
    caches[0].fill_(7)
    pages = PagesAhead(caches)
    asked = []
    for used in (0, 10, 49, 50, 60, 500, 950, 1000):
        pages.use(used)
        pages.wait()
        asked.append(pages.num_ready)
    assert asked == [100, 100, 100, 150, 150, 600, 1000, 1000], "again when half of it is used up"
    assert (caches[0] == 7).all() and (caches[1] == 0).all(), "what they hold stays"


def test_a_system_that_cannot(caches: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    pages = PagesAhead(caches)
    calls = []

    def refuse(*arguments: int) -> int:
        calls.append(arguments)
        return -1

    pages._madvise = refuse  # type: ignore[assignment]
    for used in (0, 900, 1000):
        pages.use(used)
        pages.wait()
    assert len(calls) == 1, "it is asked once"


def test_no_caches() -> None:
    PagesAhead([]).use(5)
