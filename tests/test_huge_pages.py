"""Tensors in huge pages hold what they should, wherever the system puts them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from optc.errors import ArtifactError
from optc.runtime import huge_pages
from optc.runtime.artifact import open_artifact
from optc.runtime.executor import Executor

DTYPES = (torch.float32, torch.bfloat16, torch.uint8, torch.int8, torch.float8_e4m3fn, torch.int64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 7), (1,), (), (0, 4), (1 << 20, 5)])
def test_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    found = huge_pages.zeros(shape, dtype)
    assert found.shape == shape and found.dtype == dtype and found.is_contiguous()
    assert not found.view(torch.uint8).any() if found.dim() else found.float() == 0
    assert found.data_ptr() % (2 << 20) == 0


def test_copies_are_equal_aligned_and_their_own() -> None:
    given = {
        str(dtype): torch.randint(0, 100, (count, 3)).to(dtype) for count, dtype in zip(range(7), DTYPES, strict=False)
    }
    given["turned"] = torch.randn(5, 9).t()
    given["number"] = torch.tensor(2.5)
    found = huge_pages.copies(given)
    assert found.keys() == given.keys()
    for name, value in given.items():
        copy = found[name]
        assert copy.dtype == value.dtype and copy.shape == value.shape and copy.is_contiguous()
        assert torch.equal(copy.float(), value.float())
        assert copy.numel() == 0 or copy.data_ptr() % 64 == 0
    found["turned"].zero_()
    assert given["turned"].any() and all(
        torch.equal(found[n].float(), given[n].float()) for n in given if n != "turned"
    )


def test_no_file_stays_mapped_under_native_weights(native_artifact: Path) -> None:
    executor = Executor(open_artifact(native_artifact), num_blocks=2)
    assert executor.is_native
    assert str(native_artifact) + "/weights" not in Path("/proc/self/maps").read_text()


def test_no_memory_for_the_weights(native_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(size: int) -> torch.Tensor:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(huge_pages, "_memory", refuse)
    with pytest.raises(
        ArtifactError, match=r"no memory for 0\.0 GB of weights \(Cannot allocate memory\).*--no-native"
    ):
        Executor(open_artifact(native_artifact), num_blocks=4)
