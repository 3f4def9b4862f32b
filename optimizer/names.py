"""The names that a checkpoint has for its weights, where transformers renames or merges them as it loads them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..errors import UsageError


def expert_weights(skeleton: PreTrainedModel) -> dict[str, list[str]]:
    """Parameters [G, N, K] -> the checkpoint's matrices that transformers makes them of, in the order of their rows.

    Found by undoing what transformers does, on the numbers of the rows instead of their values.
    """
    found = {}
    for name, value in skeleton.named_parameters():
        if value.dim() == 3:
            rows = torch.arange(value.shape[0] * value.shape[1]).view(*value.shape[:2], 1)
            parts = revert_weight_conversion(skeleton, {name: rows})
            order = sorted(parts, key=lambda part: int(parts[part].flatten()[0]))
            if torch.equal(torch.cat([parts[part].flatten() for part in order]), rows.flatten()) and len(parts) > 1:
                found[name] = order
    return found


@dataclass(frozen=True)
class CheckpointNames:
    """Weights of a model as its checkpoint names them; transformers renames some as it loads them, and merges experts.

    Attributes:
        plain: weights by the checkpoint's names.
        modules: name of a parameter that is given in another form -> the checkpoint's module that it is in.
        tied: modules whose weight is another module's.
    """

    plain: dict[str, torch.Tensor]
    modules: dict[str, str]
    tied: tuple[str, ...]


def checkpoint_names(
    skeleton: PreTrainedModel, plain: Mapping[str, torch.Tensor], coded: Collection[str]
) -> CheckpointNames:
    """Name weights as their checkpoint does.

    Args:
        skeleton: the model without weights.
        plain: weights by the names of the model's parameters; what is no parameter is left out.
        coded: names of parameters that are given in another form.

    Raises:
        UsageError: a weight is missing, or one of `coded` is several modules'.
    """
    kept, places = set(skeleton.state_dict()), dict[int, list[str]]()
    for name, value in [*skeleton.named_parameters(remove_duplicate=False), *skeleton.named_buffers()]:
        if name in kept:  # or else a table that the model computes
            places.setdefault(id(value), []).append(name)
    weights, tied = {}, []
    for names in places.values():
        tied += names[1:]
        given = [name for name in names if name in coded]
        if given and len(names) > 1:
            raise UsageError(
                f"{given[0]} cannot be exported: it is quantized and tied ({' and '.join(names)} are one weight), which other "
                "tools do not take; compile with --scheme, which leaves lm_head and embedding in full precision"
            )
        found = next((plain[name] for name in names if name in plain), None)
        if found is None and not given:
            raise UsageError(
                f"{names[0]} cannot be exported: the artifact does not hold it, as nothing computes with it"
            )
        if found is not None and not given:
            weights[names[0]] = found
    renamed = {name: next(iter(revert_weight_conversion(skeleton, {name: torch.empty(0)}))) for name in coded}
    return CheckpointNames(
        plain=dict(revert_weight_conversion(skeleton, weights)),
        modules={name: found.removesuffix(".weight") for name, found in renamed.items()},
        tied=tuple(name.removesuffix(".weight") for name in tied),
    )
