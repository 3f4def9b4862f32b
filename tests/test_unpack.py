"""Every layout that a pass gives a weight can be undone: an artifact gives the checkpoint's weights back."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import optc
from optc.errors import ArtifactError
from optc.optimizer.export import export
from optc.passes.quantize.quantize import scale_dtype
from optc.passes.quantize.rtn import rtn
from optc.runtime.artifact import Artifact, open_artifact
from optc.runtime.scheme import find_scheme
from optc.runtime.unpack import stored_weights, unpack

from .families import load_reference, save_model
from .prequantized_cases import same_bits


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


@pytest.mark.parametrize("quantize", ["int4", pytest.param(None, marks=pytest.mark.slow)])
def test_what_kernels_read_comes_back_to_the_bit(quantize: str | None, tmp_path: Path) -> None:
    """Merged and packed into panels for the kernels of a CPU, or as the portable program has them: the same weights."""
    source = save_model("llama", tmp_path / "llama")
    options: dict[str, Any] = {"quantize": quantize, "target": "native", "verify": False}
    packed = open_artifact(optc.compile(source, tmp_path / "native.optc", **options))
    plain = open_artifact(optc.compile(source, tmp_path / "eager.optc", backend="eager", **options))
    records = packed.manifest.constants.values()
    assert any(record.panels for record in records)
    assert not any(record.panels or record.merged for record in plain.manifest.constants.values())
    found, expected = unpack(packed), unpack(plain)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for (layer, stored), (other, weight) in zip(stored_weights(packed), stored_weights(plain), strict=True):
        assert layer.name == other.name and same_bits(stored, weight)
    if quantize:
        assert any(layer.first_row for layer, _ in stored_weights(packed)), "some are rows of a merged matrix"
        remarks = [export(artifact.path, tmp_path / artifact.path.stem) for artifact in (packed, plain)]
        assert remarks[0] == remarks[1] and any("rounded in groups" in remark for remark in remarks[0])
        written = [load_file(tmp_path / name / "model.safetensors") for name in ("native", "eager")]
        assert written[0].keys() == written[1].keys()
        assert all(torch.equal(value, written[1][name]) for name, value in written[0].items())


def test_a_layout_that_is_not_true(editable: Path, edit_manifest: Any) -> None:
    edit_manifest(editable, lambda content: content["constants"]["model.norm.weight"].update(layout="transposed"))
    artifact = open_artifact(editable)
    with pytest.raises(ArtifactError, match=r"model\.norm\.weight cannot be unpacked from layout transposed"):
        unpack(artifact)
