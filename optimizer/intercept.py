"""Interception: what stands in for transformers' attention, masks and expert products while a model is captured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, masking_utils
from transformers.integrations import moe

from ..errors import UnsupportedModelError
from ..runtime import ops as _ops

IMPLEMENTATION = "optc"


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
def intercepted(recorder: Recorder, implementation: str) -> Iterator[None]:
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


def _describe(module: nn.Module) -> str:
    return f"{type(module).__name__} (layer {getattr(module, 'layer_idx', '?')})"


assert _ops.attention  # capture emits optc::attention
