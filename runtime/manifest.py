"""The schema of `manifest.json`, as typed models. `docs/manifest.schema.json` is generated from here."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import Field

from .record import Record
from .scheme import QuantizationArgs, Scheme

SCHEMA_VERSION: Literal[3] = 3

Dim = int | str
"""A size, or the name of a symbol whose range is in `ProgramSpec.symbols`."""


class TensorSpec(Record):
    """One input of a program."""

    name: str
    dtype: str = Field(description="PyTorch's name of the dtype, such as int64 or bfloat16")
    shape: tuple[Dim, ...]


class KVCacheSpec(Record):
    """Geometry of one layer's KV cache: a buffer [num_blocks, kv_heads, block_size, row_size].

    A cache of dtype int8 or float8_e4m3fn is quantized, see `runtime.ops.attention`.
    """

    layer: int
    kv_heads: int
    k_dim: int
    v_dim: int
    window: int = Field(description="how many last tokens a query sees, itself included; 0 is all")
    dtype: str

    @property
    def input_name(self) -> str:
        return f"kv_cache.{self.layer}"

    @property
    def row_size(self) -> int:
        """Elements a token has for each head: key, value and, if quantized, two float32 scales."""
        return self.k_dim + self.v_dim + (8 if self.dtype in ("int8", "float8_e4m3fn") else 0)

    def bytes_per_token(self, itemsize: int) -> int:
        return self.kv_heads * self.row_size * itemsize


class ProgramSpec(Record):
    """Signature of a program: its inputs in order, its symbols' ranges, its file."""

    file: str
    inputs: tuple[TensorSpec, ...]
    symbols: dict[str, tuple[int, int]]
    outputs: tuple[str, ...]


class FileRecord(Record):
    size: int
    sha256: str


Layout = Literal["plain", "transposed", "folded", "folded-transposed", "quantized"]
"""How a constant lies beside the checkpoint's tensor; `runtime.unpack` undoes each.

plain: as it is; transposed: [K, N] stored as [N, K]; folded: in its shape, its values changed by a transform that another
weight makes up for; folded-transposed: both; quantized: a part of a quantized weight, see `QuantizedLayer`.
"""


class RowsRecord(Record):
    """Rows of a merged constant, and the checkpoint's tensor that they are."""

    source: str
    layout: Layout
    rows: int


class PanelsRecord(Record):
    """A constant in panels of 32 rows; `runtime.ops.packed` has the layout, and undoes it."""

    kind: Literal["matrix", "groups"] = Field(description="codes or numbers [rows, columns], or scales or zero points")
    bits: int
    rows: int
    columns: int


