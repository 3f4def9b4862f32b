"""Workers of `benchmarks/cpu.py` that run in optc's environment: optc itself, and transformers.

python cpu_optc.py optc ARTIFACT
python cpu_optc.py eager|compiled|float32 CHECKPOINT
"""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from cpu_worker import Engine, serve


class Optc:
    """An artifact through `LLM`, step by step as its `generate` does."""

    def __init__(self, path: Path) -> None:
        import torch

        from optc.runtime import LLM

        self._torch = torch
        self._llm = LLM(path, prefix_caching=False)  # a measurement that is made again has the same prompt
        self._engine = self._llm.engine
        self._requests: list[Any] = []
        self._model_seconds = 0.0
        self._scorer: Any = None
        run = self._engine.executor.run

        def timed(inputs: Any) -> Any:
            started = time.perf_counter()
            found = run(inputs)
            self._model_seconds += time.perf_counter() - started
            return found

        self._engine.executor.run = timed  # type: ignore[method-assign]

    def details(self) -> dict[str, Any]:
        import optc

        manifest = self._llm.manifest
        quantization = manifest.quantization
        layers = quantization.layers if quantization else ()
        kinds = {f"{layer.scheme} {layer.algorithm}" for layer in layers}
        head = next((layer.scheme for layer in layers if layer.role == "lm_head"), manifest.model.dtype)
        return {
            "versions": {"optc": f"{optc.__version__} at {_commit(optc.__file__)}", "torch": self._torch.__version__},
            "weight_bytes": self._weight_bytes(),
            "kv_bytes": manifest.memory.kv_bytes_per_token,
            "notes": {
                "weights": ", ".join(sorted(kinds)) or manifest.model.dtype,
                "output": head,
                "KV cache": manifest.kv_cache[0].dtype,
                "native": self._engine.executor.is_native,
            },
        }

    def _weight_bytes(self) -> int:
        """Of the constants that a step reads; of an embedding it reads only rows, unless it is the output as well."""
        constants = self._llm.manifest.constants.values()
        embeddings = [c for c in constants if "embed" in c.source and c.layout == "plain"]
        has_head = any("lm_head" in c.source or ("embed" in c.source and c.layout != "plain") for c in constants)
        skipped = {id(c) for c in embeddings} if has_head else set()
        return sum(
            math.prod(c.shape) * getattr(self._torch, c.dtype).itemsize for c in constants if id(c) not in skipped
        )

    def start(self, prompts: np.ndarray, room: int) -> None:
        from optc import SamplingParams

        # Sequences whose prompt is done go on while the others' prompts run, a token a step.
        waiting = -(-prompts.size // self._engine.scheduler.max_num_batched_tokens) + 1 if len(prompts) > 1 else 0
        params = SamplingParams(max_tokens=room + 2 * waiting, ignore_eos=True)
        self._requests = [self._engine.add(prompt.tolist(), params) for prompt in prompts]
        while any(request.num_output_tokens == 0 for request in self._requests):
            self._engine.step()

    def step(self) -> float:
        self._model_seconds = 0.0
        advanced = self._engine.step()
        if len(advanced) != len(self._requests):
            raise RuntimeError(f"{len(advanced)} of {len(self._requests)} sequences went on: the KV cache is too small")
        return self._model_seconds

    def stop(self) -> None:
        self._engine.abort(self._requests)
        self._requests = []

    def prefill(self, prompt: np.ndarray) -> None:
        self.start(prompt[None], room=1)
        self.stop()

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        from optc.runtime.scorer import Scorer

        if self._scorer is None:
            self._scorer = Scorer(self._llm.artifact, max_length=1024)
        found: np.ndarray = self._scorer(self._torch.from_numpy(tokens)).numpy()
        return found


class Transformers:
    """The model's own forward over a KV cache, greedy; `compiled` decodes by torch.compile over a static cache."""

    def __init__(self, path: Path, kind: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        torch.set_grad_enabled(False)
        dtype = torch.float32 if kind == "float32" else torch.bfloat16
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        self._compiled = kind == "compiled"
        self._forward = torch.compile(self._model.forward) if self._compiled else self._model.forward
        self._cache_argument = (
            "cache" if "cache" in inspect.signature(type(self._model).forward).parameters else "past_key_values"
        )
        self._cache: Any = None
        self._next: Any = None

    def details(self) -> dict[str, Any]:
        import transformers

        config, model = self._model.config, self._model
        skipped = set() if config.tie_word_embeddings else {id(model.get_input_embeddings().weight)}
        read = sum(value.nbytes for value in model.parameters() if id(value) not in skipped)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * model.dtype.itemsize
        return {
            "versions": {"transformers": transformers.__version__, "torch": self._torch.__version__},
            "weight_bytes": read,
            "kv_bytes": per_token,
            "notes": {"weights": str(model.dtype).removeprefix("torch."), "output": str(model.lm_head.weight.dtype)},
        }

    def start(self, prompts: np.ndarray, room: int) -> None:
        from transformers import DynamicCache, StaticCache

        config = self._model.config
        length = prompts.shape[1] + room
        self._cache = (
            StaticCache(config=config, max_cache_len=length) if self._compiled else DynamicCache(config=config)
        )
        self._next = self._run(self._model.forward, self._torch.from_numpy(prompts))

    def step(self) -> None:
        self._next = self._run(self._forward, self._next)

    def _run(self, forward: Any, ids: Any) -> Any:
        options = {self._cache_argument: self._cache}
        logits = forward(input_ids=ids, use_cache=True, logits_to_keep=1, **options).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    def stop(self) -> None:
        self._cache = self._next = None

    def prefill(self, prompt: np.ndarray) -> None:
        """Without a KV cache, which is faster; compiled as a whole."""
        ids = self._torch.from_numpy(prompt)[None]
        self._forward(input_ids=ids, use_cache=False, logits_to_keep=1).logits.argmax(-1)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        ids = self._torch.from_numpy(tokens)[None]
        found: np.ndarray = self._model(input_ids=ids, use_cache=False).logits[0].float().numpy()
        return found


def _commit(file: str | None) -> str:
    """The commit of the checkout that a file is in."""
    assert file is not None
    command = ["git", "-C", str(Path(file).resolve().parent), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "an unknown commit"


def main() -> None:
    kind, path = sys.argv[1], Path(sys.argv[2])
    engine: Engine = Optc(path) if kind == "optc" else Transformers(path, kind)
    serve(engine)


if __name__ == "__main__":
    main()
