"""Capture: a Hugging Face model (or a plain module) becomes a graph with one attention node for each layer.

The only place, with `checkpoint.py`, that knows transformers. While a model is captured,

- the attention implementation `optc` turns every attention layer that goes through transformers' interface into one
  `optc::attention` node, and modelling files that call `scaled_dot_product_attention` themselves are intercepted there;
- masks are described, not built: the mask function returns a `MaskSpec`, found out by asking the model's own mask
  predicate about sample positions. A mask that is neither causal nor a causal sliding window is refused;
- RoPE whose frequencies transformers picks by the length of the data (dynamic, longrope) is decided by `max_model_len`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, fx, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel, masking_utils
from transformers.integrations import moe
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..errors import UnsupportedModelError
from ..passes.graph import Program, get_weight, propagate
from ..runtime import ops as _ops
from ..runtime.manifest import TensorSpec

IMPLEMENTATION = "optc"
_EXAMPLE_TOKENS = 7


@dataclass(frozen=True)
class MaskSpec:
    """A causal mask, described: what a model passes around in place of a mask tensor while it is captured."""

    window: int  # 0 is unlimited

    def __getitem__(self, item: object) -> MaskSpec:
        return self  # modelling files slice their mask to the key length

    def to(self, *args: object, **kwargs: object) -> MaskSpec:
        return self


@dataclass
class Recorder:
    """What happened while a model was captured: the modules that went through optc's attention, in order."""

    called: list[nn.Module] = field(default_factory=list)

    def attention(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: object, scale: float | None, softcap: float, sinks: Any
    ) -> Tensor:
        """One attention node. q [1, H, T, Dk], k [1, KV, T, Dk], v [1, KV, T, Dv] -> [1, T, H, Dv]."""
        if mask is not None and not isinstance(mask, MaskSpec):
            raise UnsupportedModelError(f"{_describe(module)} attends with a mask tensor of its own; optc knows causal and sliding-window masks")
        window = mask.window if isinstance(mask, MaskSpec) else 0
        layer = len(self.called)
        self.called.append(module)
        scale = float(q.shape[-1]) ** -0.5 if scale is None else float(scale)
        out: Tensor = torch.ops.optc.attention(q, k, v, scale, window, softcap, sinks, layer)
        return out


# Attention functions get all of a model's keyword arguments. Flags and counts are for others; a tensor or a factor that
# optc does not know would change the result.
_HARMLESS = {"cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "dropout", "position_ids"}


def _interface_function(recorder: Recorder) -> Callable[..., tuple[Tensor, None]]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: object, scaling: float | None = None,
        softcap: float | None = None, s_aux: Tensor | None = None, is_causal: bool | None = None, **options: object,
    ) -> tuple[Tensor, None]:  # fmt: skip
        unknown = sorted(name for name, value in options.items() if isinstance(value, Tensor | float) and name not in _HARMLESS)
        if unknown:
            raise UnsupportedModelError(f"{_describe(module)} passes {', '.join(unknown)} to its attention, which optc does not know")
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        if not causal and not isinstance(attention_mask, MaskSpec):
            raise UnsupportedModelError(f"{_describe(module)} is not causal; optc compiles causal language models")
        out = recorder.attention(module, query, key, value, attention_mask, scaling, softcap or 0.0, s_aux)
        return out, None

    return attention


