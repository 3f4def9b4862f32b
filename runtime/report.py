"""What is in an artifact, as tables: for the terminal after a compilation, for `optc inspect`, and for report.html."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

from .manifest import AccuracyRecord, BudgetRecord, Estimate, KVCacheSpec, Manifest, Quantization, QuantizedLayer
from .scheme import QuantizationArgs


def report_tables(manifest: Manifest, *, layers: bool = False) -> Iterator[RenderableType]:
    """Tables of a manifest, the most important first; with `layers`, one row for each quantized weight."""
    yield _summary(manifest)
    if manifest.accuracy is not None:
        yield accuracy_table(manifest.accuracy)
    yield _kv_cache(manifest)
    if manifest.quantization is not None and manifest.quantization.layers:
        yield _quantization(manifest.quantization)
        if layers:
            yield _layers(manifest.quantization)
    yield _passes(manifest)
    if manifest.stages:
        yield _stages(manifest)
    yield _files(manifest)


def report_html(manifest: Manifest) -> str:
    """All tables as one HTML page."""
    console = Console(record=True, width=130, file=io.StringIO())
    for table in report_tables(manifest, layers=True):
        console.print(table)
    return console.export_html(inline_styles=True)


def format_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _plain(text: str) -> str:
    """Text of a manifest as it is: no markup, and no control characters for the terminal."""
    return escape("".join(c if c.isprintable() or c == "\n" else "?" for c in text))


def _add_row(table: Table, *cells: str) -> None:
    table.add_row(*map(_plain, cells))


def _summary(manifest: Manifest) -> Table:
    model, memory = manifest.model, manifest.memory
    table = Table(title=_plain(model.source), show_header=False, title_justify="left")
    _add_row(
        table, "model", f"{model.architecture} ({model.model_type}), {model.parameters:,} parameters, {model.dtype}"
    )
    _add_row(table, "context", f"{model.max_model_len:,} tokens; vocabulary {model.vocab_size:,}")
    _add_row(table, "target", f"{manifest.target}, backend {manifest.backend}")
    for code in manifest.native:
        state = "ready" if code.status == "ready" else f"pending: {code.reason}"
        _add_row(table, "native code", f"{code.target}: {state}")
    _add_row(
        table,
        "weights",
        f"{format_bytes(memory.weight_bytes)}, {8 * memory.weight_bytes / max(1, model.parameters):.2f} bits a parameter",
    )
    if (quantization := manifest.quantization) is not None:
        _add_quantization(table, quantization)
    _add_row(
        table, "KV cache", f"{format_bytes(memory.kv_bytes_per_token)} a token, blocks of {manifest.block_size} tokens"
    )
    if memory.decode_floor_ms is not None:
        _add_row(
            table,
            "decode floor",
            f"{memory.decode_floor_ms:.2f} ms a token for one sequence (weights / memory bandwidth)",
        )
    _add_row(table, "tokenizer", "yes" if manifest.tokenizer else "none; takes token ids")
    for note in model.notes:
        _add_row(table, "note", note)
    _add_row(
        table,
        "made by",
        f"optc {manifest.created_by.optc}, torch {manifest.created_by.torch}, transformers {manifest.created_by.transformers}",
    )
    _add_row(table, "identity", manifest.identity)
    return table


def _add_quantization(table: Table, quantization: Quantization) -> None:
    if quantization.layers:
        bits, count = quantization.bits_per_weight, len(quantization.layers)
        _add_row(table, "quantized", f"{count} matrices, {bits:.3f} bits a weight, scales and zero points included")
    if quantization.kv_cache_scheme is not None:
        _add_row(table, "KV cache scheme", _scheme_text(quantization.kv_cache_scheme))
    if (calibration := quantization.calibration) is not None:
        drawn = f"{calibration.num_samples} x {calibration.sequence_length} tokens, seed {calibration.seed}"
        _add_row(table, "calibrated on", f"{calibration.source}, {drawn}")
    if quantization.budget is not None:
        _add_row(table, "budget", _budget_text(quantization.budget))


def _budget_text(budget: BudgetRecord) -> str:
    """What was asked for, and what the joint measurement of the chosen mix found."""
    limits = {
        "KL {:g}": budget.max_kl,
        "perplexity +{:g} %": None if budget.max_ppl_increase is None else 100 * budget.max_ppl_increase,
        "{:g} bits a weight": budget.bits,
    }
    measured = {
        "KL {:.5f}": budget.kl,
        "perplexity {:+.3f} %": None if budget.ppl_increase is None else 100 * budget.ppl_increase,
        "{:.3f} bits a weight": budget.bits_per_weight,
    }
    asked, found = (
        ", ".join(form.format(value) for form, value in values.items() if value is not None)
        for values in (limits, measured)
    )
    return f"at most {asked}; measured: {found or 'nothing'}"


def _scheme_text(args: QuantizationArgs) -> str:
    kind = "FP8 E4M3" if args.type == "float" else f"INT{args.num_bits}"
    when = "computed as it is written" if args.dynamic else "stored"
    return f"{kind}, a scale a {args.strategy}, {when}"


def accuracy_table(accuracy: AccuracyRecord) -> Table:
    """The figures of an evaluation with their standard errors, and how they were measured."""
    figures = accuracy.figures
    start = "each behind the tokenizer's first token, " if accuracy.prefix else ""
    code = "native code" if accuracy.native else "portable program"
    caption = (
        f"{figures.tokens:,} tokens in {figures.windows} windows of {accuracy.window}, not overlapping, {start}by the "
        f"{code}; standard errors over windows"
    )
    against = f" against {accuracy.reference} " if accuracy.reference else " "
    title = f"Accuracy{against}on {accuracy.text}"
    table = Table(
        "", "value", "standard error", title=_plain(title), title_justify="left", caption=caption, min_width=90
    )
    rows: list[tuple[str, Estimate | None, float, str]] = [
        ("perplexity", figures.perplexity, 1, ".3f"),
        ("perplexity of the reference", figures.reference_perplexity, 1, ".3f"),
        ("perplexity, difference", figures.perplexity_delta, 1, "+.4f"),
        ("perplexity, increase in %", figures.perplexity_increase, 100, "+.3f"),
        ("KL divergence, mean, nats", figures.kl_mean, 1, ".6f"),
        ("KL divergence, 99 %", figures.kl_p99, 1, ".5f"),
        ("KL divergence, 99.9 %", figures.kl_p999, 1, ".5f"),
        ("same most likely token, %", figures.same_top, 100, ".3f"),
    ]
    for name, estimate, unit, form in rows:
        if estimate is not None:
            error = estimate.standard_error
            plain = form.removeprefix("+")
            _add_row(
                table, name, f"{unit * estimate.value:{form}}", "-" if error is None else f"{unit * error:{plain}}"
            )
    return table


def _quantization(quantization: Quantization) -> Table:
    """One row for the weights of a role that have the same scheme and algorithm."""
    table = Table("role", "layers", "count", title="Quantization", title_justify="left")
    for name in ("scheme", "algorithm", "bits", "error"):
        table.add_column(name, no_wrap=True)
    groups: dict[tuple[str, str, str], list[QuantizedLayer]] = {}
    for layer in quantization.layers:
        groups.setdefault((layer.role, layer.scheme, layer.algorithm), []).append(layer)
    for (role, scheme, algorithm), members in groups.items():
        numbers = sorted({number for layer in members if (number := _layer_number(layer.name)) is not None})
        bits = _range([layer.bits_per_weight for layer in members], ".3f")
        errors = _range([layer.error for layer in members if layer.error is not None], ".4f")
        _add_row(table, role, _runs(numbers), str(len(members)), scheme, algorithm, bits, errors)
    return table


def _layers(quantization: Quantization) -> Table:
    table = Table(title="Quantized weights", title_justify="left")
    for name in ("weight", "scheme", "algorithm", "bits", "error"):
        table.add_column(name, no_wrap=True)
    for layer in quantization.layers:
        error = "-" if layer.error is None else f"{layer.error:.4f}"
        name, bits = layer.name.removesuffix(".weight"), f"{layer.bits_per_weight:.3f}"
        _add_row(table, name, layer.scheme, layer.algorithm, bits, error)
    return table


def _layer_number(name: str) -> int | None:
    """The number of the layer that a tensor belongs to, which is the first in its name."""
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(found[1]) if found else None


def _runs(numbers: list[int]) -> str:
    """0-5, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs) or "-"


