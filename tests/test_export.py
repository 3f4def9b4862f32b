"""An artifact's model as a checkpoint that transformers loads, with the artifact's very codes and scales."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig, LlamaConfig

import optc
from optc.cli import main
from optc.errors import ArtifactError, UsageError
from optc.optimizer.checkpoint import load_checkpoint, load_skeleton
from optc.optimizer.export import _has_no_place, export
from optc.optimizer.names import checkpoint_names
from optc.passes.quantize.given import name_schemes
from optc.passes.quantize.recipe import Recipe, Rule
from optc.runtime.artifact import Artifact, open_artifact
from optc.runtime.manifest import QuantizedLayer
from optc.runtime.ops.quantized import FP8, QuantizedWeight
from optc.runtime.scheme import QuantizationArgs, Scheme
from optc.runtime.unpack import plain_weights, stored_weights, unpack

from .families import load_reference, save_model
from .prequantized_cases import CONFIG, logits, replace_projections, same_bits, write

# One scheme for each projection of the first layer, in the order of the model.
MIX = {
    "self_attn.q_proj": "w4a16-g32",
    "self_attn.k_proj": "w4a16-channel",
    "self_attn.v_proj": "w3a16-g32",
    "self_attn.o_proj": "w8a16",
    "mlp.gate_proj": "w8a8",
    "mlp.up_proj": "w4a8-g32",
    "mlp.down_proj": "fp8-weight",
}
SECOND = {"self_attn.q_proj": "fp8-dynamic", "mlp.up_proj": "fp8-block", "mlp.gate_proj": "w8a16-g32"}


def make_checkpoint(folder: Path, checkpoint: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A small Llama with the tokenizer of the shared checkpoint."""
    shutil.copytree(checkpoint, folder)
    changes = {"vocab_size": 320, "hidden_size": 128, "intermediate_size": 256, "bos_token_id": 0, "eos_token_id": 1}
    config = LlamaConfig(**{**CONFIG.to_dict(), "head_dim": 32, **changes})
    torch.manual_seed(2)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    return folder


def compiled(source: Path, output: Path, **options: Any) -> Artifact:
    return open_artifact(optc.compile(source, output, backend="eager", verify=False, target="h100", **options))


