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
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel, masking_utils
from transformers.integrations import moe
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..errors import UnsupportedModelError
from ..passes.graph import Program, get_weight, input_node, propagate
from ..runtime import ops as _ops
from ..runtime.manifest import TensorSpec
from ..runtime.program import is_known_op

IMPLEMENTATION = "optc"
_EXAMPLE_TOKENS = 7
_private_export: Any = importlib.import_module("torch.export._trace")


@dataclass(frozen=True)
class MaskSpec:
    """A mask, described: what a model passes around in place of a mask tensor while it is captured.

    Attributes:
        window: how many last tokens a query sees, itself included; 0 is all.
        problem: why optc cannot attend with it. Models build masks that no layer uses, so only using it is refused.
    """

    window: int = 0
    problem: str = ""

    def __getitem__(self, item: object) -> MaskSpec:
        return self  # modelling files slice their mask to the key length

    def to(self, *args: object, **kwargs: object) -> MaskSpec:
        return self


@dataclass
class Recorder:
    """What happens while a model is captured.

    Attributes:
        max_model_len: largest number of tokens a sequence may have; masks are compared up to there.
        called: the modules that went through optc's attention, in order.
        running: the modules whose forward runs now, innermost last; after an error, those it came from.
    """

    max_model_len: int
    called: list[nn.Module] = field(default_factory=list)
    running: list[nn.Module] = field(default_factory=list)

    def enter(self, module: nn.Module, inputs: object) -> None:
        self.running.append(module)

    def leave(self, module: nn.Module, inputs: object, output: object) -> None:
        self.running.pop()

    def attention(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: object,
        scale: float | None,
        softcap: float,
        sinks: Any,
    ) -> Tensor:
        """One attention node. q [1, H, T, Dk], k [1, KV, T, Dk], v [1, KV, T, Dv] -> [1, T, H, Dv]."""
        if mask is not None and not isinstance(mask, MaskSpec):
            raise UnsupportedModelError(
                f"{_describe(module)} attends with a mask tensor of its own; optc knows causal and sliding-window masks"
            )
        spec = mask if mask is not None else MaskSpec()
        if spec.problem:
            raise UnsupportedModelError(
                f"the attention mask of {_describe(module)} {spec.problem}, which optc does not support"
            )
        layer = len(self.called)
        self.called.append(module)
        scale = float(q.shape[-1]) ** -0.5 if scale is None else float(scale)
        out: Tensor = torch.ops.optc.attention(q, k, v, scale, spec.window, softcap, sinks, layer)
        return out


# Attention functions get all of a model's keyword arguments. Flags and counts are for others; a tensor or a factor that
# optc does not know would change the result.
_HARMLESS = {"cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "dropout", "position_ids"}


def _interface_function(recorder: Recorder) -> Callable[..., tuple[Tensor, None]]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: object, scaling: float | None = None,
        softcap: float | None = None, s_aux: Tensor | None = None, is_causal: bool | None = None, **options: object,
    ) -> tuple[Tensor, None]:  # fmt: skip
        unknown = sorted(
            name for name, value in options.items() if isinstance(value, Tensor | float) and name not in _HARMLESS
        )
        if unknown:
            raise UnsupportedModelError(
                f"{_describe(module)} passes {', '.join(unknown)} to its attention, which optc does not know"
            )
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        if not causal and not isinstance(attention_mask, MaskSpec):
            raise UnsupportedModelError(f"{_describe(module)} is not causal; optc compiles causal language models")
        out = recorder.attention(module, query, key, value, attention_mask, scaling, softcap or 0.0, s_aux)
        return out, None

    return attention


