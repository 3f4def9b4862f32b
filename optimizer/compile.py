"""The compiler driver: checkpoint -> graph -> passes -> programs -> native code -> artifact."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor, fx, nn

from .. import __version__
from ..errors import UsageError
from ..passes.base import run_passes
from ..passes.graph import Program, value_of
from ..passes.quantize.calibrate import Calibration
from ..passes.quantize.given import GivenWeight
from ..passes.quantize.recipe import Recipe
from ..passes.verify import Probe
from ..runtime.artifact import open_artifact
from ..runtime.manifest import (
    AccuracyRecord,
    KVCacheSpec,
    Manifest,
    MemoryPlan,
    ModelRecord,
    NativeCode,
    PassRecord,
    TokenizerRecord,
    Versions,
    checksum_of,
    identity_of,
)
from ..runtime.ops.kernels import supports
from ..runtime.program import encode_program, program_ops, write_program
from ..runtime.report import report_html
from .calibration import check_calibration, overlap, prepare_calibration
from .capture import capture, capture_module, first_line
from .checkpoint import Checkpoint, load_checkpoint
from .config import Backend, CompileConfig
from .evaluate import Windows, evaluate_windows, load_reference, make_windows, read_text
from .package import CHECKPOINT_FOLDER, check_output, file_records, write_manifest, write_weights, writing
from .pipeline import shared_passes, step_passes
from .quantization import given_recipe, given_weights, make_recipe
from .targets import find_target

STEP_FILE, SCORE_FILE, REPORT_FILE = "program/step.json", "program/score.json", "report.html"
_MOST_OVERLAP = 0.01  # of evaluation text in the calibration data


@dataclass
class Progress:
    """Where the driver reports to; the defaults are silent. `seconds` fills up with the time each stage took.

    `on_fraction` is called in the course of a long stage with the fraction of it that is done.
    """

    show: Callable[[str], AbstractContextManager[Any]] = field(default=lambda stage: nullcontext())
    on_fraction: Callable[[float], None] = field(default=lambda fraction: None)
    on_pass: Callable[[PassRecord], None] = field(default=lambda record: None)
    on_warning: Callable[[str], None] = field(default=lambda warning: None)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        with self.show(name):
            yield
        self.seconds[name] = time.perf_counter() - started


@dataclass(frozen=True)
class Captured:
    """A model as a graph, with what the manifest says about it."""

    program: Program
    record: ModelRecord
    checkpoint: Checkpoint | None
    given: Mapping[str, GivenWeight] = field(default_factory=dict)


def compile(
    model: str | Path | nn.Module,
    output: str | Path,
    *,
    target: str = "native",
    backend: Backend = "inductor",
    dtype: str = "auto",
    adapter: str | Path | None = None,
    quantize: str | Path | Recipe | None = None,
    algorithm: str | None = None,
    kv_cache: str | None = None,
    calibration: str | Path | None = None,
    calibration_samples: int = 128,
    calibration_length: int = 512,
    seed: int = 0,
    evaluate: str | Path | None = None,
    force: bool = False,
    dump: str | Path | None = None,
    verify: bool = True,
    block_size: int = 32,
    max_model_len: int | None = None,
    example_inputs: tuple[Tensor, Tensor] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Compile a causal language model into an artifact.

    Args:
        model: a local folder in Hugging Face format, a hub id, or a module f(input_ids i64[1, T], positions i64[1, T])
            -> logits [1, T, V] whose attention is causal `scaled_dot_product_attention`.
        output: artifact folder to write.
        target: hardware the code is for; see `optc targets`.
        backend: inductor (native code) or eager (the portable program alone).
        dtype: of the weights: auto (as stored), float32, bfloat16 or float16.
        adapter: PEFT LoRA adapter folder to merge.
        quantize: a preset (int8, int4, fp8), the name of a scheme, a recipe, or the YAML file of one.
        algorithm: how codes are chosen: rtn, rtn-minmax, hqq, gptq, or transforms before it, as in awq+gptq.
        kv_cache: store keys and values as int8 or fp8.
        calibration: file or folder of text to calibrate on.
        calibration_samples, calibration_length, seed: how many sequences of how many tokens are drawn from it, and how.
        evaluate: file of text to measure the artifact on, beside the checkpoint in float32, before it is published.
        force: replace an artifact at `output`.
        dump: folder for the graph before and after every pass.
        verify: compare the logits after every pass with those before, in float32.
        block_size: tokens a block of the KV cache holds.
        max_model_len: largest number of tokens a sequence may have.
        example_inputs: for a module: example `input_ids` and `positions`, with T >= 2.
        progress: where to report to.

    Returns:
        The artifact folder.

    Raises:
        OptcError: any of `optc.errors`; nothing is left half-written.
    """
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise UsageError(f"dtype {dtype!r}: expected auto, float32, bfloat16 or float16")
    if backend not in ("inductor", "eager"):
        raise UsageError(f"backend {backend!r}: expected inductor or eager")
    if not isinstance(block_size, int) or isinstance(block_size, bool) or not 1 <= block_size <= 1024:
        raise UsageError(f"block size {block_size}: expected 1 to 1024 tokens")
    hardware = find_target(target)
    config = CompileConfig(
        source=str(model) if isinstance(model, str | Path) else type(model).__name__,
        output=Path(output),
        target=hardware,
        backend=backend,
        dtype=dtype,
        adapter=Path(adapter) if adapter is not None else None,
        recipe=make_recipe(quantize, hardware, algorithm=algorithm, kv_cache=kv_cache),
        calibration=Path(calibration) if calibration is not None else None,
        calibration_samples=calibration_samples,
        calibration_length=calibration_length,
        seed=seed,
        evaluate=Path(evaluate) if evaluate is not None else None,
        force=force,
        dump=Path(dump) if dump is not None else None,
        verify=verify,
        block_size=block_size,
        max_model_len=max_model_len,
    )
    check_output(config.output, force=config.force)
    if config.calibration is not None:
        check_calibration(config.calibration)
    if config.evaluate is not None:
        read_text(config.evaluate)  # fails now, not after the model is loaded
    progress = progress or Progress()
    if isinstance(model, nn.Module):
        captured = _capture_module(model, example_inputs, config, progress)
    else:
        captured = _capture_checkpoint(config, progress)
        if captured.checkpoint is not None and captured.checkpoint.quantized is not None:
            config = replace(config, recipe=given_recipe(captured.checkpoint.quantized, config.recipe))
    return _build(captured, config, progress)


