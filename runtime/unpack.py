"""From an artifact back to the checkpoint's weights: every layout that a pass gives a weight is undone here."""

from __future__ import annotations

from torch import Tensor

from ..errors import ArtifactError
from .artifact import Artifact
from .manifest import ConstantRecord, QuantizedLayer
from .ops.quantized import StoredWeight


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
        # A source may be stored twice, for uses that want it differently; the plain one is the checkpoint's own.
        if record.layout == "quantized" or (record.source in weights and record.layout != "plain"):
            continue
        weights[record.source] = _undo(artifact, name, record, constants)
    return weights


def stored_weights(artifact: Artifact) -> list[tuple[QuantizedLayer, StoredWeight]]:
    """Every quantized weight as it is stored, with its record, in the order of their use.

    Raises:
        ArtifactError: a part is missing or has another shape or dtype than its scheme says.
    """
    quantization = artifact.manifest.quantization
    if quantization is None:
        return []
    constants = artifact.constants()
    found: list[tuple[QuantizedLayer, StoredWeight]] = []
    for layer in quantization.layers:
        try:
            parts = {part: constants[name] for part, name in layer.constants.items()}
            args = quantization.schemes[layer.scheme].weights
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


def _undo(artifact: Artifact, name: str, record: ConstantRecord, constants: dict[str, Tensor]) -> Tensor:
    stored = constants[name]
    if not record.layout.endswith("transposed"):
        return stored
    if stored.dim() != 2:
        raise ArtifactError(
            f"{artifact.path}: the constant {name} cannot be unpacked from layout {record.layout}: it is "
            f"{list(stored.shape)}, expected a matrix; compile the model again"
        )
    return stored.t().contiguous()
