"""What `benchmarks/cpu.py` measures: the model, and each engine's own form of it, made once and kept in a work folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

HERE = Path(__file__).resolve().parent
TINY = HERE.parent / "examples/tiny-llama"
FORMATS = ("int4", "int8", "bf16")

# 367M parameters, random: 24 layers, and 8,192 positions so that a context of 4,096 tokens can go on.
MAKE_A = """
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(
    vocab_size=32000, hidden_size=1024, intermediate_size=3072, num_hidden_layers=24, num_attention_heads=16,
    num_key_value_heads=8, head_dim=64, max_position_embeddings=8192, tie_word_embeddings=False,
)
torch.manual_seed(0)
LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(sys.argv[1])
"""


@dataclass(frozen=True)
class EngineSpec:
    """An engine in one format.

    Attributes:
        name: what the tables call it.
        kind: `optc`, `llama.cpp`, `openvino`, `onnx`, `eager` or `compiled`.
        weights: the format in its own vocabulary.
        kv8: whether it can store keys and values in 8 bits, and how: `always`, `option` or `no`.
    """

    name: str
    kind: str
    weights: str
    kv8: str = "no"

    @property
    def is_peer(self) -> bool:
        """Whether it runs in the environment of the peers."""
        return self.kind in ("llama.cpp", "openvino", "onnx")


ENGINES: dict[str, tuple[EngineSpec, ...]] = {
    "int4": (
        EngineSpec("optc", "optc", "int4", "option"),
        EngineSpec("llama.cpp Q4_0", "llama.cpp", "Q4_0", "option"),
        EngineSpec("OpenVINO int4", "openvino", "int4", "always"),
        EngineSpec("ONNX Runtime GenAI int4", "onnx", "int4"),
    ),
    "int8": (
        EngineSpec("optc", "optc", "int8", "option"),
        EngineSpec("llama.cpp Q8_0", "llama.cpp", "Q8_0", "option"),
        EngineSpec("OpenVINO int8", "openvino", "int8", "always"),
        EngineSpec("ONNX Runtime GenAI int8", "onnx", "int8"),
    ),
    "bf16": (
        EngineSpec("optc", "optc", "bf16", "option"),
        EngineSpec("llama.cpp BF16", "llama.cpp", "BF16", "option"),
        EngineSpec("llama.cpp F16", "llama.cpp", "F16", "option"),
        EngineSpec("OpenVINO bf16", "openvino", "bf16", "always"),
        EngineSpec("ONNX Runtime GenAI fp32", "onnx", "fp32"),  # has no 16-bit form for processors
        EngineSpec("transformers", "eager", "bf16"),
        EngineSpec("transformers, compiled", "compiled", "bf16"),
    ),
}


class MissingError(Exception):
    """An engine is not installed, or its form of the model cannot be made."""


class Models:
    """Makes the models, each in a process of its own, and says how to start a worker over them.

    Args:
        work: folder that keeps them.
        peers: folder of the peers' virtual environment; None if there is none.
        threads: of quantizing.
        keep: whether an optc artifact that is there already counts; it may be of older code.
    """

    def __init__(self, work: Path, peers: Path | None, *, threads: int, keep: bool) -> None:
        self.work, self._threads, self._keep = work, threads, keep
        self._peers = peers / "bin/python" if peers else None
        self._fresh: set[Path] = set()

    @cached_property
    def shape_a(self) -> Path:
        path = self.work / "A"
        if not (path / "config.json").exists():
            self._run([sys.executable, "-c", MAKE_A, str(path)])
        return path

    def command(
        self, spec: EngineSpec, checkpoint: Path, *, kv8: bool = False, algorithm: str | None = None
    ) -> list[str]:
        """Command of a worker for a checkpoint, which is made into the engine's form first.

        Raises:
            MissingError: the engine is not installed.
        """
        ours = [sys.executable, str(HERE / "cpu_optc.py")]
        match spec.kind:
            case "optc":
                return [*ours, "optc", str(self._artifact(checkpoint, spec.weights, kv8, algorithm))]
            case "llama.cpp":
                python = self._need("llama_cpp")
                model = str(self._gguf(python, checkpoint, spec.weights))
                return [python, str(HERE / "cpu_peers.py"), "llama.cpp", model, *(["--kv", "q8_0"] if kv8 else [])]
            case "openvino":
                python = self._need("openvino_genai")
                return [python, str(HERE / "cpu_peers.py"), "openvino", str(self._ir(python, checkpoint, spec.weights))]
            case "onnx":
                python = self._need("onnxruntime_genai")
                return [python, str(HERE / "cpu_peers_onnx.py"), str(self._onnx(python, checkpoint, spec.weights))]
            case _:
                return [*ours, spec.kind, str(checkpoint)]

    def reference(self, checkpoint: Path) -> list[str]:
        """Command of a worker that runs the checkpoint in float32."""
        return [sys.executable, str(HERE / "cpu_optc.py"), "float32", str(checkpoint)]

    def _need(self, module: str) -> str:
        if self._peers is None or not self._peers.exists():
            raise MissingError("no environment of peers; see --peers")
        found = subprocess.run([str(self._peers), "-c", f"import {module}"], capture_output=True, check=False)
        if found.returncode:
            raise MissingError(f"{module} is not installed in the environment of the peers")
        return str(self._peers)

    def _artifact(self, checkpoint: Path, weights: str, kv8: bool, algorithm: str | None) -> Path:
        parts = [checkpoint.name, weights, *(["kv8"] if kv8 else []), *([algorithm] if algorithm else [])]
        path = self.work / f"{'-'.join(parts)}.optc"
        if path in self._fresh or (self._keep and path.exists()):
            return path
        options = [] if weights == "bf16" else [f"--{weights}"]
        if algorithm and weights != "bf16":
            options += ["--algorithm", algorithm]
        if kv8:
            options += ["--kv-cache", "int8"]
        compiling = [sys.executable, "-m", "optc.cli", "compile", str(checkpoint), "-o", str(path), "--force"]
        self._run([*compiling, "--no-verify", "--quiet", *options])
        self._fresh.add(path)
        return path

    def _gguf(self, python: str, checkpoint: Path, weights: str) -> Path:
        path = self.work / f"{checkpoint.name}-{weights}.gguf"
        if not path.exists():
            partial = path.with_suffix(".partial")
            script = [python, str(HERE / "gguf_model.py"), str(checkpoint), str(partial), "--type", weights]
            self._run([*script, "--threads", str(self._threads)])
            partial.rename(path)
        return path

    def _ir(self, python: str, checkpoint: Path, weights: str) -> Path:
        path = self.work / f"{checkpoint.name}-{weights}-openvino"
        if not path.exists():
            partial = self._partial(path)
            tokenizer = checkpoint if (checkpoint / "tokenizer.json").exists() else TINY
            script = [python, str(HERE / "openvino_model.py"), str(checkpoint), str(partial), "--weights", weights]
            self._run([*script, "--tokenizer", str(tokenizer)])
            partial.rename(path)
        return path

    def _onnx(self, python: str, checkpoint: Path, weights: str) -> Path:
        """By ONNX Runtime GenAI's model builder, without data: symmetric codes in blocks of 32, the output layer too."""
        path = self.work / f"{checkpoint.name}-{weights}-onnx"
        if not path.exists():
            partial = self._partial(path)
            builder = [python, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(partial)]
            # Activations in 8 bits, as in llama.cpp; logits of the last token only, as every engine computes them.
            coding = [] if weights == "fp32" else ["block_size=32", "accuracy_level=4", "is_symmetric=true"]
            options = [*coding, "prune_lm_head=true", "hf_token=false"]
            self._run([*builder, "-p", weights, "-e", "cpu", "-c", str(partial), "--extra_options", *options])
            partial.rename(path)
        return path

    @staticmethod
    def _partial(path: Path) -> Path:
        """Where a folder is made until it is whole; nothing is there."""
        partial = path.with_name(f"{path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        return partial

    def _run(self, command: list[str]) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = f"{done.stdout}\n{done.stderr}".strip()
            raise MissingError(f"{' '.join(command[:5])} ... failed:\n{said[-3000:]}")