def _capture_checkpoint(config: CompileConfig, progress: Progress) -> Captured:
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


def _capture_module(
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


def _build(captured: Captured, config: CompileConfig, progress: Progress) -> Path:
    model = captured.record
    probe = Probe.random(model.vocab_size, model.max_model_len) if config.verify else None
    score = captured.program
    captured, config, calibration = _prepared(captured, config, progress)
    windows = _evaluation_windows(captured, config)
    captured = _with_notes(captured, _overlap_notes(calibration, windows, progress))
    with progress.stage("passes"):
        records = run_passes(
            score,
            shared_passes(config, calibration, captured.given, progress.on_fraction),
            probe=probe,
            dump=config.dump and config.dump / "shared",
            on_record=progress.on_pass,
        )
        step = score.copy()
        step_dump = config.dump and config.dump / "step"
        records += run_passes(
            step, step_passes(config), facts={"canonical"}, probe=probe, dump=step_dump, on_record=progress.on_pass
        )
    with writing(config.output, force=config.force) as folder:
        manifest = _write(folder, captured, score, step, records, config, progress)
        if windows is not None:
            accuracy = _evaluate(folder, windows, config, progress)
            manifest = _finish(folder, manifest.model_copy(update={"accuracy": accuracy, "stages": progress.seconds}))
    return config.output


def _evaluation_windows(captured: Captured, config: CompileConfig) -> Windows | None:
    """The text of `--eval`, ready to be run; refused here, before the work, if it cannot be."""
    if config.evaluate is None:
        return None
    assert captured.checkpoint is not None
    if captured.checkpoint.tokenizer is None:
        raise UsageError(f"{config.source}: has no tokenizer, so it cannot be evaluated on a text")
    tokenizer = tokenizers.Tokenizer.from_str(captured.checkpoint.tokenizer.json)
    text, limit = read_text(config.evaluate), captured.record.max_model_len
    return make_windows(tokenizer, text, config.evaluate.name, limit=limit)


def _evaluate(folder: Path, windows: Windows, config: CompileConfig, progress: Progress) -> AccuracyRecord:
    isa = config.target.isa
    native = isa is None or supports(isa)  # code for a better processor than this one cannot be run here
    with progress.stage("evaluate"):
        artifact = open_artifact(folder)
        reference = load_reference(config.source, artifact, windows, adapter=config.adapter)
        return evaluate_windows(
            artifact,
            windows,
            reference,
            against=config.source,
            native=native,
            on_fraction=progress.on_fraction,
        )


def _prepared(
    captured: Captured, config: CompileConfig, progress: Progress
) -> tuple[Captured, CompileConfig, Calibration | None]:
    """The recipe as it can be carried out, the data to calibrate on if it uses any, and notes about both."""
    if config.recipe is None:
        return captured, config, None
    with progress.stage("calibration data"):
        recipe, calibration, notes = prepare_calibration(
            config.recipe,
            captured.checkpoint,
            config.calibration,
            num_samples=config.calibration_samples,
            sequence_length=config.calibration_length,
            seed=config.seed,
        )
    return _with_notes(captured, notes), replace(config, recipe=recipe), calibration


def _with_notes(captured: Captured, notes: list[str]) -> Captured:
    record = captured.record
    return replace(captured, record=record.model_copy(update={"notes": (*record.notes, *notes)}))


def _overlap_notes(calibration: Calibration | None, windows: Windows | None, progress: Progress) -> list[str]:
    """A warning, if the figures of `--eval` are not to be trusted."""
    if calibration is None or windows is None or (share := overlap(calibration, windows.tokens)) <= _MOST_OVERLAP:
        return []
    warning = (
        f"{share:.1%} of {windows.source} is also in the calibration data {calibration.source}: its accuracy figures are too "
        "good; evaluate on another text"
    )
    progress.on_warning(warning)
    return [warning]


def _write(
    folder: Path,
    captured: Captured,
    score: Program,
    step: Program,
    records: list[PassRecord],
    config: CompileConfig,
    progress: Progress,
) -> Manifest:
    (folder / "program").mkdir()
    encoded = {}
    for file, program in ((STEP_FILE, step), (SCORE_FILE, score)):
        encoded[file] = encode_program(program.module, [spec.name for spec in program.inputs])
        write_program(folder / file, encoded[file])
    with progress.stage("write weights"):
        constants = write_weights(
            folder, step.weights() | score.weights(), score.sources | step.sources, score.layouts | step.layouts
        )
    native = (_lower(folder, step, config, progress),) if config.backend == "inductor" else ()
    tokenizer = _write_tokenizer(folder, captured.checkpoint)
    if captured.checkpoint is not None:
        _write_small_files(folder / CHECKPOINT_FOLDER, captured.checkpoint)
    with progress.stage("hash files"):
        files = file_records(folder)
    manifest = Manifest(
        identity="",
        checksum="",
        created_by=Versions(optc=__version__, torch=torch.__version__, transformers=version("transformers")),
        target=config.target.name,
        backend=config.backend,
        model=captured.record,
        block_size=config.block_size,
        kv_cache=tuple(step.kv_cache),
        step=step.spec(STEP_FILE),
        score=score.spec(SCORE_FILE),
        constants=constants,
        required_ops=tuple(sorted({op for program in encoded.values() for op in program_ops(program)})),
        native=native,
        quantization=score.quantization,
        accuracy=None,
        passes=tuple(records),
        stages=progress.seconds,
        memory=_memory_plan(folder, step.kv_cache, config),
        tokenizer=tokenizer,
        eos_token_ids=_eos_token_ids(captured.checkpoint),
        generation=_sampling_defaults(captured.checkpoint),
        files=files,
    )
    return _finish(folder, manifest.model_copy(update={"identity": identity_of(manifest)}))


def _finish(folder: Path, manifest: Manifest) -> Manifest:
    """Write the report and the manifest, which from here on has its checksum."""
    known = {name: record for name, record in manifest.files.items() if name != REPORT_FILE}
    (folder / REPORT_FILE).write_text(report_html(manifest), encoding="utf-8")
    manifest = manifest.model_copy(update={"files": file_records(folder, known=known)})
    manifest = manifest.model_copy(update={"checksum": checksum_of(manifest)})
    write_manifest(folder, manifest)
    return manifest


def _lower(folder: Path, step: Program, config: CompileConfig, progress: Progress) -> NativeCode:
    target = config.target
    torch_version = ".".join(torch.__version__.split(".")[:2])
    if not target.can_build_here():
        return NativeCode(
            target=target.name,
            backend="inductor",
            status="pending",
            cpu_features=(),
            torch_version=torch_version,
            constants={},
            step=None,
            kernels=None,
            reason=f"code for {target.architecture} is made on a {target.name}; until then the portable program runs",
        )
    from .lowering.inductor import compile_step, constant_names
    from .lowering.native import build_kernels

    code = folder / "code" / target.name
    code.mkdir(parents=True)
    assert target.isa is not None
    with progress.stage("compile kernels"):
        (code / "kernels.so").write_bytes(build_kernels(target.isa).read_bytes())
    with progress.stage("compile step program"):
        features = compile_step(step, target, code / "step.pt2")
    return NativeCode(
        target=target.name,
        backend="inductor",
        status="ready",
        cpu_features=features,
        torch_version=torch_version,
        constants={code_name: name for name, code_name in constant_names(step).items()},
        step=f"code/{target.name}/step.pt2",
        kernels=f"code/{target.name}/kernels.so",
    )


def _write_tokenizer(folder: Path, checkpoint: Checkpoint | None) -> TokenizerRecord | None:
    if checkpoint is None or checkpoint.tokenizer is None:
        return None
    data = checkpoint.tokenizer
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/tokenizer.json").write_text(data.json, encoding="utf-8")
    if data.chat_template:
        (folder / "tokenizer/chat_template.jinja").write_text(data.chat_template, encoding="utf-8")
    return TokenizerRecord(
        tokenizer="tokenizer/tokenizer.json",
        chat_template="tokenizer/chat_template.jinja" if data.chat_template else None,
        bos_token=data.bos_token,
        eos_token=data.eos_token,
    )


def _write_small_files(folder: Path, checkpoint: Checkpoint) -> None:
    """What `optc export` makes a checkpoint with again; a runtime needs none of it."""
    folder.mkdir()
    for name, content in checkpoint.files.items():
        (folder / name).write_text(content, encoding="utf-8")


def _memory_plan(folder: Path, layers: list[KVCacheSpec], config: CompileConfig) -> MemoryPlan:
    weight_bytes = sum(path.stat().st_size for path in folder.glob("weights*.safetensors"))
    per_token = sum(spec.bytes_per_token(getattr(torch, spec.dtype).itemsize) for spec in layers)
    bandwidth = config.target.bandwidth_gbs
    floor = weight_bytes / (bandwidth * 1e6) if bandwidth else None
    return MemoryPlan(weight_bytes=weight_bytes, kv_bytes_per_token=per_token, decode_floor_ms=floor)


def _eos_token_ids(checkpoint: Checkpoint | None) -> tuple[int, ...]:
    """From generation_config.json, else config.json, as transformers' generate has it."""
    if checkpoint is None:
        return ()
    found = checkpoint.generation.get("eos_token_id", getattr(checkpoint.config, "eos_token_id", None))
    return tuple(found) if isinstance(found, list) else (found,) if isinstance(found, int) else ()


def _sampling_defaults(checkpoint: Checkpoint | None) -> dict[str, float | int | bool]:
    """The sampling parameters of generation_config.json, for `optc run` and the server to start from."""
    if checkpoint is None:
        return {}
    names = ("do_sample", "temperature", "top_k", "top_p")
    return {name: value for name in names if isinstance(value := checkpoint.generation.get(name), bool | int | float)}


__all__ = ["Progress", "compile"]