def _mask_function(recorder: Recorder) -> Callable[..., MaskSpec]:
    """Stands in for transformers' mask builders; the arguments are theirs."""

    def describe(**given: Any) -> MaskSpec:
        padding = given.get("attention_mask")
        if type(padding) is Tensor and not padding.is_meta and not padding.all():
            return MaskSpec(problem="hides tokens by their values")
        size, limit = int(given.get("local_size") or 0), recorder.max_model_len
        rows = {0, 1, 5, size // 2, size, size + 1, 2 * size + 1, 3 * size + 2, limit - 1}
        possible = {size, 0}
        with torch.utils._python_dispatch._disable_current_modes():
            for row in sorted(row for row in rows if row < limit):
                keys = torch.arange(row + 3)
                try:
                    found = given["mask_function"](torch.tensor(0), torch.tensor(0), torch.tensor(row), keys).expand(
                        row + 3
                    )
                except Exception:
                    return MaskSpec(problem="is built from data")
                possible -= {window for window in possible if not torch.equal(found, _visible(row, keys, window))}
        if possible:
            return MaskSpec(max(possible))
        way_out = f" (it is causal up to --max-model-len {size})" if size else ""
        return MaskSpec(problem=f"is neither causal nor a causal sliding window{way_out}")

    return describe


def _visible(row: int, keys: Tensor, window: int) -> Tensor:
    return (keys <= row) & (keys > row - window) if window else keys <= row


@contextlib.contextmanager
def _intercepted(recorder: Recorder, implementation: str) -> Iterator[None]:
    """Transformers and torch with optc's attention, masks and grouped matrix products in place."""
    masks = masking_utils.AttentionMaskInterface._global_mapping
    saved_mask, no_padding = masks.get(implementation), torch.zeros(1, dtype=torch.long)
    torch_sdpa, torch_max = nn.functional.scaled_dot_product_attention, torch.max
    chunked = masking_utils.chunked_causal_mask_function

    def sdpa(query: Tensor, key: Tensor, value: Tensor, attn_mask: object = None, dropout_p: float = 0.0, is_causal: bool = False,
             scale: float | None = None, enable_gqa: bool = False) -> Tensor:  # fmt: skip
        if isinstance(attn_mask, MaskSpec) or (attn_mask is None and is_causal is True and query.dim() == 4):
            module = recorder.running[-1] if recorder.running else nn.Identity()
            return recorder.attention(module, query, key, value, attn_mask, scale, 0.0, None).transpose(1, 2)
        mask: Any = attn_mask
        return torch_sdpa(query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    def longest(*args: Any, **kwargs: Any) -> Any:
        """A RoPE module that asks how long the data is hears the largest length: see `decide_rope`."""
        asks = len(args) == 1 and not kwargs and recorder.running and hasattr(recorder.running[-1], "rope_type")
        return recorder.max_model_len - 1 if asks else torch_max(*args, **kwargs)

    def grouped_mm(x: Tensor, weight: Tensor, offs: Tensor) -> Any:
        return torch.ops.optc.grouped_mm(x.to(weight.dtype), weight, offs)

    replaced: list[tuple[Any, str, Any]] = [
        (nn.functional, "scaled_dot_product_attention", sdpa),
        (torch, "max", longest),
        (moe, "_grouped_mm", grouped_mm),
        # The step program does its own packing.
        (masking_utils, "find_packed_sequence_indices", lambda position_ids: None),
        # Chunks start after the padding of a batch, which optc never has; the traced count of it cannot be looked at.
        (
            masking_utils,
            "chunked_causal_mask_function",
            lambda chunk_size, left_padding: chunked(chunk_size, no_padding),
        ),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    hooks = (
        nn.modules.module.register_module_forward_pre_hook(recorder.enter),
        nn.modules.module.register_module_forward_hook(recorder.leave),
    )
    AttentionInterface.register(IMPLEMENTATION, _interface_function(recorder))
    masking_utils.AttentionMaskInterface.register(implementation, _mask_function(recorder))
    try:
        for owner, name, value in replaced:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in originals:
            setattr(owner, name, value)
        for hook in hooks:
            hook.remove()
        if saved_mask is not None:
            masks[implementation] = saved_mask


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
    _check_tokens_meet_only_in_attention(program, _who(model))
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
    with _intercepted(recorder, implementation), _attention_implementation(model, implementation):
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
        key = (
            weight.untyped_storage().data_ptr(),
            weight.storage_offset(),
            weight.shape,
            weight.stride(),
            weight.dtype,
        )
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
_MIXING = {
    "cumsum",
    "cumprod",
    "conv1d",
    "convolution",
    "roll",
    "flip",
    "scan",
    "while_loop",
    "scaled_dot_product_attention",
}
# Ops for which an integer argument only says which rows to take or put, as the experts of a mixture do.
_ROW_MOVES = {"index", "index_put", "gather", "scatter", "index_add", "index_select", "scatter_add", "index_copy"}


def _check_tokens_meet_only_in_attention(program: Program, who: str) -> None:
    """Refuse graphs in which tokens influence each other outside attention, or that count positions themselves."""
    if (node := _reduces_positions(program)) is not None:
        raise UnsupportedModelError(
            f"{who}: {_module_of(node)} looks at all positions together (aten.{_packet(node)}), which in a batch are those "
            "of many sequences; optc does not support that"
        )
    for node in program.graph.nodes:
        packet = _packet(node)
        if free_unbacked_symbols(node.meta["val"]):
            raise UnsupportedModelError(
                f"{who}: {_module_of(node)} has shapes that depend on the values of data (aten.{packet}), which optc does "
                "not support"
            )
        if node.users and isinstance(node.target, torch._ops.OpOverload) and not is_known_op(node.target):
            raise UnsupportedModelError(
                f"{who}: {_module_of(node)} calls {node.target}, which is outside the vocabulary of portable programs"
            )
        if packet in _MIXING and _runs_along_tokens(node):
            raise UnsupportedModelError(
                f"{who}: {_module_of(node)} combines tokens with aten.{packet} outside attention; such layers have a state "
                "of their own, which optc does not support"
            )
        if packet == "arange" and _runs_along_tokens(node) and _counts_positions(node):
            raise UnsupportedModelError(
                f"{who}: {_module_of(node)} counts positions itself (aten.arange) instead of using position ids; optc does not support that"
            )


def _reduces_positions(program: Program) -> fx.Node | None:
    """The first node that makes one value of all positions, such as the length of the data."""
    made_of_positions = {input_node(program, "positions")}
    node: fx.Node
    for node in program.graph.nodes:
        if not isinstance(node.meta.get("val"), Tensor):
            continue
        inputs = {n for n in node.all_input_nodes if n.op != "get_attr" and isinstance(n.meta["val"], Tensor)}
        if not inputs or not inputs <= made_of_positions:
            continue
        if not _has_tokens(node):
            return node
        made_of_positions.add(node)
    return None


def _packet(node: fx.Node) -> str:
    return getattr(getattr(node.target, "overloadpacket", None), "__name__", "")


def _has_tokens(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape)


def _runs_along_tokens(node: fx.Node) -> bool:
    if _packet(node) in ("cumsum", "cumprod") and _has_tokens(node):
        return isinstance(node.meta["val"].shape[node.args[1]], torch.SymInt)
    return _has_tokens(node)


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
        with torch.no_grad(), _intercepted(recorder, IMPLEMENTATION), _quiet():
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
    _check_tokens_meet_only_in_attention(program, type(module).__name__)
    return program


def _describe(module: nn.Module) -> str:
    return f"{type(module).__name__} (layer {getattr(module, 'layer_idx', '?')})"


assert _ops.attention  # capture emits optc::attention
