"""From an artifact back to the checkpoint's weights: every layout that a pass gives a weight is undone here."""

from __future__ import annotations

from torch import Tensor

from ..errors import ArtifactError
from .artifact import Artifact
from .manifest import ConstantRecord
from .ops.linear_fp8 import dequantize_fp8


def unpack(artifact: Artifact) -> dict[str, Tensor]:
    """The checkpoint's weights under their own names, in plain layout and original orientation.

    Plain weights are memory-mapped views of the artifact; transposed ones are copies. Both are bit-exact, in the dtype
    they were compiled in; FP8 weights come back rounded, as float32. A weight that several modules share comes back under
    the one name it is stored by; tables that the model computes (such as RoPE frequencies) come with the weights.

    Raises:
        ArtifactError: a constant is missing or is not what its layout says.
    """
    constants = artifact.constants()
    weights: dict[str, Tensor] = {}
    for name, record in artifact.manifest.constants.items():
        # A source may be stored twice, for uses that want it differently; the plain one is the checkpoint's own.
        if record.layout == "fp8_scale" or (record.source in weights and record.layout != "plain"):
            continue
        try:
            weights[record.source] = _undo(name, record, constants)
        except (KeyError, RuntimeError) as error:
            raise ArtifactError(
                f"{artifact.path}: the constant {name} cannot be unpacked from layout {record.layout}: {error}; compile "
                "the model again"
            ) from error
    return weights


def _undo(name: str, record: ConstantRecord, constants: dict[str, Tensor]) -> Tensor:
    stored = constants[name]
    if record.layout != "plain" and stored.dim() != 2:
        raise RuntimeError(f"it is {list(stored.shape)}, expected a matrix")
    if record.layout in ("fp8", "fp8_transposed"):
        stored = dequantize_fp8(stored, constants[f"{name.removesuffix('_fp8')}_scale"])
    return stored.t().contiguous() if record.layout in ("transposed", "fp8_transposed") else stored
