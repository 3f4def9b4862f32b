"""Loading a checkpoint: a local folder or a hub id, with or without a LoRA adapter, checked before any work starts."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..errors import CheckpointError, UnsupportedModelError, UsageError
from .adapter import merge_adapter, read_adapter
from .capture import attention_names, first_line, rehearse
from .formats.module import Format
from .names import expert_weights
from .quantized_checkpoint import Quantized, expand, find_format, match_parameters

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

_ENCODERS = ("vision_config", "audio_config", "image_config", "vq_config")

# Modules that keep a state of their own from token to token, besides the KV cache.
_STATEFUL = re.compile(
    r"Mamba|SSM|DeltaNet|LinearAttention|Recurrent|RG_?LRU|RWKV|Rwkv|xLSTM|mLSTM|sLSTM|ShortConv|RetNet|Lightning|Bailing.*Linear"
)


_QUANTIZATION = ("quantization_config", "compression_config")
_TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

# Buffers that old checkpoints hold and newer models compute.
_COMPUTED = ("rotary_emb.inv_freq", ".masked_bias", ".attn.bias")


@dataclass(frozen=True)
class TokenizerData:
    """What a runtime needs of a tokenizer: the fast tokenizer's JSON, special tokens and the chat template."""

    json: str
    bos_token: str | None
    eos_token: str | None
    chat_template: str | None


@dataclass
class Checkpoint:
    """A causal language model ready to be captured.

    Attributes:
        model: weights loaded, evaluation mode.
        folder: that its files lie in.
        source: the path or hub id the user named.
        sha256: hash over the config and the weight files, or over the weights where there are no files.
        tokenizer: None if the checkpoint has none.
        generation: contents of generation_config.json.
        max_model_len: the length limit, decided.
        files: config.json without its quantization_config, and the tokenizer's own, by their names; none of weights.
        quantized: the codes of a checkpoint that another tool quantized; the model has them expanded.
        notes: decisions taken.
    """

    model: PreTrainedModel
    folder: Path
    source: str
    sha256: str
    tokenizer: TokenizerData | None
    generation: dict[str, Any]
    max_model_len: int
    adapter: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    quantized: Quantized | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config