class ConstantRecord(Record):
    """Where a program constant lies: the tensor of this name in this safetensors file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    source: str = Field(description="name of the checkpoint's tensor it was made from")
    layout: Layout = Field(description="how it lies beside that tensor")
    merged: tuple[RowsRecord, ...] = Field(
        default=(), description="of one made of several tensors, their rows one below the other; in place of source"
    )
    panels: PanelsRecord | None = Field(
        default=None, description="how it is packed, for native code; null if it is not"
    )


Role = Literal["attention", "mlp", "lm_head", "embedding", "router", "medusa"]


class QuantizedLayer(Record):
    """A weight that is stored as codes."""

    name: str = Field(description="name of the checkpoint's tensor")
    role: Role
    shape: tuple[int, int] = Field(
        description="[N, K], outputs first; of experts [G * n, K], the matrices [n, K] one below the other"
    )
    experts: int | None = Field(default=None, description="G, where the checkpoint has a tensor of G matrices")
    transposed: bool = Field(description="whether the checkpoint has it as [K, N]; of experts as [G, K, n]")
    scheme: str = Field(description="its scheme, a key of `Quantization.schemes`")
    algorithm: str = Field(description="how the codes were chosen")
    constants: dict[str, str] = Field(
        description="part (codes, scale, zero, group_index, input_scale) -> the constant that holds it"
    )
    first_row: int = Field(
        default=0, description="where its rows start in the constants, which may hold other weights' too"
    )
    bits_per_weight: float = Field(description="all parts but input_scale")
    error: float | None = Field(description="root mean square of the change of the weight, over that of the weight")


class CalibrationRecord(Record):
    """The text that the codes were chosen on."""

    source: str
    sha256: str = Field(description="over the token ids")
    num_samples: int
    sequence_length: int
    seed: int


class SensitivityRecord(Record):
    """What one group of weights costs in each scheme."""

    weights: tuple[str, ...]
    chosen: str | None
    kl: dict[str, float] = Field(description="scheme -> mean KL divergence in nats with this group alone in it")
    bits_per_weight: dict[str, float]


class BudgetRecord(Record):
    """The accuracy budget, and what was measured on text that was not calibrated on."""

    max_kl: float | None
    max_ppl_increase: float | None = Field(description="as a fraction")
    bits: float | None
    kl: float | None = Field(description="of the whole mix, mean, nats a token")
    ppl_increase: float | None = Field(description="of the whole mix, as a fraction")
    bits_per_weight: float | None
    rounds: int = Field(description="mixes that were quantized and measured")
    groups: tuple[SensitivityRecord, ...]


class Quantization(Record):
    """What is stored in fewer bits. Schemes are in the vocabulary of compressed-tensors."""

    schemes: dict[str, Scheme]
    layers: tuple[QuantizedLayer, ...]
    kv_cache_scheme: QuantizationArgs | None
    calibration: CalibrationRecord | None
    budget: BudgetRecord | None = None
    bits_per_weight: float = Field(description="mean over the quantized weights, scales and zero points included")


class Estimate(Record):
    """A measured figure and how far chance may have moved it."""

    value: float
    standard_error: float | None = Field(description="over windows as the independent units; null with a single one")


class Accuracy(Record):
    """How well a model predicts a text and, if it was compared with a reference, how far it is from that.

    All are over the predicted tokens. Divergences are KL(reference || model) of the next-token distributions, in nats.
    """

    windows: int
    tokens: int = Field(description="how many were predicted")
    perplexity: Estimate
    reference_perplexity: Estimate | None
    perplexity_delta: Estimate | None = Field(description="the model's less the reference's, paired by window")
    perplexity_increase: Estimate | None = Field(description="that over the reference's; 0.01 is one percent")
    kl_mean: Estimate | None
    kl_p99: Estimate | None
    kl_p999: Estimate | None
    same_top: Estimate | None = Field(description="share of the positions where both find the same token most likely")


class AccuracyRecord(Record):
    """What `optc eval` measured, and how; the protocol is in docs/evaluation.md."""

    text: str
    text_sha256: str = Field(description="over the token ids")
    window: int = Field(description="tokens of a window, those the tokenizer puts first included")
    prefix: tuple[int, ...] = Field(description="token ids that every window starts with, such as BOS; not predicted")
    reference: str | None = Field(description="the checkpoint, run in float32 by transformers, or the artifact")
    native: bool = Field(description="whether the artifact's native code ran, or its portable program")
    figures: Accuracy


class PassRecord(Record):
    """What one pass did."""

    name: str
    config_sha256: str
    matches: int
    declined: tuple[str, ...] = Field(description="candidates left alone, each with its reason")
    node_delta: int
    max_error: float | None = Field(
        description="largest difference of the logits to the graph before, in fp32, relative"
    )
    seconds: float


class NativeCode(Record):
    """Native code for one target. Pending: to be made on the target; until then the portable program runs."""

    target: str
    backend: Literal["inductor"]
    status: Literal["ready", "pending"]
    cpu_features: tuple[str, ...] = Field(description="processor features the code needs, as /proc/cpuinfo names them")
    torch_version: str = Field(description="major.minor of the torch whose ABI the code was made for")
    constants: dict[str, str] = Field(description="the code's constant -> the artifact's")
    step: str | None
    kernels: str | None
    shims: str | None = Field(default=None, description="digest of the kernels' C functions that the code calls")
    reason: str | None = Field(default=None, description="why it is pending")


class ModelRecord(Record):
    """What was compiled."""

    source: str
    source_sha256: str
    model_type: str
    architecture: str
    adapter: str | None
    parameters: Annotated[int, Field(ge=1)]
    dtype: str
    vocab_size: int
    max_model_len: int
    notes: tuple[str, ...] = Field(description="decisions taken for this model, such as the RoPE scaling")


class MemoryPlan(Record):
    weight_bytes: int
    kv_bytes_per_token: int
    decode_floor_ms: float | None = Field(
        default=None,
        description="weight bytes over the target's memory bandwidth: no decode step of one sequence is faster",
    )


class TokenizerRecord(Record):
    """Files of the tokenizer and the special ids generation needs."""

    tokenizer: str
    chat_template: str | None
    bos_token: str | None
    eos_token: str | None


class Versions(Record):
    optc: str
    torch: str
    transformers: str | None


class Manifest(Record):
    """All that a runtime has to know about an artifact before it loads anything."""

    schema_version: Literal[3] = SCHEMA_VERSION
    identity: str = Field(
        description="sha256 over everything that decides the tokens; equal inputs give equal identities"
    )
    checksum: str = Field(description="sha256 over this manifest without this field; see `checksum_of`")
    created_by: Versions
    target: str
    backend: Literal["inductor", "eager"]
    model: ModelRecord
    block_size: Annotated[int, Field(ge=1)]
    kv_cache: tuple[KVCacheSpec, ...]
    step: ProgramSpec
    score: ProgramSpec
    constants: dict[str, ConstantRecord]
    required_ops: tuple[str, ...]
    native: tuple[NativeCode, ...]
    quantization: Quantization | None
    accuracy: AccuracyRecord | None = Field(description="measured by `optc compile --eval`")
    passes: tuple[PassRecord, ...]
    stages: dict[str, float] = Field(description="seconds of each stage of the compilation")
    memory: MemoryPlan
    tokenizer: TokenizerRecord | None
    eos_token_ids: tuple[int, ...]
    generation: dict[str, float | int | bool] = Field(description="sampling defaults of generation_config.json")
    files: dict[str, FileRecord]


def identity_of(manifest: Manifest) -> str:
    """sha256 over the parts of `manifest` that decide the tokens: no measurement, not its own field, not native code."""
    unrelated = {"identity", "checksum", "native", "files", "stages", "accuracy"}
    content = manifest.model_dump(mode="json", exclude=unrelated)
    for record in content["passes"]:
        del record["seconds"], record["max_error"]  # measurements
    for layer in (content["quantization"] or {}).get("layers", ()):
        del layer["error"]  # a measurement
    if content["quantization"]:
        del content["quantization"]["budget"]
        if content["quantization"]["calibration"]:
            del content["quantization"]["calibration"]["source"]  # its digest counts, not its name
    # The same checkpoint from another folder is the same checkpoint, and what was decided shows in the program.
    for where in ("source", "adapter", "notes"):
        del content["model"][where]
    content["data"] = {
        name: record.sha256
        for name, record in sorted(manifest.files.items())
        if not name.startswith(("code/", "report"))
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def checksum_of(manifest: Manifest) -> str:
    """sha256 over the canonical JSON (sorted keys, no spaces) of all of `manifest` but its own field."""
    content = manifest.model_dump(mode="json", exclude={"checksum"})
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def schema_json() -> str:
    """The JSON schema of a manifest, as `docs/manifest.schema.json` holds it."""
    return json.dumps(Manifest.model_json_schema(), indent=1, sort_keys=True) + "\n"
