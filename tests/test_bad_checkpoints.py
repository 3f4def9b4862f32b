"""Checkpoints and options that cannot be compiled: each is refused by a typed error that says what is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import torch

import optc
from optc.errors import CheckpointError, OptcError, RequestError, TargetError, UnsupportedModelError, UsageError
from optc.runtime import LLM

Break = Callable[[Path], None]
WEIGHTS = "model.safetensors"


def refused(model: Path | str, tmp_path: Path, kind: type[OptcError], said: str, **options: Any) -> None:
    output = tmp_path / "outputs" / "out.optc"
    output.parent.mkdir(exist_ok=True)
    with pytest.raises(kind, match=said) as caught:
        optc.compile(model, output, **{"backend": "eager", **options})
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert list(output.parent.iterdir()) == []


def edit_json(path: Path, **fields: Any) -> None:
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = safetensors.torch.load_file(folder / WEIGHTS)
    change(weights)
    safetensors.torch.save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def shard(folder: Path) -> None:
    """Split the weights into two shards with an index."""
    weights = safetensors.torch.load_file(folder / WEIGHTS)
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, part in parts.items():
        safetensors.torch.save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / WEIGHTS).unlink()


def missing_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def shard_without_its_tensors(folder: Path) -> None:
    shard(folder)
    path = folder / "model-00002-of-00002.safetensors"
    weights = safetensors.torch.load_file(path)
    weights.popitem()
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})


def bad_index(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text("[]")


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "pytorch_model.bin")


BROKEN: dict[str, tuple[Break, type[OptcError], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), CheckpointError, r"no config\.json"),
    "empty config": (
        lambda f: (f / "config.json").write_text(""),
        CheckpointError,
        r"config\.json: not a readable JSON",
    ),
    "config not JSON": (
        lambda f: (f / "config.json").write_text("{oops"),
        CheckpointError,
        r"config\.json: not a readable",
    ),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), CheckpointError, r"config\.json"),
    "config not text": (
        lambda f: (f / "config.json").write_bytes(b"\xff\xfe"),
        CheckpointError,
        r"config\.json: not a read",
    ),
    "no model type": (lambda f: edit_json(f / "config.json", model_type=...), CheckpointError, "names no model_type"),
    "unknown model type": (lambda f: edit_json(f / "config.json", model_type="x9"), UnsupportedModelError, "'x9'"),
    "encoder": (lambda f: edit_json(f / "config.json", model_type="t5"), UnsupportedModelError, "t5"),
    "no heads": (lambda f: edit_json(f / "config.json", num_attention_heads=0), OptcError, "."),
    "odd heads": (lambda f: edit_json(f / "config.json", num_attention_heads=7), OptcError, "."),
    "wrong field": (lambda f: edit_json(f / "config.json", hidden_size="many"), OptcError, "."),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), CheckpointError, r"holds no model\.safetensors"),
    "pickled weights": (pickled, CheckpointError, r"\.bin files there are pickles"),
    "empty weights": (
        lambda f: os.truncate(f / WEIGHTS, 0),
        CheckpointError,
        rf"{WEIGHTS}: truncated or corrupt.*again",
    ),
    "truncated weights": (
        lambda f: os.truncate(f / WEIGHTS, 9000),
        CheckpointError,
        rf"{WEIGHTS}: truncated or corrupt",
    ),
    "one byte short": (
        lambda f: os.truncate(f / WEIGHTS, (f / WEIGHTS).stat().st_size - 1),
        CheckpointError,
        rf"{WEIGHTS}: truncated or corrupt",
    ),
    "corrupt header": (
        lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 8 + (f / WEIGHTS).read_bytes()[8:]),
        CheckpointError,
        rf"{WEIGHTS}: truncated or corrupt",
    ),
    "missing shard": (missing_shard, CheckpointError, r"names 2 shards, and model-00002.*is missing"),
    "incomplete shard": (shard_without_its_tensors, CheckpointError, "lacks 1 weights"),
    "bad index": (bad_index, CheckpointError, r"index\.json: not a readable index"),
    "missing tensor": (
        lambda f: edit_weights(f, lambda w: w.pop("model.layers.1.mlp.up_proj.weight")),  # type: ignore[arg-type, return-value]
        CheckpointError,
        r"lacks 1 weights of LlamaForCausalLM, among them model\.layers\.1\.mlp\.up_proj\.weight",
    ),
    "wrong shape": (
        lambda f: edit_weights(f, lambda w: w.update({"model.norm.weight": torch.ones(65)})),
        CheckpointError,
        r"model\.norm\.weight",
    ),
    "wrong vocabulary": (
        lambda f: edit_json(f / "config.json", vocab_size=321),
        CheckpointError,
        r"is \[320, 64\], the config makes it \[321, 64\]",
    ),
    "more layers": (lambda f: edit_json(f / "config.json", num_hidden_layers=3), CheckpointError, "lacks 9 weights"),
    "a bias without a place": (
        lambda f: edit_weights(f, lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)})),
        CheckpointError,
        r"holds 1 weights the model has no place for, among them model\.layers\.0\.self_attn\.q_proj\.bias",
    ),
    "fewer layers": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=1),
        CheckpointError,
        r"holds 9 weights the model has no place for, among them model\.layers\.1\.",
    ),
    "generation not JSON": (
        lambda f: (f / "generation_config.json").write_text("{"),
        CheckpointError,
        "generation_config",
    ),
    "generation a list": (
        lambda f: (f / "generation_config.json").write_text("[]"),
        CheckpointError,
        "generation_config",
    ),
    "bad tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), CheckpointError, "tokenizer cannot be loaded"),
    "tokenizer not JSON": (
        lambda f: (f / "tokenizer.json").write_text("{"),
        CheckpointError,
        "tokenizer cannot be loaded",
    ),
    "tokenizer empty": (
        lambda f: (f / "tokenizer.json").write_bytes(b""),
        CheckpointError,
        "tokenizer cannot be loaded",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints(case: str, editable_checkpoint: Path, tmp_path: Path) -> None:
    damage, kind, said = BROKEN[case]
    damage(editable_checkpoint)
    if kind is OptcError:  # which of the errors it is does not matter
        with pytest.raises(OptcError):
            optc.compile(editable_checkpoint, tmp_path / "out.optc", backend="eager")
        assert not (tmp_path / "out.optc").exists()
    else:
        refused(editable_checkpoint, tmp_path, kind, said)


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("-inf"), "Inf")])
@pytest.mark.parametrize("options", [{}, {"quantize": "int8"}, {"verify": False}], ids=str)
def test_weights_that_are_no_numbers_are_named(
    value: float, kind: str, options: dict[str, Any], editable_checkpoint: Path, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(editable_checkpoint, lambda weights: weights[name].view(-1)[7].fill_(value))
    refused(
        editable_checkpoint, tmp_path, CheckpointError, rf"{name} holds {kind}; the checkpoint is damaged", **options
    )


def test_computed_buffers_are_no_weights(editable_checkpoint: Path, artifact: Path, tmp_path: Path, capfd: Any) -> None:
    """As old checkpoints hold them. Nothing is printed, though transformers would report them."""
    names = ("rotary_emb.inv_freq", "self_attn.masked_bias", "attn.bias")
    buffers = {f"model.layers.0.{name}": torch.ones(8) for name in names}
    edit_weights(editable_checkpoint, lambda weights: weights.update(buffers))
    output = optc.compile(editable_checkpoint, tmp_path / "out.optc", backend="eager", block_size=16)
    assert (output / "weights.safetensors").read_bytes() == (artifact / "weights.safetensors").read_bytes()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("model", ["nosuchmodel", "owner/model", "owner/model-1.5_b"])
def test_hub_ids(model: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an owner or without; weights that are there twice are fetched once."""
    monkeypatch.chdir(tmp_path)
    asked = []

    def download(name: str, **patterns: list[str]) -> str:
        files = ["config.json", "model.safetensors", "consolidated.00.safetensors", "original/params.json"]
        asked.append((name, list(huggingface_hub.utils.filter_repo_objects(files, **patterns))))
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    optc.compile(model, tmp_path / "out.optc", backend="eager", verify=False)
    assert asked == [(model, ["config.json", "model.safetensors"])]

    def fail(name: str, **patterns: list[str]) -> str:
        raise OSError("no network\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refused(model, tmp_path, CheckpointError, rf"{model}: no such local folder, and the hub gave .*: no network")


@pytest.mark.parametrize("model", ["no/such/folder", "./nothing", "/nonexistent/model", "", "~"])
def test_paths_of_nothing(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(model, tmp_path, CheckpointError, "no such|no config")


def test_a_file_instead_of_a_folder(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(checkpoint / WEIGHTS, tmp_path, CheckpointError, "no such folder")
    monkeypatch.chdir(checkpoint)
    refused(WEIGHTS, tmp_path, CheckpointError, "no such folder")


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"dtype": "int8"}, UsageError, "dtype 'int8': expected auto, float32, bfloat16 or float16"),
        ({"dtype": ""}, UsageError, "dtype ''"),
        ({"dtype": None}, UsageError, "dtype None"),
        ({"block_size": 0}, UsageError, "block size 0: expected 1 to 1024"),
        ({"block_size": -16}, UsageError, "block size -16"),
        ({"block_size": 1025}, UsageError, "block size 1025"),
        ({"block_size": 1.5}, UsageError, "block size 1.5"),
        ({"max_model_len": 257}, UsageError, "257.*256"),
        ({"max_model_len": 1}, UsageError, "1: expected at least 2"),
        ({"max_model_len": 0}, UsageError, "0: expected at least 2"),
        ({"max_model_len": -5}, UsageError, "-5: expected at least 2"),
        ({"target": "abacus"}, TargetError, "unknown target 'abacus'; known: native"),
        ({"target": ""}, TargetError, "unknown target ''"),
        ({"backend": "magic"}, UsageError, "backend 'magic'"),
        ({"quantize": 5}, UsageError, "quantize=5: expected a preset"),
        ({"quantize": True}, UsageError, "quantize=True: expected a preset"),
        ({"quantize": "int8", "max_kl": "small"}, UsageError, "max_kl='small': expected a number"),
        ({"bits": "4.5"}, UsageError, "bits='4.5': expected a number"),
    ],
    ids=str,
)
def test_wrong_options(
    options: dict[str, Any], kind: type[OptcError], said: str, checkpoint: Path, tmp_path: Path
) -> None:
    refused(checkpoint, tmp_path, kind, said, **options)