@pytest.fixture(scope="module")
def uniform(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("uniform")
    source = make_checkpoint(folder / "source", checkpoint)
    return compiled(source, folder / "a.optc", quantize=Recipe(default="w4a16-g32", rounding="rtn", kv_cache="fp8"))


def check_round_trip(artifact: Artifact, folder: Path) -> None:
    """Read by us again: the same codes, scales and schemes."""
    again = load_checkpoint(str(folder))
    assert again.quantized is not None
    given = again.quantized.weights
    schemes = name_schemes(given)
    stored = stored_weights(artifact)
    assert given.keys() == {layer.name for layer, _ in stored}
    for layer, weight in stored:
        assert same_bits(weight, given[layer.name].stored), layer.name
        assert schemes[given[layer.name].scheme] == layer.scheme or layer.scheme.startswith("given-")
    plain = plain_weights(artifact)
    parameters = dict(again.model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in plain.items() if name in parameters)


def check_transformers(artifact: Artifact, folder: Path, **options: Any) -> None:
    """Loaded by transformers with compressed-tensors: the same weights, and so the same logits."""
    pytest.importorskip("compressed_tensors")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    ids = torch.arange(10)[None]
    found = theirs(ids).logits.float()
    state = theirs.state_dict()
    for name, value in unpack(artifact).items():
        if name in state:
            assert torch.equal(state[name], value.to(torch.bfloat16)), name
    expected = logits(artifact.path, ids)
    assert (found - expected).abs().max() < 0.05 * expected.abs().max(), "bfloat16"


def test_one_scheme(uniform: Artifact, tmp_path: Path) -> None:
    remarks = export(uniform.path, tmp_path / "out")
    check_round_trip(uniform, tmp_path / "out")
    check_transformers(uniform, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    quantization = config["quantization_config"]
    assert config["dtype"] == "bfloat16"
    assert quantization["format"] == "pack-quantized"
    assert [group["targets"] for group in quantization["config_groups"].values()] == [["Linear"]]
    assert "lm_head" in quantization["ignore"]
    assert len(remarks) == 1 and "says nothing of the KV cache" in remarks[0]


def test_the_tokenizer_and_the_generation_defaults_come_along(
    uniform: Artifact, checkpoint: Path, tmp_path: Path
) -> None:
    export(uniform.path, tmp_path / "out")
    ours, theirs = AutoTokenizer.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(checkpoint)
    messages = [{"role": "user", "content": "Grüße aus München"}]
    for add in (True, False):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=add)
        assert ours.apply_chat_template(messages, tokenize=False, add_generation_prompt=add) == expected
    assert ours("The fox")["input_ids"] == theirs("The fox")["input_ids"]
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == (theirs.bos_token, theirs.eos_token, theirs.pad_token)
    written = uniform.path.parent / "source/generation_config.json"
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == json.loads(written.read_text())


def test_every_scheme_in_one_model(checkpoint: Path, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", checkpoint)
    rules = [Rule(name=f"model.layers.0.{part}.weight", scheme=scheme) for part, scheme in MIX.items()]
    rules += [Rule(name=f"model.layers.1.{part}.weight", scheme=scheme) for part, scheme in SECOND.items()]
    artifact = compiled(source, tmp_path / "a.optc", quantize=Recipe(rules=tuple(rules), rounding="rtn"))
    remarks = "\n".join(export(artifact.path, tmp_path / "out"))
    check_round_trip(artifact, tmp_path / "out")
    check_transformers(artifact, tmp_path / "out")
    quantization = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert quantization["format"] == "mixed-precision"
    formats = {group["targets"][0]: group["format"] for group in quantization["config_groups"].values()}
    assert formats["model.layers.0.self_attn.v_proj"] == "pack-quantized"
    assert formats["model.layers.0.mlp.gate_proj"] == formats["model.layers.0.mlp.up_proj"] == "int-quantized"
    assert formats["model.layers.0.mlp.down_proj"] == "naive-quantized"
    assert formats["model.layers.1.mlp.up_proj"] == "float-quantized"
    assert "model.layers.1.self_attn.k_proj" in quantization["ignore"]
    for part in ("of 3 bits", "4-bit weights with INT8 activations", "one scheme for q_proj, k_proj, v_proj"):
        assert part in remarks


def test_zero_points(checkpoint: Path, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", checkpoint)
    recipe = Recipe(default="w4a16-g32-asym", rounding="rtn")
    artifact = compiled(source, tmp_path / "a.optc", quantize=recipe)
    (remark,) = export(artifact.path, tmp_path / "out")
    assert "CompressedTensorsConfig(dequantize=True)" in remark
    check_round_trip(artifact, tmp_path / "out")
    check_transformers(artifact, tmp_path / "out", quantization_config=CompressedTensorsConfig(dequantize=True))


def test_a_checkpoint_of_another_tool_goes_out_as_it_came(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float16).save_pretrained(tmp_path / "plain")
    plain = load_file(tmp_path / "plain/model.safetensors")

    def make(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = torch.tensor(weight.abs().max().item() / 448)
        codes = (weight.float() / scale).to(FP8)
        return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor([0.0625])}

    source = write(
        tmp_path / "source", replace_projections(plain, make), {"quant_method": "fp8", "activation_scheme": "static"}
    )
    artifact = compiled(source, tmp_path / "a.optc")
    remarks = export(artifact.path, tmp_path / "out")
    check_round_trip(artifact, tmp_path / "out")
    files = load_file(tmp_path / "out/model.safetensors")
    assert {files[name].item() for name in files if name.endswith("input_scale")} == {0.0625}
    assert any("scales in float32, which transformers rounds" in remark for remark in remarks)


def test_names_of_weights_that_the_model_merges(tmp_path: Path) -> None:
    source = save_model("mixtral", tmp_path / "source")
    expected = load_file(source / "model.safetensors")
    coded = "model.layers.0.self_attn.q_proj.weight"
    plain = {name: value for name, value in load_reference(source).state_dict().items() if name != coded}
    names = checkpoint_names(load_skeleton(source), plain, [coded])
    assert names.modules == {coded: "model.layers.0.self_attn.q_proj"}
    assert names.plain.keys() == expected.keys() - {coded}
    assert all(torch.equal(value, expected[name]) for name, value in names.plain.items())


def test_a_tied_weight_is_refused(tmp_path: Path) -> None:
    LlamaConfig(**{**CONFIG.to_dict(), "tie_word_embeddings": True}).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"embed_tokens.weight cannot be exported: it is quantized and tied"):
        checkpoint_names(load_skeleton(tmp_path), {}, ["model.embed_tokens.weight"])


def test_a_weight_that_is_missing(tmp_path: Path) -> None:
    CONFIG.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"embed_tokens.weight cannot be exported: the artifact does not hold it"):
        checkpoint_names(load_skeleton(tmp_path), {}, [])


@pytest.mark.parametrize(
    ("changes", "zero", "index", "message"),
    [
        ({"transposed": True}, None, None, r"keeps it as \[inputs, outputs\]"),
        ({"role": "embedding"}, None, None, r"take embeddings in full precision"),
        ({}, None, torch.zeros(32, dtype=torch.int32), r"act-order"),
        ({}, torch.zeros(8, 1), None, r"zero points are no integers \(hqq\)"),
        ({"shape": (8, 48)}, None, None, r"its 48 inputs are no multiple of the 32"),
        ({}, None, None, None),
    ],
)
def test_what_has_no_place(
    changes: dict[str, Any], zero: torch.Tensor | None, index: torch.Tensor | None, message: str | None
) -> None:
    args = QuantizationArgs(num_bits=4, symmetric=zero is None, strategy="group", group_size=32)
    rows, columns = changes.get("shape", (8, 32))
    codes = torch.zeros(rows, columns, dtype=torch.int8)
    weight = QuantizedWeight(codes, torch.ones(rows, -(-columns // 32)), zero, index, args).pack()
    record = QuantizedLayer(
        **{
            **{"name": "w", "role": "mlp", "shape": (8, 32), "transposed": False, "scheme": "s", "algorithm": "rtn"},
            **{"constants": {}, "bits_per_weight": 4.5, "error": None},
            **changes,
        }
    )
    found = _has_no_place(record, weight, Scheme(weights=args))
    if message is None:
        assert found is None
    else:
        with pytest.raises(UsageError, match=message):
            raise UsageError(str(found))


def test_an_artifact_without_codes(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none of its weights is quantized"):
        export(artifact, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_format_and_a_folder_that_exists(uniform: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown format 'gguf'; known: compressed-tensors"):
        export(uniform.path, tmp_path / "out", format="gguf")
    with pytest.raises(UsageError, match="exists; choose another -o"):
        export(uniform.path, tmp_path)


def test_a_full_disk_leaves_nothing(uniform: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(ArtifactError, match="the disk is full; nothing was left behind"):
        export(uniform.path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_command(uniform: Artifact, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["export", str(uniform.path), "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert (
        f"wrote {tmp_path / 'out'}" in done.output
        and "note: the checkpoint says nothing of the KV cache" in done.output
    )
    again = CliRunner().invoke(main, ["export", str(uniform.path), "-o", str(tmp_path / "out")])
    assert again.exit_code == 2 and "error:" in again.output
