"""Workers of `benchmarks/cpu.py` that run in the environment of the peers: llama.cpp and OpenVINO GenAI.

python cpu_peers.py llama.cpp MODEL.gguf [--kv q8_0]
python cpu_peers.py openvino FOLDER
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from cpu_worker import Engine, serve

CAPACITY = 2048  # tokens of a batch
THREADS = int(os.environ.get("BENCH_THREADS", "2"))


class LlamaCpp:
    """llama.cpp through its C interface, greedy; batch sizes, flash attention and repacking are its defaults."""

    def __init__(self, path: Path, kv_type: str) -> None:
        import llama_cpp

        self._api = llama_cpp
        self._path, self._kv_type = path, kv_type
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise RuntimeError(f"{path}: llama.cpp cannot load it")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._context: Any = None
        self._shape = (0, 0, 0)
        self._batch = self._make_batch()
        self._next = np.zeros(0, np.int64)
        self._position = 0

    def details(self) -> dict[str, Any]:
        from gguf_model import read_bytes

        weight_bytes, kinds = read_bytes(self._path)
        api = self._api
        head_dim = api.llama_model_n_embd(self._model) // api.llama_model_n_head(self._model)
        elements = 2 * api.llama_model_n_layer(self._model) * api.llama_model_n_head_kv(self._model) * head_dim
        return {
            "versions": {"llama-cpp-python": version("llama-cpp-python")},
            "weight_bytes": weight_bytes,
            "kv_bytes": elements * 34 // 32 if self._kv_type == "q8_0" else elements * 2,
            "notes": {
                "weights": kinds["blocks"],
                "output": kinds["output"],
                "KV cache": self._kv_type,
                "system": api.llama_print_system_info().decode().strip(),
            },
        }

    def start(self, prompts: np.ndarray, room: int) -> None:
        batch, length = prompts.shape
        self._open(batch, length + room)
        for row, prompt in enumerate(prompts):
            self._prefill(prompt, row)
            self._next[row] = self._argmax(-1)
        self._position = length

    def step(self) -> None:
        batch = len(self._next)
        self._decode(self._next, np.full(batch, self._position), np.arange(batch), np.ones(batch))
        self._position += 1
        for row in range(batch):
            self._next[row] = self._argmax(row)

    def stop(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), False)

    def prefill(self, prompt: np.ndarray) -> None:
        self._open(1, len(prompt))
        self._prefill(prompt, 0)
        self._argmax(-1)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        self._open(1, len(tokens), outputs=len(tokens))
        self._decode(tokens, np.arange(len(tokens)), np.zeros(len(tokens)), np.ones(len(tokens)))
        return np.stack([self._row(row).copy() for row in range(len(tokens))])

    def _open(self, batch: int, length: int, outputs: int = 1) -> None:
        """A context for so many sequences of so many tokens, empty."""
        api = self._api
        length = -(-length // 256) * 256
        if self._shape != (batch, length, outputs):
            if self._context:
                api.llama_free(self._context)
            params = api.llama_context_default_params()
            params.n_ctx, params.n_seq_max = batch * length, batch
            params.n_threads = params.n_threads_batch = THREADS
            params.n_outputs_max_per_seq = outputs
            if self._kv_type == "q8_0":
                params.type_k = params.type_v = api.GGML_TYPE_Q8_0
            self._context = api.llama_init_from_model(self._model, params)
            if not self._context:
                raise RuntimeError(f"no context of {batch} x {length} tokens")
            self._shape = (batch, length, outputs)
            self._limit = params.n_batch
        api.llama_memory_clear(api.llama_get_memory(self._context), False)
        self._next = np.zeros(batch, np.int64)

    def _prefill(self, prompt: np.ndarray, row: int) -> None:
        for start in range(0, len(prompt), self._limit):
            chunk = prompt[start : start + self._limit]
            positions = start + np.arange(len(chunk))
            self._decode(chunk, positions, np.full(len(chunk), row), positions == len(prompt) - 1)

    def _decode(self, tokens: np.ndarray, positions: np.ndarray, rows: np.ndarray, wanted: np.ndarray) -> None:
        """Run tokens at positions of the sequences `rows`, and compute the logits of those that are wanted."""
        count, arrays = len(tokens), self._arrays
        for name, values in (("token", tokens), ("pos", positions), ("row", rows), ("logits", wanted)):
            arrays[name][:count] = values
        self._batch.n_tokens = count
        if failed := self._api.llama_decode(self._context, self._batch):
            raise RuntimeError(f"llama_decode: {failed}")

    def _make_batch(self) -> Any:
        """A `llama_batch` over numpy arrays, each token of one sequence."""
        api = self._api
        size = CAPACITY
        self._arrays = {name: np.zeros(size, np.int32) for name in ("token", "pos", "row")}
        self._arrays |= {"count": np.ones(size, np.int32), "logits": np.zeros(size, np.int8)}
        address = self._arrays["row"].ctypes.data
        self._arrays["rows"] = address + 4 * np.arange(size, dtype=np.uint64)
        batch = api.llama_batch()
        fields = {"token": "token", "pos": "pos", "n_seq_id": "count", "seq_id": "rows", "logits": "logits"}
        kinds = dict(api.llama_batch._fields_)
        for field, name in fields.items():
            setattr(batch, field, ctypes.cast(self._arrays[name].ctypes.data, kinds[field]))
        return batch

    def _row(self, row: int) -> np.ndarray:
        logits = self._api.llama_get_logits_ith(self._context, row)
        return np.ctypeslib.as_array(logits, shape=(self._vocab_size,))

    def _argmax(self, row: int) -> int:
        return int(self._row(row).argmax())


class OpenVino:
    """OpenVINO GenAI's continuous batching, step by step, greedy; as its `LLMPipeline` sets it up for low latency."""

    def __init__(self, path: Path) -> None:
        import openvino
        import openvino_genai

        self._openvino, self._genai, self._path = openvino, openvino_genai, path
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = 2**31 - 1
        scheduler.max_num_seqs = 256
        scheduler.enable_prefix_caching = False  # prompts never repeat
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            path, scheduler, "CPU", {"INFERENCE_NUM_THREADS": THREADS}
        )
        self._handles: list[Any] = []
        self._count = 0
        self._infer: Any = None

    def details(self) -> dict[str, Any]:
        model = self._openvino.Core().read_model(self._path / "openvino_model.xml")
        constants = [op for op in model.get_ops() if op.get_type_name() == "Constant"]
        tied = not any("lm_head" in op.get_friendly_name() for op in constants)
        read = [op for op in constants if tied or "embed_tokens" not in op.get_friendly_name()]
        types: dict[str, int] = {}
        for op in read:
            kind = op.get_element_type().get_type_name()
            if op.get_byte_size() > 2**16:
                types[kind] = types.get(kind, 0) + op.get_byte_size()
        compiled = self._openvino.Core().compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": THREADS})
        wanted = ("KV_CACHE_PRECISION", "INFERENCE_PRECISION_HINT", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
        properties = {name: str(compiled.get_property(name)) for name in wanted}
        return {
            "versions": {name: version(name) for name in ("openvino", "openvino-genai", "optimum-intel", "nncf")},
            "weight_bytes": sum(op.get_byte_size() for op in read),
            "kv_bytes": self._kv_bytes(properties["KV_CACHE_PRECISION"]),
            "notes": {"weights": ", ".join(f"{size / 1e6:.0f} MB {kind}" for kind, size in types.items())} | properties,
        }

    def _kv_bytes(self, precision: str) -> int:
        config = json.loads((self._path / "config.json").read_text())
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        elements: int = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim
        return elements * (1 if "8" in precision else 2)

    def start(self, prompts: np.ndarray, room: int) -> None:
        for prompt in prompts:
            self._add(prompt, room)
        self._pipeline.step()

    def step(self) -> None:
        self._pipeline.step()

    def stop(self) -> None:
        for handle in self._handles:
            handle.stop()
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        self._handles = []

    def prefill(self, prompt: np.ndarray) -> None:
        self._add(prompt, 1)
        self._pipeline.step()
        self._handles = []

    def _add(self, prompt: np.ndarray, room: int) -> None:
        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.min_new_tokens = room, room
        config.ignore_eos, config.do_sample = True, False
        ids = self._openvino.Tensor(prompt[None].astype(np.int64))
        self._handles.append(self._pipeline.add_request(self._count, ids, config))
        self._count += 1

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """By the same model with its stateful attention, which gives logits of every token."""
        if self._infer is None:
            core = self._openvino.Core()
            options = {"INFERENCE_NUM_THREADS": THREADS}
            self._infer = core.compile_model(self._path / "openvino_model.xml", "CPU", options).create_infer_request()
        self._infer.reset_state()
        length = len(tokens)
        inputs = {
            "input_ids": tokens[None],
            "attention_mask": np.ones((1, length), np.int64),
            "position_ids": np.arange(length)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        found: np.ndarray = self._infer.infer(inputs)["logits"][0]
        if len(found) != length:
            raise RuntimeError("this model gives logits of the last token only")
        return found.copy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("engine", choices=["llama.cpp", "openvino"])
    parser.add_argument("path", type=Path)
    parser.add_argument("--kv", choices=["f16", "q8_0"], default="f16")
    args = parser.parse_args()
    engine: Engine = LlamaCpp(args.path, args.kv) if args.engine == "llama.cpp" else OpenVino(args.path)
    serve(engine)


if __name__ == "__main__":
    main()