def _mask_function(**given: Any) -> MaskSpec:
    """Stands in for transformers' mask builders; the arguments are theirs."""
    window = int(given.get("local_size") or 0)
    visible = given["mask_function"]
    with torch.utils._python_dispatch._disable_current_modes():
        for row in sorted({0, 1, 5, window // 2, window, window + 1, 2 * window + 1, 3 * window + 2}):
            keys = torch.arange(row + 3)
            try:
                found = visible(torch.tensor(0), torch.tensor(0), torch.tensor(row), keys).expand(row + 3)
            except Exception as error:
                raise UnsupportedModelError(f"the model builds its attention mask from data: {error}") from error
            expected = (keys <= row) & (keys > row - window) if window else keys <= row
            if not torch.equal(found, expected):
                kind = "chunked" if "chunk" in repr(visible) else "neither causal nor a causal sliding window"
                raise UnsupportedModelError(f"the model's attention mask is {kind}, which optc does not support")
    return MaskSpec(window)


@contextlib.contextmanager
def _intercepted(recorder: Recorder, implementation: str) -> Iterator[None]:
    """transformers and torch with optc's attention, masks and grouped matrix products in place."""
    masks = masking_utils.AttentionMaskInterface._global_mapping
    saved_mask, saved_packed = masks.get(implementation), masking_utils.find_packed_sequence_indices
    saved_sdpa, saved_grouped = nn.functional.scaled_dot_product_attention, moe._grouped_mm
    sequence: list[nn.Module] = []

    def sdpa(query: Tensor, key: Tensor, value: Tensor, attn_mask: object = None, dropout_p: float = 0.0, is_causal: bool = False,
             scale: float | None = None, enable_gqa: bool = False) -> Tensor:  # fmt: skip
        if isinstance(attn_mask, MaskSpec) or (attn_mask is None and is_causal is True and query.dim() == 4):
            module = sequence[-1] if sequence else nn.Identity()
            return recorder.attention(module, query, key, value, attn_mask, scale, 0.0, None).transpose(1, 2)
        return saved_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)  # type: ignore[arg-type]

    AttentionInterface.register(IMPLEMENTATION, _interface_function(recorder))
    masking_utils.AttentionMaskInterface.register(implementation, _mask_function)
    masking_utils.find_packed_sequence_indices = lambda position_ids: None  # the step program does its own packing
    nn.functional.scaled_dot_product_attention = sdpa  # type: ignore[assignment]
    moe._grouped_mm = lambda x, weight, offs: torch.ops.optc.grouped_mm(x.to(weight.dtype), weight, offs)
    hook = nn.modules.module.register_module_forward_pre_hook(lambda module, inputs: sequence.append(module))
    try:
        yield
    finally:
        hook.remove()
        moe._grouped_mm, nn.functional.scaled_dot_product_attention = saved_grouped, saved_sdpa
        masking_utils.find_packed_sequence_indices = saved_packed
        if saved_mask is not None:
            masking_utils.AttentionMaskInterface.register(implementation, saved_mask)


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
    if model._can_set_experts_implementation():
        model.set_experts_implementation("grouped_mm")
    follows_interface = model._can_set_attn_implementation()
    implementation = IMPLEMENTATION if follows_interface else "sdpa"
    recorder = Recorder()
    with _intercepted(recorder, implementation), _attention_implementation(model, implementation):
        exported = _export(model, max_model_len)
    _check_layers(model, recorder, _attention_nodes(exported))
    program = _to_program(exported, max_model_len)
    _check_tokens_meet_only_in_attention(program, model)
    if not follows_interface:
        notes.append(f"{type(model).__name__} bypasses transformers' attention interface; captured at scaled_dot_product_attention")
    return program, notes


@contextlib.contextmanager
def _attention_implementation(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    configs = {id(m.config): m.config for m in model.modules() if isinstance(getattr(m, "config", None), PreTrainedConfig)}
    saved = {key: config._attn_implementation for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation_internal = implementation
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = saved[key]


def _export(model: PreTrainedModel, max_model_len: int) -> torch.export.ExportedProgram:
    tokens = torch.export.Dim("T", min=1, max=max(max_model_len, _EXAMPLE_TOKENS + 1))
    length = min(_EXAMPLE_TOKENS, max_model_len)
    ids, positions = torch.zeros(1, length, dtype=torch.long), torch.arange(length)[None]
    try:
        with torch.no_grad(), _quiet():
            exported = torch.export.export(_Forward(model), (ids, positions), dynamic_shapes=({1: tokens}, {1: tokens}), strict=False)
            return exported.run_decompositions({})
    except UnsupportedModelError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UnsupportedModelError(
            f"{type(model).__name__} ({model.config.model_type}) cannot be captured with torch.export: {lines[0]}. {_bypassing(model)}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def _attention_nodes(exported: torch.export.ExportedProgram) -> int:
    return len(exported.graph.find_nodes(op="call_function", target=torch.ops.optc.attention.default))


def _attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The innermost modules that are called an attention, by name."""
    named = {name: m for name, m in model.named_modules() if "Attention" in type(m).__name__}
    return {name: m for name, m in named.items() if not any(other.startswith(name + ".") for other in named)}


def _bypassing(model: PreTrainedModel) -> str:
    if model._can_set_attn_implementation():
        return "optc compiles decoder-only models whose control flow does not depend on data"
    names = sorted({type(m).__name__ for m in _attention_modules(model).values()})
    return f"Its {', '.join(names)} bypasses transformers' attention interface; use a model whose modelling file goes through it"


def _check_layers(model: PreTrainedModel, recorder: Recorder, nodes: int) -> None:
    expected = _expected_layers(model.config)
    if nodes == expected:
        return
    reached = {id(module) for module in recorder.called}
    missed = [name for name, module in _attention_modules(model).items() if id(module) not in reached]
    names = ", ".join(missed[:3]) + (", ..." if len(missed) > 3 else "")
    raise UnsupportedModelError(
        f"{type(model).__name__} ({model.config.model_type}) has {expected} attention layers, of which {nodes} went through transformers' attention "
        f"interface; bypassed by: {names or 'none by name'} ({_bypassing(model)})"
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
    for node in program.graph.find_nodes(op="get_attr"):
        if not node.users:
            program.graph.erase_node(node)
            continue
        weight = get_weight(module, node.target)
        # Tied weights become one; the storage is the same, so is everything that tells a view of it apart.
        key = (weight.untyped_storage().data_ptr(), weight.storage_offset(), weight.shape, weight.stride(), weight.dtype)
        node.target = canonical.setdefault(key if weight.numel() else (node.target,), node.target)
        program.sources[node.target] = node.target
    output = program.graph.output_node()
    result = output.args[0]
    output.args = ((result[0] if isinstance(result, tuple | list) else result,),)
    module.recompile()
    propagate(program)
    return program


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


# Ops that carry information along the token dimension.
_MIXING = {"cumsum", "cumprod", "conv1d", "convolution", "roll", "flip", "scan", "while_loop", "scaled_dot_product_attention"}
# Ops for which an integer argument only says which rows to take or put, as the experts of a mixture do.
_ROW_MOVES = {"index", "index_put", "gather", "scatter", "index_add", "index_select", "scatter_add", "index_copy"}


def _check_tokens_meet_only_in_attention(program: Program, model: PreTrainedModel) -> None:
    """Refuse graphs in which tokens influence each other outside attention, or that count positions themselves."""
    who = f"{type(model).__name__} ({model.config.model_type})"
    placeholders = program.graph.find_nodes(op="placeholder")
    if not placeholders[1].users:
        raise UnsupportedModelError(
            f"{who} does not use position ids, so its positions cannot be given from outside (ALiBi, or positions counted "
            "inside the model); optc does not support that"
        )
    for node in program.graph.nodes:
        packet = _packet(node)
        if packet in _MIXING and _runs_along_tokens(node):
            raise UnsupportedModelError(
                f"{who}: {_module_of(node)} combines tokens with aten.{packet} outside attention; such layers have a state "
                "of their own, which optc does not support"
            )
        if packet == "arange" and _runs_along_tokens(node) and _counts_positions(node):
            raise UnsupportedModelError(
                f"{who}: {_module_of(node)} counts positions itself (aten.arange) instead of using position ids; optc does not support that"
            )


def _packet(node: fx.Node) -> str:
    return getattr(getattr(node.target, "overloadpacket", None), "__name__", "")


def _runs_along_tokens(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return False
    if _packet(node) in ("cumsum", "cumprod"):
        return isinstance(value.shape[node.args[1]], torch.SymInt)  # type: ignore[index]
    return any(isinstance(size, torch.SymInt) for size in value.shape)


def _counts_positions(arange: fx.Node) -> bool:
    """Whether a count of tokens reaches values or masks, rather than only moving rows around."""
    pending, seen = list(arange.users), {arange}
    while pending:
        node = pending.pop()
        value = node.meta.get("val")
        if node in seen or not isinstance(value, Tensor):
            continue
        seen.add(node)
        if value.dtype.is_floating_point or value.dtype == torch.bool:
            if _packet(node) not in _ROW_MOVES:
                return True
        else:
            pending += node.users
    return False


def _module_of(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return str(next(reversed(stack.values()))[0]) if stack else "the model"


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
            frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](module.config, torch.device("cpu"), seq_len=max_model_len, **options)
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
    recorder = Recorder()
    try:
        with torch.no_grad(), _intercepted(recorder, IMPLEMENTATION), _quiet():
            exported = torch.export.export(module.eval(), example_inputs, dynamic_shapes=({1: tokens}, {1: tokens}), strict=False)
            exported = exported.run_decompositions({})
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(f"{type(module).__name__} cannot be captured with torch.export: {str(error).strip().splitlines()[0]}") from error
    if not _attention_nodes(exported):
        raise UnsupportedModelError(f"{type(module).__name__} calls no causal scaled_dot_product_attention on [1, H, T, D]; optc found no attention layer")
    return _to_program(exported, max_model_len)


def _describe(module: nn.Module) -> str:
    return f"{type(module).__name__} (layer {getattr(module, 'layer_idx', '?')})"


assert _ops.attention  # capture emits optc::attention
