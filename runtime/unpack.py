"""From an artifact back to the checkpoint's weights: every layout that a pass gives a weight is undone here."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..errors import ArtifactError
from .artifact import Artifact
from .manifest import ConstantRecord, Layout, QuantizedLayer, RowsRecord
from .ops.packed import unpack_groups, unpack_matrix
from .ops.quantized import QuantizedWeight, StoredWeight
from .scheme import QuantizationArgs


def unpack(artifact: Artifact) -> dict[str, Tensor]:
    """The checkpoint's weights under their own names, in plain layout and original orientation.

    Plain weights are memory-mapped views of the artifact; transposed ones are copies. Both are bit-exact, in the dtype
    they were compiled in. Folded weights come back as they were folded, quantized ones as their codes mean, in float32. A
    weight that several modules share comes back under the one name it is stored by; tables that the model computes (such
    as RoPE frequencies) come with the weights.

    Raises:
        ArtifactError: a constant is missing or is not what its layout says.
    """
    weights = plain_weights(artifact)
    for layer, stored in stored_weights(artifact):
        value = stored.dequantize()
        if layer.experts is not None:
            value = value.unflatten(0, (layer.experts, -1))
        weights.setdefault(layer.name, value.mT.contiguous() if layer.transposed else value)
    return weights


def plain_weights(artifact: Artifact) -> dict[str, Tensor]:
    """The weights that are not quantized, as `unpack` gives them.

    Raises:
        ArtifactError: a constant is missing or is not what its layout says.
    """
    constants = artifact.constants()
    weights: dict[str, Tensor] = {}
    for name, record in artifact.manifest.constants.items():
        if record.layout == "quantized":
            continue
        stored = _unpacked(constants[name], record)
        parts = record.merged or (RowsRecord(source=record.source, layout=record.layout, rows=len(stored)),)
        for part, rows in zip(parts, stored.split([part.rows for part in parts]), strict=True):
            # A source may be stored twice, for uses that want it differently; the plain one is the checkpoint's own.
            if part.source not in weights or part.layout == "plain":
                weights[part.source] = _turned(artifact, name, part.layout, rows)
    return weights


def stored_weights(artifact: Artifact) -> list[tuple[QuantizedLayer, StoredWeight]]:
    """Every quantized weight as it is stored, with its record, in the order of their use.

    Raises:
        ArtifactError: a part is missing or has another shape or dtype than its scheme says.
    """
    quantization = artifact.manifest.quantization
    if quantization is None:
        return []
    constants, records = artifact.constants(), artifact.manifest.constants
    found: list[tuple[QuantizedLayer, StoredWeight]] = []
    for layer in quantization.layers:
        try:
            args = quantization.schemes[layer.scheme].weights
            if records[layer.constants["codes"]].panels is not None:
                stored = _from_panels(layer, args, records, constants)
            else:
                parts = {part: constants[name] for part, name in layer.constants.items()}
                stored = StoredWeight(
                    parts["codes"], parts["scale"], parts.get("zero"), parts.get("group_index"), args, layer.shape
                )
            stored.check()
        except (KeyError, ValueError) as error:
            raise ArtifactError(
                f"{artifact.path}: the quantized weight {layer.name} cannot be read: {error}; compile the model again"
            ) from error
        found.append((layer, stored))
    return found


def _from_panels(
    layer: QuantizedLayer,
    args: QuantizationArgs,
    records: Mapping[str, ConstantRecord],
    constants: Mapping[str, Tensor],
) -> StoredWeight:
    (rows, columns), first = layer.shape, layer.first_row
    block_rows, _ = args.block(rows, columns)

    def part(which: str) -> Tensor:
        name = layer.constants[which]
        return _unpacked(constants[name], records[name])[first : first + rows]

    zero = part("zero")[::block_rows] if "zero" in layer.constants else None
    return QuantizedWeight(part("codes"), part("scale")[::block_rows].contiguous(), zero, None, args).pack()


def _unpacked(stored: Tensor, record: ConstantRecord) -> Tensor:
    """The constant as it was before it was packed."""
    panels = record.panels
    if panels is None:
        return stored
    if panels.kind == "groups":
        return unpack_groups(stored, panels.rows)
    return unpack_matrix(stored, panels.bits, panels.rows, panels.columns)


def _turned(artifact: Artifact, name: str, layout: Layout, stored: Tensor) -> Tensor:
    if not layout.endswith("transposed"):
        return stored
    if stored.dim() != 2:
        raise ArtifactError(
            f"{artifact.path}: the constant {name} cannot be unpacked from layout {layout}: it is "
            f"{list(stored.shape)}, expected a matrix; compile the model again"
        )
    return stored.t().contiguous()