def load_checkpoint(
    source: str,
    *,
    dtype: str = "auto",
    adapter: Path | None = None,
    max_model_len: int | None = None,
    is_quantizing: bool = False,
) -> Checkpoint:
    """Load the model that `source` names, after checking that it can be compiled.

    Args:
        source: a local folder in Hugging Face format, or a hub id.
        dtype: auto (as the checkpoint says), float32, bfloat16 or float16.
        adapter: a PEFT LoRA adapter folder to merge into the weights.
        max_model_len: largest number of tokens a sequence may have; the config's by default.
        is_quantizing: the weights are going to be quantized, which those of a quantized checkpoint cannot be again.

    Raises:
        CheckpointError: missing, incomplete or corrupt files, or an adapter of another model.
        UnsupportedModelError: not a decoder-only language model that optc can compile, or quantized in a way it does not read.
        UsageError: `max_model_len` beyond what the model's positions can express; a quantized checkpoint with an adapter,
            or to be quantized.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = _download(source)
    raw = _read_config(folder, source)
    stored = _find_format(raw, source, adapter=adapter, is_quantizing=is_quantizing)
    config = _load_config(folder, raw, source)
    refuse_unsupported(config)
    limit = _length_limit(config, max_model_len)
    skeleton = refuse_by_skeleton(config, limit)
    files = _check_weight_files(folder)
    if adapter is not None:
        read_adapter(adapter)  # refused before the weights are loaded, not after
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    quantized = None
    if stored is None:
        model = _load_model(folder, config, dtype)
    else:
        model, quantized = _load_quantized(folder, files, stored, config, skeleton, dtype)
    if adapter is not None:
        merge_adapter(model, adapter)
    hashed = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), folder / "config.json"])
    if adapter is not None:
        hashed += sorted(p for p in adapter.iterdir() if p.suffix in (".safetensors", ".json"))
    return Checkpoint(
        model=model.eval(),
        folder=folder,
        source=source,
        sha256=_hash_files(hashed),
        tokenizer=load_tokenizer(folder),
        generation=generation,
        max_model_len=limit,
        adapter=str(adapter) if adapter else None,
        files=_small_files(folder),
        quantized=quantized,
        notes=list(quantized.notes) if quantized else [],
    )


def _small_files(folder: Path) -> dict[str, str]:
    """What a checkpoint of this model needs besides weights and tokenizer.json; of config.json all but the quantization."""
    config = {key: value for key, value in read_json(folder / "config.json").items() if key not in _QUANTIZATION}
    files = {"config.json": json.dumps(config, indent=2) + "\n"}
    for name in ("generation_config.json", *_TOKENIZER_SETTINGS):
        if (folder / name).is_file():
            files[name] = json.dumps(read_json(folder / name), indent=2, ensure_ascii=False) + "\n"
    return files


def _find_format(raw: dict[str, Any], source: str, *, adapter: Path | None, is_quantizing: bool) -> Format | None:
    """The format of a checkpoint that another tool quantized."""
    stored = find_format(raw, source)
    if stored is None:
        return None
    if is_quantizing:
        raise UsageError(
            f"{source} is already quantized ({stored.label}); compile it as it is, or take the unquantized checkpoint"
        )
    if adapter is not None:
        raise UsageError(
            f"{source} is quantized ({stored.label}), and an adapter cannot be merged into codes; merge it into the "
            "unquantized checkpoint"
        )
    return stored


def _download(source: str) -> Path:
    if not _HUB_ID.fullmatch(source) or Path(source).exists():
        raise CheckpointError(f"{source}: no such folder (and not a hub id, which looks like owner/name or name)")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]
        # The same weights again in the format of the model's authors, which doubles the download.
        twice = ["consolidated*.safetensors", "original/*"]
        return Path(snapshot_download(source, allow_patterns=patterns, ignore_patterns=twice))
    except Exception as error:
        reason = first_line(error)
        raise CheckpointError(
            f"{source}: no such local folder, and the hub gave no model of that name: {reason}"
        ) from error


def _read_config(folder: Path, source: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{source}: the folder has no config.json; expected a model in Hugging Face format")
    raw = read_json(path)
    if not raw.get("model_type"):
        raise CheckpointError(f"{path}: names no model_type; expected a transformers config")
    return raw


def _load_config(folder: Path, raw: dict[str, Any], source: str) -> PreTrainedConfig:
    """The config without its quantization_config: optc reads quantized weights itself."""
    model_type = raw["model_type"]
    if "auto_map" in raw and model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedModelError(
            f"{source}: model type {model_type!r} comes with its own code, which optc does not run; use a model that "
            "transformers implements"
        )
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise UnsupportedModelError(f"{source}: unknown architecture {model_type!r}: {first_line(error)}") from error
    for key in _QUANTIZATION:
        if hasattr(config, key):
            delattr(config, key)
    return config


def refuse_unsupported(config: PreTrainedConfig) -> None:
    """Raise for what cannot be compiled, from the config alone.

    Raises:
        UnsupportedModelError: names what is in the way, and the way out.
    """
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{kind} is an encoder-decoder; optc compiles decoder-only language models, choose one"
        )
    encoders = sorted(name.removesuffix("_config") for name in vars(config) if name in _ENCODERS)
    text = config.get_text_config()
    if encoders or text is not config:
        other = f" with a {' and a '.join(encoders)} encoder" if encoders else ""
        raise UnsupportedModelError(
            f"{kind} wraps a language model ({text.model_type}){other}; save its language model by itself and compile that"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"{kind} is not a causal language model in transformers; optc compiles models of AutoModelForCausalLM"
        )


def refuse_by_skeleton(config: PreTrainedConfig, max_model_len: int) -> PreTrainedModel:
    """Raise for what cannot be compiled, from the modules without their weights; gives those.

    Raises:
        UnsupportedModelError: names the module that is in the way, and the way out.
    """
    kind = config.model_type
    skeleton = _build_skeleton(config)
    for name, module in skeleton.named_modules():
        is_stateful = _STATEFUL.search(type(module).__name__) or (isinstance(module, nn.Conv1d) and "conv" in name)
        if name and is_stateful:
            raise UnsupportedModelError(
                f"{kind} is a state-space or hybrid model: {name} ({type(module).__name__}) keeps a state besides the KV "
                "cache; optc compiles models whose layers are all attention"
            )
    if getattr(config, "alibi", False) or getattr(getattr(config, "attn_config", None), "alibi", False):
        raise UnsupportedModelError(
            f"{kind} uses ALiBi: {attention_names(skeleton)} adds position biases, which optc's attention does not have; "
            "use a model with rotary or learned positions"
        )
    rehearse(skeleton, max_model_len)
    return skeleton


def _build_skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model without its weights.

    Raises:
        UnsupportedModelError: transformers cannot build it.
    """
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise UnsupportedModelError(
            f"{config.model_type} cannot be built by transformers: {first_line(error)}"
        ) from error
    assert isinstance(skeleton, PreTrainedModel)
    return skeleton


