"""Worker of `benchmarks/cpu.py` that runs in the environment of the peers: ONNX Runtime GenAI.

python cpu_peers_onnx.py FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from cpu_worker import serve

THREADS = int(os.environ.get("BENCH_THREADS", "2"))
# Operators that read all of their weights; others, such as the embedding's Gather and the tables of RoPE, read rows.
READERS = ("MatMul", "MatMulNBits", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")


class OnnxRuntime:
    """ONNX Runtime GenAI's generator, greedy, one for each batch; its options are the defaults but for the threads."""

    def __init__(self, path: Path) -> None:
        import onnxruntime_genai

        self._genai, self._path = onnxruntime_genai, path
        config = onnxruntime_genai.Config(str(path))
        threads = {"intra_op_num_threads": THREADS}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
        self._model = onnxruntime_genai.Model(config)
        self._generator: Any = None

    def details(self) -> dict[str, Any]:
        import onnx

        graph = onnx.load(self._path / "model.onnx", load_external_data=False).graph
        used = {name for node in graph.node if node.op_type in READERS for name in node.input}
        types: Counter[str] = Counter()
        for tensor in graph.initializer:
            if tensor.name in used:
                kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
                types[kind.name] += int(np.prod(tensor.dims)) * kind.itemsize
        cache = next(value for value in graph.input if value.name.startswith("past_key_values"))
        cache_type = onnx.helper.tensor_dtype_to_np_dtype(cache.type.tensor_type.elem_type)
        decoder = json.loads((self._path / "genai_config.json").read_text())["model"]["decoder"]
        elements = 2 * decoder["num_hidden_layers"] * decoder["num_key_value_heads"] * decoder["head_size"]
        return {
            "versions": {name: version(name) for name in ("onnxruntime-genai", "onnxruntime")},
            "weight_bytes": types.total(),
            "kv_bytes": elements * cache_type.itemsize,
            "notes": {
                "weights": ", ".join(f"{size / 1e6:.0f} MB {kind}" for kind, size in types.items()),
                "linear layers": ", ".join(f"{count} {kind}" for kind, count in _linears(graph).items()),
                "KV cache": cache_type.name,
            },
        }

    def start(self, prompts: np.ndarray, room: int) -> None:
        self._generator = self._open(len(prompts), prompts.shape[1] + room)
        self._generator.append_tokens(prompts.astype(np.int32))
        self._generator.generate_next_token()  # chosen by the prompt's logits; every later one runs the model first

    def step(self) -> None:
        self._generator.generate_next_token()

    def stop(self) -> None:
        self._generator = None

    def prefill(self, prompt: np.ndarray) -> None:
        self.start(prompt[None], 1)
        self.stop()

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Token by token, as in decode: the model computes the last position's logits only, so that prefill is fast."""
        generator = self._open(1, len(tokens) + 1)
        rows = []
        for token in tokens.astype(np.int32):
            generator.append_tokens(token[None, None])
            rows.append(generator.get_logits()[0, -1].copy())
        return np.stack(rows)

    def _open(self, batch: int, length: int) -> Any:
        """A generator for sequences of just so many tokens: no sequence ends earlier, at an end token."""
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(batch_size=batch, max_length=length, min_length=length, do_sample=False)
        return self._genai.Generator(self._model, params)


def _linears(graph: Any) -> Counter[str]:
    """How many linear layers of each form, such as `MatMulNBits bits=4 block_size=32 accuracy_level=4`, a graph has."""
    found: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type.startswith("MatMul"):
            values = {attribute.name: attribute.i for attribute in node.attribute}
            wanted = [name for name in ("bits", "block_size", "accuracy_level") if name in values]
            found[" ".join([node.op_type, *(f"{name}={values[name]}" for name in wanted)])] += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path", type=Path)
    serve(OnnxRuntime(parser.parse_args().path))


if __name__ == "__main__":
    main()
