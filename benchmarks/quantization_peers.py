"""Quantize a checkpoint with other tools, for `benchmarks/quantization.py` to measure beside optc.

Runs in the Python of the tool, whose torch and transformers differ from optc's; imports nothing of optc:

    python quantization_peers.py TOOL --model DIR --samples FILE --out DIR [--ggml LIBRARY] [--only NAME]...

TOOL is llm-compressor, gptqmodel or gguf. FILE is a safetensors file with `samples`, i64[sequences, tokens]: the
calibration sequences, the same for every tool. For each configuration this writes OUT/TOOL NAME.safetensors (the float32
weights that the codes and scales mean, by their names in the checkpoint) and OUT/TOOL NAME.json (bits per weight and
versions). Only the linear layers inside the blocks are quantized. Whenever a tool leaves GPTQ for something simpler
(round to nearest after a failed Cholesky factorisation, a mock after a NaN loss), this stops with an error.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

Weights = dict[str, Tensor]

# Bits, group size (0: one group a row), symmetric, and further options of the tool by which its GPTQ gets better.
LLM_COMPRESSOR: dict[str, tuple[int, int, bool, dict[str, Any]]] = {
    "GPTQ w4 g128": (4, 128, True, {}),
    "GPTQ w4 g128 mse": (4, 128, True, {"observer": "mse"}),
    "GPTQ w4 g128 imatrix": (4, 128, True, {"observer": "imatrix_mse"}),
    "GPTQ w4 g128 asym": (4, 128, False, {}),
    "GPTQ w4 g32": (4, 32, True, {}),
    "GPTQ w4 g32 mse": (4, 32, True, {"observer": "mse"}),
    "GPTQ w3 g128": (3, 128, True, {}),
    "GPTQ w3 g128 mse": (3, 128, True, {"observer": "mse"}),
    "GPTQ w3 g32 mse": (3, 32, True, {"observer": "mse"}),
    "GPTQ w8 channel": (8, 0, True, {}),
}
GPTQMODEL: dict[str, tuple[int, int, bool, dict[str, Any]]] = {
    "GPTQ w4 g128": (4, 128, True, {}),
    "GPTQ w4 g128 mse": (4, 128, True, {"mse": 2.4}),
    "GPTQ w4 g128 act-order": (4, 128, True, {"desc_act": True, "act_group_aware": False}),
    "GPTQ w4 g128 asym": (4, 128, False, {}),
    "GPTQ w4 g32": (4, 32, True, {}),
    "GPTQ w4 g32 mse": (4, 32, True, {"mse": 2.4}),
    "GPTQ w3 g128": (3, 128, True, {}),
    "GPTQ w3 g128 mse": (3, 128, True, {"mse": 2.4}),
    "GPTQ w3 g32": (3, 32, True, {}),
    "GPTQ w8 g32": (8, 32, True, {}),
}
GGUF = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tool", choices=["llm-compressor", "gptqmodel", "gguf"])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ggml", type=Path, help="libggml-base, which quantizes for gguf")
    parser.add_argument("--only", action="append", metavar="NAME", help="a configuration; all by default")
    args = parser.parse_args()
    samples = safetensors.torch.load_file(args.samples)["samples"]
    args.out.mkdir(parents=True, exist_ok=True)
    match args.tool:
        case "llm-compressor":
            results = llm_compressor(args.model, samples, args.only)
        case "gptqmodel":
            results = gptqmodel(args.model, samples, args.only)
        case _:
            results = gguf(args.model, samples, args.ggml, args.only)
    for name, weights, bits, packages in results:
        stem = f"{args.tool} {name}"
        safetensors.torch.save_file(
            {key: value.float().contiguous() for key, value in weights.items()}, args.out / f"{stem}.safetensors"
        )
        versions = {package: version(package) for package in (*packages, "torch", "transformers")}
        record = {"tool": args.tool, "name": name, "bits_per_weight": bits, "versions": versions}
        (args.out / f"{stem}.json").write_text(json.dumps(record, indent=1))
        print(f"wrote {stem}: {bits:.4f} bits per weight", flush=True)


Result = Iterator[tuple[str, Weights, float, tuple[str, ...]]]


def llm_compressor(model_path: Path, samples: Tensor, only: list[str] | None) -> Result:
    """GPTQ of llm-compressor; its act-order is "static" unless it is told otherwise."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from loguru import logger
    from transformers import AutoModelForCausalLM

    complaints: list[str] = []
    logger.remove()
    logger.add(lambda message: complaints.append(str(message)), level="WARNING")
    data = Dataset.from_dict({"input_ids": samples.tolist(), "attention_mask": torch.ones_like(samples).tolist()})
    for name, (bits, group, symmetric, options) in LLM_COMPRESSOR.items():
        if only and name not in only:
            continue
        args = QuantizationArgs(
            num_bits=bits,
            symmetric=symmetric,
            strategy="group" if group else "channel",
            group_size=group or None,
            **options,
        )
        # Calibrated in float32, which is best for the tool; its scales are then cut to the 16 bits that are counted.
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
        oneshot(
            model=model,
            dataset=data,
            recipe=recipe,
            num_calibration_samples=len(samples),
            max_seq_length=samples.shape[1],
            shuffle_calibration_samples=False,
            batch_size=8,
        )
        fallbacks = [line for line in complaints if "RTN" in line or "rtn" in line or "fallback" in line.lower()]
        if fallbacks:
            raise RuntimeError(f"{name}: llm-compressor left GPTQ: {fallbacks[0]}")
        weights, sizes = {}, 0.0
        for layer, module in model.named_modules():
            if getattr(module, "quantization_scheme", None) is None:
                continue
            weight, scale = module.weight.detach().float(), module.weight_scale.detach()
            zero = getattr(module, "weight_zero_point", None)
            wide = scale.float().repeat_interleave(weight.shape[1] // scale.shape[1], 1)
            codes = (weight / wide).round()
            if not torch.allclose(codes * wide, weight, rtol=1e-5, atol=1e-7):
                raise RuntimeError(f"{name}: {layer} does not hold codes times scales")
            weights[f"{layer}.weight"] = codes * wide.half().float()
            sizes += bits * weight.numel() + 16 * scale.numel() + (0 if symmetric else bits * zero.numel())
        yield name, weights, sizes / sum(w.numel() for w in weights.values()), ("llmcompressor", "compressed-tensors")


def gptqmodel(model_path: Path, samples: Tensor, only: list[str] | None) -> Result:
    """GPTQ of GPTQModel; its default order of columns is "group aware"."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # one, its choice for two cores, is fewer than it then needs
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in samples.tolist()]
    for name, (bits, group, symmetric, options) in GPTQMODEL.items():
        if only and name not in only:
            continue
        # Without its fallback, a NaN loss is an error instead of a second try with mock quantization.
        config = QuantizeConfig(bits=bits, group_size=group, sym=symmetric, fallback=None, **options)
        model = GPTQModel.load(str(model_path), config, device="cpu")
        model.quantize(data, batch_size=1, backend=BACKEND.AUTO)
        with tempfile.TemporaryDirectory() as folder:
            model.save(folder)
            tensors: Weights = {}
            for file in Path(folder).glob("*.safetensors"):
                tensors |= safetensors.torch.load_file(file)
            written = json.loads((Path(folder) / "quantize_config.json").read_text())
        if written["meta"].get("mock_quantization"):
            raise RuntimeError(f"{name}: GPTQModel left GPTQ for mock quantization")
        offset = 1 if written["checkpoint_format"] == "gptq" else 0  # version 1 stores the zero point less one
        weights, sizes = {}, 0.0
        for key in [key for key in tensors if key.endswith(".qweight")]:
            layer = key.removesuffix(".qweight")
            codes = _unpack(tensors[key].T, bits).T  # [K, N]
            zeros = _unpack(tensors[f"{layer}.qzeros"], bits) + offset  # [G, N]
            index = tensors[f"{layer}.g_idx"].long()
            scales = tensors[f"{layer}.scales"]
            weights[f"{layer}.weight"] = ((codes - zeros[index]) * scales.float()[index]).T
            if scales.dtype.itemsize != 2:
                raise RuntimeError(f"{name}: {layer} has scales in {scales.dtype}")
            # Zero points of a symmetric scheme are one constant, and an index per column is not counted either.
            sizes += bits * codes.numel() + 16 * scales.numel() + (0 if symmetric else bits * zeros.numel())
        yield name, weights, sizes / sum(w.numel() for w in weights.values()), ("gptqmodel",)


def _unpack(words: Tensor, bits: int) -> Tensor:
    """int32[R, words] -> the unsigned integers of `bits` bits that lie in them, low bits first, across words: f32[R, n]."""
    raw = np.ascontiguousarray(words.numpy()).view(np.uint8)
    flat = np.unpackbits(raw, axis=1, bitorder="little")
    values = flat.reshape(len(raw), -1, bits) @ (1 << np.arange(bits))
    return torch.from_numpy(values).float()


def gguf(model_path: Path, samples: Tensor, library: Path | None, only: list[str] | None) -> Result:
    """The formats of ggml: its own quantizer, and the gguf package to read the result.

    Each format also with an importance matrix (mean square of each input over the calibration sequences), which
    llama.cpp offers as an option.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    if library is None:
        sys.exit("gguf needs --ggml LIBRARY (libggml-base of llama.cpp)")
    ggml = ctypes.CDLL(str(library))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    originals, importance = _weights_and_importance(model_path, samples)
    for type_name in GGUF:
        kind = GGMLQuantizationType[type_name]
        block, size = GGML_QUANT_SIZES[kind]
        for name in (type_name, f"{type_name} imatrix"):
            if only and name not in only:
                continue
            weights = {}
            for key, original in originals.items():
                rows, columns = original.shape
                source = np.ascontiguousarray(original.numpy(), dtype=np.float32)
                out = np.zeros((rows, columns // block * size), dtype=np.uint8)
                weigh = np.ascontiguousarray(importance[key].numpy(), dtype=np.float32)
                written = ggml.ggml_quantize_chunk(
                    int(kind),
                    source.ctypes.data,
                    out.ctypes.data,
                    0,
                    rows,
                    columns,
                    weigh.ctypes.data if name != type_name else None,
                )
                if written != out.nbytes:
                    raise RuntimeError(f"{name}: {key} took {written} bytes, expected {out.nbytes}")
                weights[key] = torch.from_numpy(dequantize(out, kind).reshape(rows, columns).copy())
            yield name, weights, 8 * size / block, ("gguf",)


def _weights_and_importance(model_path: Path, samples: Tensor) -> tuple[Weights, Weights]:
    """Weights f32[N, K] of the linear layers in the blocks, and the mean square of each of their K inputs."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    linears = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    sums = {key: torch.zeros(linear.in_features, dtype=torch.float64) for key, linear in linears.items()}

    def adding(key: str) -> Any:
        def add(_module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sums[key] += inputs[0].double().square().flatten(0, -2).sum(0)

        return add

    for key, linear in linears.items():
        linear.register_forward_pre_hook(adding(key))
    with torch.no_grad():
        for row in samples:
            model(row[None])
    return {key: linear.weight.detach() for key, linear in linears.items()}, {
        key: (value / samples.numel()).float() for key, value in sums.items()
    }


if __name__ == "__main__":
    main()
