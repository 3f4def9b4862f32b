"""A Llama checkpoint as a GGUF file, for llama.cpp. Runs in the environment of the peers; imports nothing of optc.

    python gguf_model.py CHECKPOINT OUT.gguf --type BF16|F16|Q4_0|Q8_0

The tensors' types are those that `llama-quantize` chooses: its C function does the quantizing.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
from pathlib import Path

import gguf
import numpy as np
import safetensors.torch
import torch
from torch import Tensor

# `enum llama_ftype`
FILE_TYPES = {"Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15}
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write(checkpoint: Path, output: Path, kind: str) -> None:
    """Write the checkpoint in 16 bits (BF16 or F16; norms in float32), without a tokenizer."""
    config = json.loads((checkpoint / "config.json").read_text())
    if config["model_type"] != "llama" or config.get("attention_bias") or config.get("mlp_bias"):
        raise SystemExit(f"{checkpoint}: only Llama models without biases")
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default" or config.get("rope_scaling"):
        raise SystemExit(f"{checkpoint}: only plain RoPE")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(str(output), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope.get("rope_theta") or config.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if kind == "BF16" else gguf.LlamaFileType.MOSTLY_F16)
    for file in sorted(checkpoint.glob("*.safetensors")):
        for name, value in safetensors.torch.load_file(file).items():
            if name == "lm_head.weight" and config["tie_word_embeddings"]:
                continue
            if ".q_proj." in name:
                value = interleaved(value, heads)
            elif ".k_proj." in name:
                value = interleaved(value, kv_heads)
            add(writer, gguf_name(name), value, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in whole:
        return f"{whole[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.weight"


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows [heads * d, K] in the order of llama.cpp, which rotates neighbours, not halves."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def add(writer: gguf.GGUFWriter, name: str, value: Tensor, kind: str) -> None:
    if value.ndim == 1:
        writer.add_tensor(name, value.float().numpy())
    elif kind == "F16":
        writer.add_tensor(name, value.half().numpy())
    else:
        raw = value.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, raw, raw_shape=raw.shape, raw_dtype=gguf.GGMLQuantizationType.BF16)


def quantize(source: Path, output: Path, kind: str, threads: int) -> None:
    """What `llama-quantize SOURCE OUTPUT KIND` does."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[kind]
    params.nthread = threads
    if failed := llama_cpp.llama_model_quantize(str(source).encode(), str(output).encode(), ctypes.byref(params)):
        raise SystemExit(f"llama_model_quantize: {failed}")


def read_bytes(file: Path) -> tuple[int, dict[str, str]]:
    """Bytes of the weights that a decode step reads, and the types of a block's, the output's and the embedding's."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    tied = "output.weight" not in tensors
    read = [tensor for name, tensor in tensors.items() if tied or name != "token_embd.weight"]
    blocks: dict[str, int] = {}
    for name, tensor in tensors.items():
        if name.startswith("blk.") and len(tensor.shape) > 1:
            blocks[tensor.tensor_type.name] = blocks.get(tensor.tensor_type.name, 0) + 1
    output = tensors["token_embd.weight" if tied else "output.weight"].tensor_type.name
    kinds = {"blocks": ", ".join(f"{count} {kind}" for kind, count in blocks.items()), "output": output}
    return int(np.sum([tensor.n_bytes for tensor in read])), kinds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--type", choices=["BF16", "F16", *FILE_TYPES], required=True)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.type not in FILE_TYPES:
        write(args.checkpoint, args.output, args.type)
        return
    with tempfile.TemporaryDirectory(dir=args.output.parent) as folder:
        whole = Path(folder) / "whole.gguf"
        write(args.checkpoint, whole, "BF16")
        quantize(whole, args.output, args.type, args.threads)


if __name__ == "__main__":
    main()