def test_options_at_the_edges(checkpoint: Path, tmp_path: Path) -> None:
    for number, options in enumerate(({"block_size": 1}, {"block_size": 1024, "max_model_len": 2})):
        output = optc.compile(checkpoint, tmp_path / str(number), backend="eager", verify=False, **options)
        assert len(LLM(output).generate([[5]], max_tokens=5, ignore_eos=True)[0].token_ids) == (5 if number == 0 else 1)


# ------------------------------------------------------------------------------------------------- adapters


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A LoRA adapter that fits the checkpoint."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    write_adapter(folder, {"model.layers.0.self_attn.q_proj": (64, 64)})
    return folder


def write_adapter(folder: Path, layers: dict[str, tuple[int, int]]) -> None:
    weights = {}
    for name, (rows, columns) in layers.items():
        weights[f"base_model.model.{name}.lora_A.weight"] = torch.full((4, columns), 0.01)
        weights[f"base_model.model.{name}.lora_B.weight"] = torch.full((rows, 4), 0.01)
    safetensors.torch.save_file(weights, folder / "adapter_model.safetensors")


def half(folder: Path) -> None:
    weights = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 64)}
    safetensors.torch.save_file(weights, folder / "adapter_model.safetensors")


def other_matrix(folder: Path) -> None:
    weights = {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 64)}
    safetensors.torch.save_file(weights, folder / "adapter_model.safetensors")


CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTERS: dict[str, tuple[Break, str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), "no adapter_config.json"),
    "no weights": (lambda f: (f / ADAPTER_WEIGHTS).unlink(), "no adapter_model.safetensors"),
    "config not JSON": (lambda f: (f / CONFIG).write_text("{"), "unreadable adapter"),
    "config a list": (lambda f: (f / CONFIG).write_text("[]"), "adapter"),
    "truncated": (lambda f: os.truncate(f / ADAPTER_WEIGHTS, 50), "unreadable adapter"),
    "not LoRA": (lambda f: edit_json(f / CONFIG, peft_type="IA3"), "IA3 adapter; optc merges plain LoRA"),
    "DoRA": (lambda f: edit_json(f / CONFIG, use_dora=True), "no DoRA"),
    "biases": (lambda f: edit_json(f / CONFIG, bias="all"), "no trained biases"),
    "another model's layers": (
        lambda f: write_adapter(f, {"model.layers.9.self_attn.q_proj": (64, 64)}),
        r"another model: model\.layers\.9\.self_attn\.q_proj: no such layer",
    ),
    "another model's shapes": (
        lambda f: write_adapter(f, {"model.layers.0.self_attn.q_proj": (128, 64)}),
        r"another model: .*q_proj: that layer is \(64, 64\), the adapter's is \(128, 64\)",
    ),
    "no matrices": (lambda f: write_adapter(f, {}), "holds no LoRA matrices"),
    "half a pair": (half, "only one of lora_A and lora_B"),
    "embeddings": (other_matrix, "not a LoRA matrix"),
    "ranks that differ": (
        lambda f: safetensors.torch.save_file(
            {
                "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 64),
                "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(64, 5),
            },
            f / ADAPTER_WEIGHTS,
        ),
        "q_proj",
    ),
    "alpha is no number": (lambda f: edit_json(f / CONFIG, lora_alpha="x"), "adapter"),
    "alpha for no pattern": (
        lambda f: edit_json(f / CONFIG, alpha_pattern={"q_proj(": 4}),
        r"alpha_pattern 'q_proj\(' is not a regular expression",
    ),
    "PiSSA": (lambda f: edit_json(f / CONFIG, init_lora_weights="pissa_niter_4"), "init_lora_weights 'pissa_niter_4'"),
    "OLoRA": (lambda f: edit_json(f / CONFIG, init_lora_weights="olora"), "init_lora_weights 'olora'"),
    "CorDA": (lambda f: edit_json(f / CONFIG, init_lora_weights="corda"), "init_lora_weights 'corda'"),
    "activated": (lambda f: edit_json(f / CONFIG, alora_invocation_tokens=[5]), "alora_invocation_tokens"),
}