def load_skeleton(folder: Path) -> PreTrainedModel:
    """The model that the config.json in `folder` describes, without weights.

    Raises:
        CheckpointError: there is no config.json, or it is none.
        UnsupportedModelError: transformers does not know the model, or cannot build it.
    """
    return _build_skeleton(_load_config(folder, _read_config(folder, str(folder)), str(folder)))


def _length_limit(config: PreTrainedConfig, wanted: int | None) -> int:
    names = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len")
    known = next((found for name in names if (found := getattr(config, name, None))), None)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {value.get("rope_type") for value in (rope, *rope.values()) if isinstance(value, dict)}
    if wanted is None:
        return int(known or 2048)
    if wanted < 2:
        raise UsageError(f"--max-model-len {wanted}: expected at least 2")
    if known and wanted > known and "dynamic" not in kinds:
        raise UsageError(
            f"--max-model-len {wanted}: {config.model_type} has positions for {known} tokens; choose at most that"
        )
    return wanted


def _check_weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the weights."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
        except (CheckpointError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: not a readable index of shards: {error}") from error
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise CheckpointError(
                f"{folder}: the index names {len(names)} shards, and {', '.join(missing)} is missing; download it again"
            )
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("model*.safetensors"))
    if not files and not list(folder.glob("*.safetensors")):
        pickled = (
            " (the .bin files there are pickles; convert them to safetensors)" if list(folder.glob("*.bin")) else ""
        )
        raise CheckpointError(f"{folder}: holds no model.safetensors and no shards of it{pickled}")
    for path in files:
        try:
            with safetensors.safe_open(path, "pt") as opened:
                opened.keys()
        except Exception as error:
            raise CheckpointError(
                f"{path}: truncated or corrupt safetensors file ({error}); download it again"
            ) from error
    return files or sorted(folder.glob("*.safetensors"))


def _load_quantized(
    folder: Path, files: list[Path], stored: Format, config: PreTrainedConfig, skeleton: PreTrainedModel, dtype: str
) -> tuple[PreTrainedModel, Quantized]:
    """A model with its quantized weights as their codes mean them, and the codes."""
    kind = DTYPES.get(dtype) or (config.dtype if isinstance(config.dtype, torch.dtype) else torch.float16)
    expanded = expand(folder, files, stored, skeleton, kind)
    model = _load_model(folder, config, str(kind).removeprefix("torch."), weights=expanded.tensors)
    weights, notes = match_parameters(expanded, model, stored.label, expert_weights(skeleton))
    return model, Quantized(stored.label, weights, stored.kv_cache, (*stored.notes, *notes))


def _load_model(
    folder: Path, config: PreTrainedConfig, dtype: str, weights: dict[str, torch.Tensor] | None = None
) -> PreTrainedModel:
    """The model with the weights in the folder, or with those that are given by the names of a checkpoint."""
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    transformers.logging.disable_progress_bar()  # the command line shows the stage; a second bar would tear it
    attention = "sdpa" if getattr(model_class, "_supports_sdpa", False) else "eager"
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # its report of the loading; what matters of it is refused below
    try:
        loaded: Any = model_class.from_pretrained(
            folder if weights is None else None,
            config=config,
            state_dict=None if weights is None else dict(weights),
            dtype=DTYPES.get(dtype, "auto"),
            attn_implementation=attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported below, by name
            local_files_only=True,
        )
    except Exception as error:
        raise CheckpointError(f"{folder}: {first_line(error)}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder}: the checkpoint lacks {len(missing)} weights of {type(model).__name__}, among them {missing[0]}"
        )
    if info["mismatched_keys"]:
        name, found, expected = sorted(info["mismatched_keys"])[0]
        raise CheckpointError(f"{folder}: {name} is {list(found)}, the config makes it {list(expected)}")
    if unexpected := sorted(name for name in info["unexpected_keys"] if not name.endswith(_COMPUTED)):
        raise CheckpointError(
            f"{folder}: the checkpoint holds {len(unexpected)} weights the model has no place for, among them "
            f"{unexpected[0]}; its config.json is for another model"
        )
    assert isinstance(model, PreTrainedModel)
    return model.requires_grad_(False)


def load_tokenizer(folder: Path) -> TokenizerData | None:
    """The checkpoint's tokenizer, or None if it has no tokenizer files.

    Raises:
        CheckpointError: there are files, but no fast tokenizer can be made of them.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        backend = tokenizer.backend_tokenizer
    except Exception as error:
        raise CheckpointError(f"{folder}: the tokenizer cannot be loaded: {first_line(error)}") from error
    backend.no_truncation()
    backend.no_padding()
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return TokenizerData(backend.to_str(), tokenizer.bos_token, tokenizer.eos_token, template)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: not readable, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable JSON file: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(content).__name__}, expected an object")
    return content


def _hash_files(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode())
        with path.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
