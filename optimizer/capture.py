"""Capture: a Hugging Face model (or a plain module) becomes a graph with one attention node for each layer.

The only place, with `checkpoint.py` and `intercept.py`, that knows transformers. While a model is captured,

- the attention implementation `optc` turns every attention layer that goes through transformers' interface into one
  `optc::attention` node, and modelling files that call `scaled_dot_product_attention` themselves are intercepted there;
- masks are described, not built: the mask function returns a `MaskSpec`, found out by asking the model's own mask
  predicate about sample positions. A mask that is neither causal nor a causal sliding window is refused;
- RoPE whose frequencies transformers picks by the length of the data (dynamic, longrope) is decided by `max_model_len`.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, fx, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..errors import UnsupportedModelError
from ..passes.graph import Program, get_weight, input_node, propagate
from ..runtime.manifest import TensorSpec
from .intercept import IMPLEMENTATION, MaskSpec, Recorder, intercepted
from .token_flow import check_token_flow

_EXAMPLE_TOKENS = 7
_private_export: Any = importlib.import_module("torch.export._trace")


class _Forward(nn.Module):
    """The model as a function of (input_ids [1, T], positions [1, T]) -> logits [1, T, V]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        output = self.model(input_ids=input_ids, position_ids=positions, use_cache=False, return_dict=True)
        logits: Tensor = output.logits
        return logits


def capture(model: PreTrainedModel, max_model_len: int) -> tuple[Program, list[str]]:
    """Capture a causal language model.

    Args:
        model: in evaluation mode, weights loaded; its RoPE modules are changed where the length decides them.
        max_model_len: largest number of tokens a sequence may have.

    Returns:
        The program over `input_ids` i64[1, T] and `positions` i64[1, T] with logits [1, T, V], and the decisions taken.

    Raises:
        UnsupportedModelError: the model cannot be captured; names the module that is in the way.
    """
    notes = decide_rope(model, max_model_len)
    recorder = Recorder(max_model_len)
    _check_positions(model, max_model_len)
    with _interceptable(model, recorder):
        exported = _export(model, recorder)
    _check_layers(model, recorder, _attention_nodes(exported))
    program = _to_program(exported, max_model_len)
    if not input_node(program, "positions").users:
        raise UnsupportedModelError(_no_positions(model))
    check_token_flow(program, _who(model))
    _check_windows(model, program, max_model_len)
    if not model._can_set_attn_implementation():
        notes.append(
            f"{type(model).__name__} bypasses transformers' attention interface; captured at scaled_dot_product_attention"
        )
    return program, notes


def rehearse(model: PreTrainedModel, max_model_len: int) -> None:
    """Run a model without weights (on the meta device), to refuse before they are loaded what capture would refuse.

    Raises:
        UnsupportedModelError: as `capture`.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError(_no_positions(model))
    tokens = torch.zeros(1, min(_EXAMPLE_TOKENS, max_model_len), dtype=torch.long, device="meta")
    recorder = Recorder(max_model_len)
    try:
        with torch.no_grad(), _quiet(), _interceptable(model, recorder):
            _Forward(model.eval())(tokens, tokens)
    except UnsupportedModelError:
        raise
    except Exception as error:
        if _computes_with_mask(error):
            raise _cannot_capture(model, recorder, error) from error
        return  # meta tensors have no values; whether the model needs them is for capture to find out
    _check_layers(model, recorder, len(recorder.called))


def _check_positions(model: PreTrainedModel, max_model_len: int) -> None:
    """Refuse models that by themselves number tokens otherwise than 0, 1, 2, ..., as RoBERTa does, or hide some of them."""
    length = min(_EXAMPLE_TOKENS, max_model_len)
    ids = torch.arange(7, 7 + length)[None] % model.config.vocab_size
    pad = getattr(model.config, "pad_token_id", None)
    if isinstance(pad, int) and 0 <= pad < model.config.vocab_size:
        ids[0, length // 2] = pad  # an ordinary token to optc
    recorder = Recorder(max_model_len)
    try:
        with torch.no_grad(), _quiet(), _interceptable(model, recorder):
            counted = model(input_ids=ids, use_cache=False, return_dict=True).logits
            recorder.called.clear()
            given = _Forward(model)(ids, torch.arange(length)[None])
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise _cannot_capture(model, recorder, error) from error
    _check_layers(model, recorder, len(recorder.called))
    if not torch.allclose(counted, given, rtol=0, atol=0, equal_nan=True):
        raise UnsupportedModelError(
            f"{_who(model)} does not number its tokens 0, 1, 2, ... as optc does, so that {attention_names(model)} would "
            "get wrong positions; use a model whose positions count from 0"
        )


@contextlib.contextmanager
def _interceptable(model: PreTrainedModel, recorder: Recorder) -> Iterator[None]:
    """Point `model` at optc's attention and mixture of experts, as far as its modelling file lets it choose."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation("grouped_mm")
    implementation = IMPLEMENTATION if model._can_set_attn_implementation() else "sdpa"
    with intercepted(recorder, implementation), _attention_implementation(model, implementation):
        yield


