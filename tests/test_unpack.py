"""Every layout that a pass gives a weight can be undone: an artifact gives the checkpoint's weights back."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import optc
from optc.errors import ArtifactError
from optc.passes.quantize.quantize import scale_dtype
from optc.passes.quantize.rtn import rtn
from optc.runtime.artifact import Artifact, open_artifact
from optc.runtime.scheme import find_scheme
from optc.runtime.unpack import stored_weights, unpack

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


@pytest.mark.parametrize(("name", "count"), [("llama", 14), ("gpt2", 8)])
@pytest.mark.parametrize("scheme", ["fp8-weight", "w4a16-g32-asym"])
def test_quantized_weights_come_back_as_their_codes_mean(name: str, count: int, scheme: str, tmp_path: Path) -> None:
    artifact, expected = compiled(name, tmp_path, quantize=scheme, algorithm="rtn-minmax")
    weights = unpack(artifact)
    args = find_scheme(scheme).weights
    quantized = {layer.name for layer, _ in stored_weights(artifact)}
    assert len(quantized) == count
    for key in set(expected) & set(weights):
        value = expected[key]
        if key in quantized:
            rows = value.t() if name == "gpt2" else value
            rounded = rtn(rows, args, scale_dtype(value.dtype, rows, args), mse=False).dequantize()
            assert weights[key].dtype == torch.float32 and not torch.equal(rounded, rows)
            value = rounded.t() if name == "gpt2" else rounded
        assert torch.equal(weights[key], value), key


def test_a_layout_that_is_not_true(editable: Path, edit_manifest: Any) -> None:
    edit_manifest(editable, lambda content: content["constants"]["model.norm.weight"].update(layout="transposed"))
    artifact = open_artifact(editable)
    with pytest.raises(ArtifactError, match=r"model\.norm\.weight cannot be unpacked from layout transposed"):
        unpack(artifact)
