"""What is in an artifact, as tables: for the terminal after a compilation, for `optc inspect`, and for report.html."""

from __future__ import annotations

import io
from collections.abc import Iterator

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

from .manifest import KVCacheSpec, Manifest


def report_tables(manifest: Manifest) -> Iterator[RenderableType]:
    """Tables of a manifest, the most important first."""
    yield _summary(manifest)
    yield _kv_cache(manifest)
    yield _passes(manifest)
    if manifest.stages:
        yield _stages(manifest)
    yield _files(manifest)


def report_html(manifest: Manifest) -> str:
    """The same tables as one HTML page."""
    console = Console(record=True, width=130, file=io.StringIO())
    for table in report_tables(manifest):
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