@contextlib.contextmanager
def _attention_implementation(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    found = (getattr(module, "config", None) for module in model.modules())
    configs = {id(config): config for config in found if isinstance(config, PreTrainedConfig)}
    saved = {key: config._attn_implementation for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation_internal = implementation
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = saved[key]


def _export(model: PreTrainedModel, recorder: Recorder) -> torch.export.ExportedProgram:
    tokens = torch.export.Dim("T", min=1, max=max(recorder.max_model_len, _EXAMPLE_TOKENS + 1))
    length = min(_EXAMPLE_TOKENS, recorder.max_model_len)
    ids, positions = torch.zeros(1, length, dtype=torch.long), torch.arange(length)[None]
    try:
        with torch.no_grad(), _quiet():
            exported = torch.export.export(
                _Forward(model), (ids, positions), dynamic_shapes=({1: tokens}, {1: tokens}), strict=False
            )
            decomposed: torch.export.ExportedProgram = exported.run_decompositions({})
            return decomposed
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise _cannot_capture(model, recorder, error) from error


def _computes_with_mask(error: Exception) -> bool:
    return MaskSpec.__name__ in str(error)


def _cannot_capture(model: PreTrainedModel, recorder: Recorder, error: Exception) -> UnsupportedModelError:
    """Says which module stopped the capture, why, and the way out."""
    names = {id(module): name for name, module in model.named_modules() if name}
    inner = next((module for module in reversed(recorder.running) if id(module) in names), model)
    where = f"{names.get(id(inner), 'the model')} ({type(inner).__name__})"
    violated = (line.strip(" -") for line in str(error).splitlines() if "Not all values" in line)
    reason = f"failed under torch.export: {next(violated, first_line(error))}"
    if _computes_with_mask(error):
        reason = "computes with the attention mask itself"
    return UnsupportedModelError(f"{_who(model)} cannot be captured: {where} {reason}. {_way_out(model)}")


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _who(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} ({model.config.model_type})"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of transformers and torch, and no dump of the graph so far when an export fails."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    _private_export.print = lambda *args, **kwargs: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        del _private_export.print
        transformers.logging.set_verbosity(verbosity)


def _attention_nodes(exported: torch.export.ExportedProgram) -> int:
    return len(exported.graph.find_nodes(op="call_function", target=torch.ops.optc.attention.default))


def _attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The innermost modules that are called an attention, by name."""
    named = {name: m for name, m in model.named_modules() if "Attention" in type(m).__name__}
    return {name: m for name, m in named.items() if not any(other.startswith(name + ".") for other in named)}


def attention_names(model: nn.Module) -> str:
    """The classes of the model's attention modules, for messages."""
    return ", ".join(sorted({type(module).__name__ for module in _attention_modules(model).values()}))


def _way_out(model: PreTrainedModel) -> str:
    if model._can_set_attn_implementation():
        return "optc compiles decoder-only models with causal attention whose control flow does not depend on data"
    return (
        f"Its {attention_names(model)} bypasses transformers' attention interface; "
        "use a model whose modelling file goes through it"
    )


def _no_positions(model: PreTrainedModel) -> str:
    return (
        f"{_who(model)} does not use position ids, so its positions cannot be given from outside (ALiBi, or positions "
        f"counted inside the model; its attention is {attention_names(model)}); "
        "use a model with rotary or learned positions"
    )


def _check_layers(model: PreTrainedModel, recorder: Recorder, nodes: int) -> None:
    """One node a layer; more only where a layer attends more than once a pass, as differential attention does."""
    expected = _expected_layers(model.config)
    reached = {id(module) for module in recorder.called}
    if nodes == expected or (nodes == len(recorder.called) and len(reached) == expected):
        return
    missed = [name for name, module in _attention_modules(model).items() if id(module) not in reached]
    names = ", ".join(missed[:3]) + (", ..." if len(missed) > 3 else "")
    raise UnsupportedModelError(
        f"{_who(model)} has {expected} attention layers, of which {nodes} went through transformers' attention "
        f"interface; bypassed by: {names or 'none by name'}. {_way_out(model)}"
    )


def _check_windows(model: PreTrainedModel, program: Program, max_model_len: int) -> None:
    """Refuse a model that transformers generates from with a sliding cache and attends in with unlimited masks.

    Its `generate` and its forward pass then disagree on long texts, and there is no telling which one is meant.
    """
    window = getattr(model.config, "sliding_window", None)
    if not isinstance(window, int) or window >= max_model_len:
        return
    attends = [
        node.args[4] for node in program.graph.find_nodes(op="call_function", target=torch.ops.optc.attention.default)
    ]
    if any(DynamicCache(config=model.config).is_sliding) and not any(attends):
        raise UnsupportedModelError(
            f"{_who(model)}: the config names a sliding window of {window}, which transformers' cache applies and the model's masks "
            f"do not; remove sliding_window from the config, or give --max-model-len {window}"
        )


def _expected_layers(config: PreTrainedConfig) -> int:
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return sum("attention" in kind and "linear" not in kind for kind in kinds)
    return int(config.num_hidden_layers)


def _to_program(exported: torch.export.ExportedProgram, max_model_len: int) -> Program:
    module = _rooted_at_model(exported.module(check_guards=False))
    inputs = [TensorSpec(name=name, dtype="int64", shape=(1, "T")) for name in ("input_ids", "positions")]
    program = Program(module, inputs, {"T": (1, max_model_len)}, ("logits",))
    canonical: dict[tuple[Any, ...], str] = {}
    # Tied weights become one, under the name that comes first in the model, which is the one that checkpoints hold.
    for name, weight in module.named_parameters(remove_duplicate=False):
        canonical.setdefault(_identity(name, weight), name)
    for node in program.graph.find_nodes(op="get_attr"):
        if not node.users:
            program.graph.erase_node(node)
            continue
        node.target = canonical.setdefault(_identity(node.target, get_weight(module, node.target)), node.target)
        program.sources[node.target] = node.target
    output = program.graph.output_node()
    result = output.args[0]
    output.args = ((result[0] if isinstance(result, tuple | list) else result,),)
    module.recompile()
    propagate(program)
    return program


def _identity(name: str, weight: Tensor) -> tuple[Any, ...]:
    """Equal for tied weights: the storage is the same, and so is everything that tells a view of it apart."""
    if not weight.numel():
        return (name,)
    return (
        weight.untyped_storage().data_ptr(),
        weight.storage_offset(),
        weight.shape,
        weight.stride(),
        weight.dtype,
    )


def _rooted_at_model(module: fx.GraphModule) -> fx.GraphModule:
    """Drop the wrapper's `model.` from the weights' names, so that they are the checkpoint's."""
    root = module.get_submodule("model") if isinstance(getattr(module, "model", None), nn.Module) else module
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.find_nodes(op="get_attr"):
        if root is not module and not node.target.startswith("model."):
            root.register_buffer(node.target, get_weight(module, node.target))  # a constant lifted by export
        node.target = node.target.removeprefix("model.") if root is not module else node.target
    return fx.GraphModule(root, graph)


def decide_rope(model: nn.Module, max_model_len: int) -> list[str]:
    """Fix RoPE frequencies that transformers would choose by the length of the data, by `max_model_len`; say what was chosen."""
    notes: list[str] = []
    for name, module in model.named_modules():
        kinds = getattr(module, "rope_type", None)
        if kinds is None:
            continue
        for layer_type, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            if kind != "longrope" and "dynamic" not in kind:
                continue
            options = {} if layer_type is None else {"layer_type": layer_type}
            prefix = "" if layer_type is None else f"{layer_type}_"
            frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](
                module.config, torch.device("cpu"), seq_len=max_model_len, **options
            )
            getattr(module, f"{prefix}inv_freq").data = frequencies
            setattr(module, f"{prefix}attention_scaling", scaling)
            if layer_type is None:
                module.rope_type = "default"
            else:
                kinds[layer_type] = "default"
            notes.append(f"{name}: {kind} RoPE fixed for --max-model-len {max_model_len}")
    return notes


def capture_module(module: nn.Module, example_inputs: tuple[Tensor, Tensor], max_model_len: int) -> Program:
    """Capture a plain module `f(input_ids [1, T], positions [1, T]) -> logits [1, T, V]`.

    Its attention must be causal `scaled_dot_product_attention(..., is_causal=True)` on [1, H, T, D].

    Raises:
        UnsupportedModelError: the module cannot be exported, or holds no such attention.
    """
    tokens = torch.export.Dim("T", min=2, max=max(max_model_len, 3))
    recorder = Recorder(max_model_len)
    try:
        with torch.no_grad(), intercepted(recorder, IMPLEMENTATION), _quiet():
            exported = torch.export.export(
                module.eval(), example_inputs, dynamic_shapes=({1: tokens}, {1: tokens}), strict=False
            )
            exported = exported.run_decompositions({})
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(module).__name__} cannot be captured with torch.export: {first_line(error)}"
        ) from error
    if not _attention_nodes(exported):
        raise UnsupportedModelError(
            f"{type(module).__name__} calls no causal scaled_dot_product_attention on [1, H, T, D]; optc found no attention layer"
        )
    program = _to_program(exported, max_model_len)
    check_token_flow(program, type(module).__name__)
    return program
