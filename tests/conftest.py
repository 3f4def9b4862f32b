"""What the tests share: a tiny random checkpoint with a real tokenizer, and its artifacts."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import HealthCheck, settings
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig

import optc
from optc.runtime.artifact import file_sha256, open_artifact
from optc.runtime.engine import Engine
from optc.runtime.engine_config import EngineConfig
from optc.runtime.manifest import Manifest, checksum_of, identity_of

from .engine_cases import BLOCK, BLOCK_BYTES, greedy, run

settings.register_profile("optc", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("optc")

VOCAB_SIZE = 320
MAX_LEN = 256
BLOCK_SIZE = 16
TEXT = """The quick brown fox jumps over the lazy dog, and the dog does not care about the fox at all.
Grüße aus München: ein schöner Tag für ein Stück Käsekuchen. Où est la bibliothèque ? El niño comió piñas.
日本語のテキストと絵文字 🎉🚀👩‍👩‍👧 も少し。 def f(x): return x + 1  # code, too
"""
CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages %}
{% if message['role'] not in ['system', 'user', 'assistant'] %}{{ raise_exception('unknown role') }}{% endif %}
<{{ message['role'] }}>{{ message['content'] | trim }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A cache folder of this session; only compiled kernels, which are named by their content, stay between sessions."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "kernels").symlink_to(request.config.cache.mkdir("kernels"), target_is_directory=True)
    before = os.environ.get("OPTC_CACHE")
    os.environ["OPTC_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["OPTC_CACHE"]
    else:
        os.environ["OPTC_CACHE"] = before


def _train_tokenizer() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]),
        ]
    )
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama checkpoint: two layers, grouped-query attention, fp32, random weights, byte-level BPE, chat template."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LEN,
        initializer_range=0.15,  # far-apart logits, so that rounding does not decide which token is the largest
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    _train_tokenizer().save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    generation = {"bos_token_id": 0, "eos_token_id": [1], "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    _write_json(folder / "generation_config.json", generation)
    return folder


@pytest.fixture(scope="session")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint as a portable artifact. Read only: tests that change it take `editable`."""
    output = tmp_path_factory.mktemp("artifacts") / "tiny.optc"
    return optc.compile(checkpoint, output, backend="eager", block_size=BLOCK_SIZE)


@pytest.fixture(scope="session")
def native_artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with native code. Compiled once a session, in about half a minute."""
    output = tmp_path_factory.mktemp("artifacts") / "native.optc"
    return optc.compile(checkpoint, output, block_size=BLOCK_SIZE)


@pytest.fixture
def editable_checkpoint(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def editable(artifact: Path, tmp_path: Path) -> Path:
    """A copy of the portable artifact."""
    return Path(shutil.copytree(artifact, tmp_path / "copy.optc"))


@pytest.fixture
def editable_native(native_artifact: Path, tmp_path: Path) -> Path:
    """A copy of the artifact with native code."""
    return Path(shutil.copytree(native_artifact, tmp_path / "native.optc"))


@pytest.fixture(scope="session")
def edit_manifest() -> Callable[..., None]:
    """Rewrites the manifest and makes sizes, digests, identity and checksum right again."""

    def edit(folder: Path, change: Callable[[dict[str, Any]], None] = lambda content: None) -> None:
        path = folder / "manifest.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        for name, record in content["files"].items():
            if (folder / name).is_file():
                record |= {"size": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
        change(content)
        content["identity"] = identity_of(Manifest.model_validate(content))
        content["checksum"] = checksum_of(Manifest.model_validate(content))
        _write_json(path, content)

    return edit


@pytest.fixture(scope="session")
def make(artifact: Path) -> Callable[..., Engine]:
    """Makes an engine with that many blocks; one is made for each combination and used again."""
    opened = open_artifact(artifact)
    assert opened.manifest.memory.kv_bytes_per_token * BLOCK == BLOCK_BYTES
    made: dict[tuple[object, ...], Engine] = {}

    def make(blocks: int = 200, budget: int = 512, seqs: int = 64, **limits: Any) -> Engine:
        key = (blocks, budget, seqs, *sorted(limits.items()))
        if key not in made or made[key].has_work():  # a test that failed leaves work
            config = EngineConfig(
                max_num_seqs=seqs, max_num_batched_tokens=budget, kv_cache_memory=blocks * BLOCK_BYTES, **limits
            )
            made[key] = Engine(opened, config)
        made[key].reset_prefix_cache()
        return made[key]

    return make


@pytest.fixture(scope="session")
def alone(make: Callable[..., Engine]) -> Callable[..., list[int]]:
    """The greedy tokens of a prompt that has an engine to itself."""
    known: dict[tuple[int, ...], list[int]] = {}

    def alone(prompt: list[int], count: int) -> list[int]:
        key = tuple(prompt)
        if len(known.get(key, [])) < count:
            known[key] = run(make(), [(prompt, greedy(max(count, 24)))])[0].output_token_ids
        return known[key][:count]

    return alone


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
