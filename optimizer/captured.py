"""A model as a graph, from a checkpoint or from a module, with what the manifest says about it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from ..errors import UsageError
from ..passes.graph import Program, value_of
from ..passes.quantize.given import GivenWeight
from ..runtime.manifest import ModelRecord
from .capture import capture, capture_module, first_line
from .checkpoint import Checkpoint, load_checkpoint
from .config import CompileConfig
from .progress import Progress
from .quantization import given_weights


@dataclass(frozen=True)
class Captured:
    """A model as a graph, with what the manifest says about it."""

    program: Program
    record: ModelRecord
    checkpoint: Checkpoint | None
    given: Mapping[str, GivenWeight] = field(default_factory=dict)


def capture_checkpoint(config: CompileConfig, progress: Progress) -> Captured:
    with progress.stage("load checkpoint"):
        checkpoint = load_checkpoint(
            config.source,
            dtype=config.dtype,
            adapter=config.adapter,
            max_model_len=config.max_model_len,
            is_quantizing=config.recipe is not None and bool(config.recipe.scheme_names()),
        )
    with progress.stage("capture"):
        program, notes = capture(checkpoint.model, checkpoint.max_model_len)
    given: Mapping[str, GivenWeight] = {}
    if checkpoint.quantized is not None:
        given, found = given_weights(checkpoint.quantized, config.target, config.recipe)
        notes += found
    record = ModelRecord(
        source=checkpoint.source,
        source_sha256=checkpoint.sha256,
        model_type=checkpoint.config.model_type,
        architecture=type(checkpoint.model).__name__,
        adapter=checkpoint.adapter,
        parameters=sum(p.numel() for p in checkpoint.model.parameters()),
        dtype=str(checkpoint.model.dtype).removeprefix("torch."),
        vocab_size=_vocab_size(program),
        max_model_len=checkpoint.max_model_len,
        notes=tuple(checkpoint.notes + notes),
    )
    return Captured(program, record, checkpoint, given)


def capture_plain_module(
    module: nn.Module, example_inputs: tuple[Tensor, Tensor] | None, config: CompileConfig, progress: Progress
) -> Captured:
    if example_inputs is None:
        raise UsageError("compiling a module needs example_inputs=(input_ids, positions), each i64[1, T] with T >= 2")
    if config.adapter is not None or config.dtype != "auto":
        raise UsageError("adapter and dtype are for checkpoints; change the module itself")
    if config.evaluate is not None:
        raise UsageError("evaluate is for checkpoints with a tokenizer; a module has none")
    limit = 2048 if config.max_model_len is None else config.max_model_len
    if limit < 2:
        raise UsageError(f"max_model_len {limit}: expected at least 2")
    with progress.stage("capture"):
        program = capture_module(module, example_inputs, limit)
        _check_last_position(module, example_inputs, limit)
    record = ModelRecord(
        source=config.source,
        source_sha256=_hash_weights(module),
        model_type="module",
        architecture=type(module).__name__,
        adapter=None,
        parameters=_module_size(module, program),
        dtype=str(_module_dtype(module, program)).removeprefix("torch."),
        vocab_size=_vocab_size(program),
        max_model_len=limit,
        notes=(),
    )
    return Captured(program, record, None)


def _check_last_position(module: nn.Module, example_inputs: tuple[Tensor, Tensor], limit: int) -> None:
    """Run the module on two tokens at the last positions: a table of positions that is too small fails here, not later."""
    ids, positions = example_inputs
    try:
        with torch.no_grad():
            module(ids[:, :2], torch.tensor([[limit - 2, limit - 1]], dtype=positions.dtype, device=positions.device))
    except Exception as error:
        raise UsageError(
            f"max_model_len {limit}: {type(module).__name__} fails at position {limit - 1}: {first_line(error)}; give the "
            "max_model_len that it has positions for"
        ) from error


def _module_size(module: nn.Module, program: Program) -> int:
    """How many parameters; of a module that keeps its weights elsewhere, how many numbers its program holds (or 1)."""
    count = sum(p.numel() for p in module.parameters())
    return count or sum(weight.numel() for weight in program.weights().values()) or 1


def _module_dtype(module: nn.Module, program: Program) -> torch.dtype:
    """Of the first floating parameter or buffer; of the logits if there is none."""
    kept = [tensor.dtype for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()]
    return kept[0] if kept else value_of(_logits(program)).dtype


def _logits(program: Program) -> fx.Node:
    logits = program.graph.output_node().args[0][0]  # type: ignore[index]
    assert isinstance(logits, fx.Node)
    return logits


def _vocab_size(program: Program) -> int:
    return int(value_of(_logits(program)).shape[-1])


def _hash_weights(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        # Flat first: a tensor without dimensions cannot be viewed as bytes.
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
