"""The compiler driver: checkpoint -> graph -> passes -> programs -> native code -> artifact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import tokenizers
import torch
from torch import Tensor, nn

from ..errors import CheckpointError, UsageError
from ..passes.base import Pass, run_passes
from ..passes.graph import Program
from ..passes.quantize.calibrate import Calibration
from ..passes.quantize.recipe import Recipe
from ..passes.verify import Probe
from ..runtime.artifact import open_artifact
from ..runtime.manifest import AccuracyRecord, PassRecord
from ..runtime.ops.kernels import supports
from .assemble import finish_artifact, write_artifact
from .budget import Budget, check_accuracy, check_budget, choose_mix
from .calibration import check_calibration, measuring_samples, overlap, prepare_calibration
from .captured import Captured, capture_checkpoint, capture_plain_module
from .config import Backend, CompileConfig
from .evaluate import Windows, evaluate_windows, load_reference, make_windows, read_text
from .package import check_output, writing
from .pipeline import float_passes, kernel_passes, quantize_passes, step_passes
from .progress import Progress
from .quantization import PRESETS, given_recipe, make_recipe
from .targets import find_target

_MOST_OVERLAP = 0.01  # of evaluation text in the calibration data


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
    max_kl: float | None = None,
    max_ppl_increase: float | None = None,
    bits: float | None = None,
    evaluate: str | Path | None = None,
    force: bool = False,
    dump: str | Path | None = None,
    verify: bool = True,
    block_size: int = 8,
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
        max_kl, max_ppl_increase, bits: the accuracy budget, see `Budget`: mean KL divergence in nats, increase of the
            perplexity as a fraction, bits a weight. With a preset (or none: int4) the schemes are chosen to keep it; with a
            scheme or a recipe it is only checked.
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
    for what, value, least in (("samples", calibration_samples, 1), ("length", calibration_length, 2)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UsageError(f"calibration {what} {value}: expected a whole number, {least} or more")
    hardware = find_target(target)
    budget = None
    if not max_kl is max_ppl_increase is bits is None:
        budget = Budget(max_kl=max_kl, max_ppl_increase=max_ppl_increase, bits=bits)
        quantize = "int4" if quantize is None else quantize
    config = CompileConfig(
        source=str(model) if isinstance(model, str | Path) else type(model).__name__,
        output=Path(output),
        target=hardware,
        backend=backend,
        dtype=dtype,
        adapter=Path(adapter) if adapter is not None else None,
        recipe=make_recipe(
            quantize,
            hardware,
            algorithm=algorithm,
            kv_cache=kv_cache,
            with_head=budget is None or quantize not in PRESETS,
        ),
        calibration=Path(calibration) if calibration is not None else None,
        calibration_samples=calibration_samples,
        calibration_length=calibration_length,
        seed=seed,
        budget=budget,
        choose=quantize in PRESETS,
        evaluate=Path(evaluate) if evaluate is not None else None,
        force=force,
        dump=Path(dump) if dump is not None else None,
        verify=verify,
        block_size=block_size,
        max_model_len=max_model_len,
    )
    if budget is not None and (config.recipe is None or not config.recipe.scheme_names()):
        raise UsageError(
            f"a budget ({budget}) is for quantized weights, and the recipe has none; choose --int4, or add rules"
        )
    check_output(config.output, force=config.force)
    if config.calibration is not None:
        check_calibration(config.calibration)
    if config.evaluate is not None:
        read_text(config.evaluate)  # fails now, not after the model is loaded
    progress = progress or Progress()
    if isinstance(model, nn.Module):
        captured = capture_plain_module(model, example_inputs, config, progress)
    else:
        captured = capture_checkpoint(config, progress)
        if captured.checkpoint is not None and captured.checkpoint.quantized is not None:
            config = replace(config, recipe=given_recipe(captured.checkpoint.quantized, config.recipe))
    return _build(captured, config, progress)


def _build(captured: Captured, config: CompileConfig, progress: Progress) -> Path:
    captured, config, calibration = _prepared(captured, config, progress)
    samples = _budget_samples(captured, config, calibration)
    windows = _evaluation_windows(captured, config)
    captured = _with_notes(captured, _overlap_notes(calibration, windows, progress))
    score, records = captured.program, list[PassRecord]()
    _check_finite(score)

    def run(program: Program, passes: list[Pass], stage: str) -> None:
        facts = {"canonical"} if records else ()
        dump = config.dump and config.dump / stage
        records.extend(run_passes(program, passes, facts=facts, probe=probe, dump=dump, on_record=progress.on_pass))

    model = captured.record
    probe = Probe.random(model.vocab_size, model.max_model_len) if config.verify else None
    with progress.stage("passes"):
        run(score, float_passes(config, calibration, progress.on_fraction), "shared")
    budget_record = None
    if config.budget is not None and config.recipe is not None and config.choose:
        with progress.stage("choose schemes"):
            recipe, budget_record = choose_mix(
                score, config.recipe, config.budget, calibration, samples, on_progress=progress.on_fraction
            )
        config = replace(config, recipe=recipe)
    if config.recipe is not None:
        original = score.copy()
        with progress.stage("quantize"):
            run(score, quantize_passes(config, calibration, captured.given, progress.on_fraction), "quantize")
        if config.budget is not None:
            budget_record = budget_record or check_budget(original, score, config.budget, samples)
            assert score.quantization is not None
            score.quantization = score.quantization.model_copy(update={"budget": budget_record})
    with progress.stage("kernel passes"):
        run(score, kernel_passes(config), "kernels")
    step = score.copy()
    with progress.stage("step program"):
        run(step, step_passes(config), "step")
    with writing(config.output, force=config.force) as folder:
        manifest = write_artifact(folder, captured, score, step, records, config, progress)
        if windows is not None:
            accuracy = _evaluate(folder, windows, config, progress)
            if config.budget is not None:
                check_accuracy(config.budget, accuracy)
            finish_artifact(folder, manifest.model_copy(update={"accuracy": accuracy, "stages": progress.seconds}))
    return config.output


def _check_finite(program: Program) -> None:
    """Refuse weights that are no numbers, before a pass is blamed for what they do."""
    for name, weight in program.weights().items():
        # Tables that the model computes may hold infinities on purpose, as masks do.
        if isinstance(weight, nn.Parameter) and not torch.isfinite(weight).all():
            kind = "NaN" if torch.isnan(weight).any() else "Inf"
            raise CheckpointError(f"{name} holds {kind}; the checkpoint is damaged, download it again")


def _budget_samples(captured: Captured, config: CompileConfig, calibration: Calibration | None) -> list[Tensor]:
    """What the budget is measured on; refused here, before the work, if there is nothing."""
    if config.budget is None:
        return []
    has_limit = config.budget.max_kl is not None or config.budget.max_ppl_increase is not None
    if has_limit and config.recipe is not None and config.recipe.kv_cache is not None and config.evaluate is None:
        raise UsageError(
            f"the budget ({config.budget}) together with an {config.recipe.kv_cache} KV cache: what that costs is measured "
            "in the artifact alone; give a text with --eval"
        )
    return measuring_samples(
        captured.checkpoint,
        config.calibration,
        num_samples=config.calibration_samples if calibration is not None else 0,
        sequence_length=config.calibration_length,
        seed=config.seed,
    )


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
    if config.budget is not None and not config.recipe.uses_calibration:
        return captured, config, None  # the data is only measured on
    with progress.stage("calibration data"):
        recipe, calibration, notes = prepare_calibration(
            config.recipe,
            captured.checkpoint,
            config.calibration,
            num_samples=config.calibration_samples,
            sequence_length=config.calibration_length,
            seed=config.seed,
        )
    for note in notes:
        progress.on_warning(note)
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


__all__ = ["Progress", "compile"]
