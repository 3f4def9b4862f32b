"""Every layout that a pass gives a weight can be undone: an artifact gives the checkpoint's weights back."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import optc
from optc.errors import ArtifactError
from optc.passes.quantize_fp8 import quantize_rows
from optc.runtime.artifact import Artifact, open_artifact
from optc.runtime.ops.linear_fp8 import dequantize_fp8
from optc.runtime.unpack import unpack

from .families import load_reference, save_model


def compiled(name: str, tmp_path: Path, **options: Any) -> tuple[Artifact, dict[str, torch.Tensor]]:
    """An artifact of a small random model, and the state dict of its checkpoint."""
    checkpoint = save_model(name, tmp_path / name)
    backend = {} if "target" in options else {"backend": "eager"}
    output = optc.compile(checkpoint, tmp_path / f"{name}.optc", **backend, **options)
    return open_artifact(output), load_reference(checkpoint).state_dict()


def layouts(artifact: Artifact) -> Counter[str]:
    return Counter(record.layout for record in artifact.manifest.constants.values())


@pytest.mark.parametrize(("name", "transposed"), [("llama", 0), ("gpt2", 8), ("mixtral", 0)])
def test_plain_and_transposed_weights_are_bit_exact(name: str, transposed: int, tmp_path: Path) -> None:
    artifact, expected = compiled(name, tmp_path)
    assert layouts(artifact)["transposed"] == transposed
    weights = unpack(artifact)
    shared = set(expected) - set(weights)
    stored = {expected[key].data_ptr() for key in expected if key in weights}
    assert all(expected[key].data_ptr() in stored for key in shared), "only tied weights come once"
    assert all("inv_freq" in extra for extra in set(weights) - set(expected))
    for key in set(expected) - shared:
        assert weights[key].dtype == expected[key].dtype
        assert torch.equal(weights[key], expected[key]), key


@pytest.mark.parametrize(("name", "layout", "count"), [("llama", "fp8", 14), ("gpt2", "fp8_transposed", 8)])
def test_fp8_weights_come_back_rounded(name: str, layout: str, count: int, tmp_path: Path) -> None:
    artifact, expected = compiled(name, tmp_path, target="h100", fp8=True)
    assert layouts(artifact)[layout] == layouts(artifact)["fp8_scale"] == count
    weights = unpack(artifact)
    quantized = {record.source for record in artifact.manifest.constants.values() if record.layout == layout}
    for key in set(expected) & set(weights):
        value = expected[key]
        if key in quantized:
            rows = value.t() if layout == "fp8_transposed" else value
            rounded = dequantize_fp8(*quantize_rows(rows))
            assert weights[key].dtype == torch.float32
            torch.testing.assert_close(rounded, rows.float(), rtol=2**-4, atol=rows.abs().max().item() * 2**-9)
            value = rounded.t() if layout == "fp8_transposed" else rounded
        assert torch.equal(weights[key], value), key


@pytest.mark.parametrize("layout", ["fp8", "transposed", "fp8_transposed"])
def test_a_layout_that_is_not_true(layout: str, editable: Path, edit_manifest: Any) -> None:
    edit_manifest(editable, lambda content: content["constants"]["model.norm.weight"].update(layout=layout))
    artifact = open_artifact(editable)
    with pytest.raises(ArtifactError, match=rf"model\.norm\.weight cannot be unpacked from layout {layout}"):
        unpack(artifact)
