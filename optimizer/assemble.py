"""From programs to the files of an artifact: weights, programs, native code, tokenizer, report, manifest."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import torch

from .. import __version__
from ..passes.graph import Program
from ..runtime.manifest import (
    KVCacheSpec,
    Manifest,
    MemoryPlan,
    NativeCode,
    PassRecord,
    TokenizerRecord,
    Versions,
    checksum_of,
    identity_of,
)
from ..runtime.program import encode_program, program_ops, write_program
from ..runtime.report import report_html
from .captured import Captured
from .checkpoint import Checkpoint
from .config import CompileConfig
from .package import CHECKPOINT_FOLDER, file_records, write_manifest, write_weights
from .progress import Progress

STEP_FILE, SCORE_FILE, REPORT_FILE = "program/step.json", "program/score.json", "report.html"


def write_artifact(
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
            folder,
            step.weights() | score.weights(),
            score.sources | step.sources,
            score.layouts | step.layouts,
            score.merged | step.merged,
            score.panels | step.panels,
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
    return finish_artifact(folder, manifest.model_copy(update={"identity": identity_of(manifest)}))


def finish_artifact(folder: Path, manifest: Manifest) -> Manifest:
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
    from .lowering.shims import shims_digest

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
        shims=shims_digest(),
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
    names = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return {name: value for name in names if isinstance(value := checkpoint.generation.get(name), bool | int | float)}