def _range(values: list[float], form: str) -> str:
    """The least and the greatest."""
    if not values:
        return "-"
    least, greatest = f"{min(values):{form}}", f"{max(values):{form}}"
    return least if least == greatest else f"{least}-{greatest}"


def _kv_cache(manifest: Manifest) -> Table:
    """One row for each run of layers with the same geometry."""
    table = Table("layers", "KV heads", "K dim", "V dim", "window", "dtype", title="KV cache", title_justify="left")
    runs: list[tuple[int, KVCacheSpec]] = []
    for spec in manifest.kv_cache:
        if runs and runs[-1][1].model_copy(update={"layer": spec.layer}) == spec:
            runs[-1] = (runs[-1][0], spec)
        else:
            runs.append((spec.layer, spec))
    for first, spec in runs:
        layers = str(first) if first == spec.layer else f"{first}-{spec.layer}"
        _add_row(
            table, layers, str(spec.kv_heads), str(spec.k_dim), str(spec.v_dim), str(spec.window or "all"), spec.dtype
        )
    return table


def _passes(manifest: Manifest) -> Table:
    table = Table("pass", "matches", "declined", "nodes", "max error", "seconds", title="Passes", title_justify="left")
    for record in manifest.passes:
        error = "not checked" if record.max_error is None else f"{record.max_error:.1e}"
        declined = "\n".join(record.declined) or "-"
        _add_row(
            table, record.name, str(record.matches), declined, f"{record.node_delta:+d}", error, f"{record.seconds:.2f}"
        )
    return table


def _stages(manifest: Manifest) -> Table:
    table = Table("stage", "seconds", title="Compilation", title_justify="left")
    for name, seconds in manifest.stages.items():
        _add_row(table, name, f"{seconds:.1f}")
    _add_row(table, "total", f"{sum(manifest.stages.values()):.1f}")
    return table


def _files(manifest: Manifest) -> Table:
    table = Table("file", "size", "sha256", title="Files", title_justify="left")
    for name, record in manifest.files.items():
        _add_row(table, name, format_bytes(record.size), record.sha256[:16])
    return table