def test_an_adapter_is_refused_before_the_weights_are_loaded(
    checkpoint: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optc.optimizer.checkpoint._load_model", None)
    edit_json(adapter / CONFIG, use_dora=True)
    refused(checkpoint, tmp_path, CheckpointError, "no DoRA", adapter=adapter)


@pytest.mark.parametrize("case", ADAPTERS)
def test_broken_adapters(case: str, checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    damage, said = ADAPTERS[case]
    damage(adapter)
    refused(checkpoint, tmp_path, CheckpointError, said, adapter=adapter)


def test_an_adapter_that_is_not_there(checkpoint: Path, tmp_path: Path) -> None:
    refused(checkpoint, tmp_path, CheckpointError, "adapter_config.json", adapter=tmp_path / "none")


def test_the_adapter_is_merged(checkpoint: Path, adapter: Path, artifact: Path, tmp_path: Path) -> None:
    merged = optc.compile(checkpoint, tmp_path / "merged.optc", backend="eager", block_size=16, adapter=adapter)
    name = "model.layers.0.self_attn.q_proj.weight"
    before, after = LLM(artifact).engine.executor.constants, LLM(merged).engine.executor.constants
    expected = before[name] + 8 / 4 * (torch.full((64, 4), 0.01) @ torch.full((4, 64), 0.01))
    torch.testing.assert_close(after[name], expected, rtol=0, atol=1e-7)

    # PEFT's default for lora_alpha is 8 as well.
    edit_json(adapter / CONFIG, lora_alpha=...)
    merged = optc.compile(checkpoint, tmp_path / "default.optc", backend="eager", block_size=16, adapter=adapter)
    assert torch.equal(LLM(merged).engine.executor.constants[name], after[name])
    assert all(torch.equal(after[other], before[other]) for other in before if other != name)


# ------------------------------------------------------------------------------------------------- shards, tokenizer


def test_sharded_checkpoints(artifact: Path, editable_checkpoint: Path, tmp_path: Path) -> None:
    shard(editable_checkpoint)
    output = optc.compile(editable_checkpoint, tmp_path / "out.optc", backend="eager", block_size=16)
    assert (output / "weights.safetensors").read_bytes() == (artifact / "weights.safetensors").read_bytes()


def test_without_a_tokenizer(artifact: Path, editable_checkpoint: Path, tmp_path: Path) -> None:
    """Token ids work; text is refused with a reason."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (editable_checkpoint / name).unlink()
    output = optc.compile(editable_checkpoint, tmp_path / "out.optc", backend="eager", block_size=16)
    llm = LLM(output)
    (result,) = llm.generate([[7, 8]], max_tokens=6, ignore_eos=True)
    assert result.text is None
    assert result.token_ids == LLM(artifact).generate([[7, 8]], max_tokens=6, ignore_eos=True)[0].token_ids
    assert len(llm.score([7, 8, 9])[0]) == 2
    for call in (
        lambda: llm.generate("Hello"),
        lambda: llm.stream([7]),
        lambda: llm.chat([{"role": "user", "content": "x"}]),
    ):
        with pytest.raises(
            RequestError, match="needs a tokenizer, and the checkpoint of this artifact had none; give token ids"
        ):
            call()
