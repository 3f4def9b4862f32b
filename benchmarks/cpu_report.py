"""Results of `benchmarks/cpu.py`: the JSON file, the tables for RESULTS.md, and the plots, all made of the whole file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16")
COLOURS = {
    "optc": "#c0392b", "llama.cpp": "#2980b9", "OpenVINO": "#8e44ad", "ONNX Runtime": "#27ae60", "transformers": "#7f8c8d"
}  # fmt: skip
console = Console(width=150)


class Results:
    """The JSON file; figures of earlier calls stay until they are measured again."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._data: dict[str, Any] = {"speed": {}, "accuracy": {}}
        if file.exists():
            self._data |= json.loads(file.read_text())

    def add_speed(self, model: str, kind: str, case: str, title: str, found: dict[str, Any]) -> None:
        """One case: all its engines come from one alternating run."""
        group = self._data["speed"].setdefault(f"{model} {kind}", {})
        group[case] = {"title": title, "date": _now(), **found}
        self._save()

    def add_accuracy(self, kind: str, found: dict[str, Any]) -> None:
        kept = self._data["accuracy"].setdefault(kind, {})
        kept |= {name: {"date": _now(), "figures": figures} for name, figures in found.items()}
        self._save()

    def _save(self) -> None:
        self._data["machine"] = machine()
        self._file.write_text(json.dumps(self._data, indent=1))

    def write(self) -> None:
        """Write the tables and plots beside the JSON file."""
        pages = [f"## CPU, beside the peers: `python benchmarks/cpu.py`\n\n{_machine_line(self._data['machine'])}\n"]
        for group, cases in self._data["speed"].items():
            accuracy = self._data["accuracy"].get(group.split()[-1], {})
            pages.append(group_section(group, cases, accuracy))
            plot(group, cases, self._file.with_name(f"cpu-{group.replace(' ', '-')}.png"))
        target = self._file.with_suffix(".md")
        target.write_text("\n".join(pages))
        console.print(f"wrote {self._file}, {target} and plots beside them", soft_wrap=True)


def machine() -> dict[str, Any]:
    """Processor, what it can do, and memory."""
    info = Path("/proc/cpuinfo").read_text()
    fields = dict(
        line.split("\t:", 1) for line in info.split("\n\n")[0].replace("\t\t:", "\t:").splitlines() if "\t:" in line
    )
    flags = set(fields.get("flags", "").split())
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    compiler = subprocess.run(["g++", "-dumpfullversion"], capture_output=True, text=True, check=False)
    return {
        "processor": fields.get("model name", "unknown").strip(),
        "family": f"family {fields.get('cpu family', '?').strip()} model {fields.get('model', '?').strip()}",
        "cores": os.cpu_count(),
        "features": [name for name in FEATURES if name in flags],
        "memory_bytes": pages,
        "python": platform.python_version(),
        "compiler": f"g++ {compiler.stdout.strip()}",
        "kernel": platform.release(),
    }


def _now() -> str:
    return datetime.datetime.now().isoformat(timespec="minutes")


def _machine_line(found: dict[str, Any]) -> str:
    return (
        f"{found['cores']} cores of an {found['processor']} ({found['family']}; {', '.join(found['features'])}), "
        f"{found['memory_bytes'] / 2**30:.0f} GiB, no GPU; Python {found['python']}, {found['compiler']}."
    )


def print_case(kind: str, title: str, engines: dict[str, dict[str, Any]], bandwidth: float) -> None:
    """One case on the terminal."""
    table = Table(
        "engine", "tokens/s", "optc is", "step ms", "model alone", "MB a step", "roofline",
        title=f"{kind}, {title}; {bandwidth / 1e9:.1f} GB/s", title_justify="left",
    )  # fmt: skip
    ours = engines.get("optc")
    for name, found in engines.items():
        inner = found["model_seconds"]
        table.add_row(
            name,
            rate_cell(found),
            f"{ours['rate'] / found['rate']:.2f}x" if ours and name != "optc" else "",
            f"{1e3 * found['step_seconds']:.2f}",
            f"{1e3 * inner:.2f}" if inner else "",
            f"{found['bytes'] / 1e6:.0f}" if "bytes" in found else "",
            f"{found['roofline']:.0%}" if "roofline" in found else "",
        )
    console.print(table)


def print_accuracy(kind: str, name: str, figures: dict[str, Any]) -> None:
    console.print(f"{kind}, {name}: KL {kl_cell(figures)}, same top {figures['same_top']['value']:.2%}")


def rate_cell(found: dict[str, Any]) -> str:
    """Median, least and most; a star if the machine was not steady in any round."""
    values = (found["rate"], min(found["rates"]), max(found["rates"]))
    mid, low, high = (f"{value:.0f}" if found["rate"] >= 100 else f"{value:.1f}" for value in values)
    return f"{mid} ({low}-{high}){'' if found['steady'] else ' *'}"


def kl_cell(figures: dict[str, Any]) -> str:
    kl = figures["kl_mean"]
    return f"{kl['value']:.6f} ± {kl['standard_error']:.6f}"


def group_section(group: str, cases: dict[str, Any], accuracy: dict[str, Any]) -> str:
    """Tables of a model in a format, in Markdown."""
    names = list(dict.fromkeys(name for case in cases.values() for name in case["engines"]))
    peers = [name for name in names if name != "optc"]
    lines = [f"### {group}", "", _row("tokens/s", *names, "optc / best peer"), _row(*["---"] * (len(names) + 2))]
    for case in cases.values():
        engines = case["engines"]
        best = max((engines[name]["rate"] for name in peers if name in engines), default=None)
        ratio = f"{engines['optc']['rate'] / best:.2f}x" if best and "optc" in engines else ""
        lines.append(_row(case["title"], *(rate_cell(engines[n]) if n in engines else "" for n in names), ratio))
    if accuracy:
        cells = [kl_cell(accuracy[name]["figures"]) if name in accuracy else "not measured" for name in names]
        lines.append(_row("KL divergence, nats (bundled model)", *cells, ""))
    lines += ["", *_roofline(cases, names), "", *_notes(cases, names, accuracy), ""]
    return "\n".join(lines)


def _roofline(cases: dict[str, Any], names: list[str]) -> list[str]:
    """Bytes of a decode step, and what fraction of the time the memory needs for them the step takes."""
    lines = [_row("MB a step; share of the roofline", *names, "bandwidth"), _row(*["---"] * (len(names) + 2))]
    for case in cases.values():
        cells = []
        for name in names:
            found = case["engines"].get(name, {})
            cells.append(f"{found['bytes'] / 1e6:.0f}; {found['roofline']:.0%}" if "roofline" in found else "")
        if any(cells):
            lines.append(_row(case["title"], *cells, f"{case['bandwidth'] / 1e9:.1f} GB/s"))
    return lines


def _notes(cases: dict[str, Any], names: list[str], accuracy: dict[str, Any]) -> list[str]:
    """Versions and what each engine runs; optc's own overhead; other accuracies."""
    lines = []
    for name in names:
        details = next(case["engines"][name]["details"] for case in cases.values() if name in case["engines"])
        versions = ", ".join(f"{package} {number}" for package, number in details["versions"].items())
        notes = "; ".join(f"{key} {value}" for key, value in details["notes"].items())
        lines.append(f"- {name}: {versions}. {notes}.")
    shares = [
        f"{1e3 * (found['step_seconds'] - found['model_seconds']):.2f} ms of {1e3 * found['step_seconds']:.2f} ({title})"
        for title, found in ((case["title"], case["engines"].get("optc")) for case in cases.values())
        if found and found["model_seconds"]
    ]
    if shares:
        lines.append(f"- optc's step outside the model: {', '.join(shares)}.")
    for name, found in accuracy.items():
        figures = found["figures"]
        rise = figures["perplexity_increase"]["value"]
        lines.append(
            f"- Accuracy, {name}: KL {kl_cell(figures)}, same top {figures['same_top']['value']:.2%}, perplexity {rise:+.2%} "
            f"({figures['windows']} windows, {figures['tokens']} tokens)."
        )
    dates = sorted({(case["date"], case["threads"]) for case in cases.values()})
    if any(not found["steady"] for case in cases.values() for found in case["engines"].values()):
        lines.append(
            "- \\*: in every round the memory's bandwidth was low, or other programs ran; the engine may be faster."
        )
    lines.append("- Measured " + ", ".join(f"{date}, {threads} threads" for date, threads in dates) + ".")
    return lines


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def plot(group: str, cases: dict[str, Any], file: Path) -> None:
    """A panel a case: each engine's median tokens/s, with least and most; decode also the roofline's share."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(4, len(cases))
    rows = -(-len(cases) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 2.6 * rows), squeeze=False)
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    for axis, case in zip(axes.flat, cases.values(), strict=False):
        engines = case["engines"]
        rates = [found["rate"] for found in engines.values()]
        spread = [
            [found["rate"] - min(found["rates"]) for found in engines.values()],
            [max(found["rates"]) - found["rate"] for found in engines.values()],
        ]
        colours = [next((c for start, c in COLOURS.items() if name.startswith(start)), "#444444") for name in engines]
        axis.barh(range(len(engines)), rates, xerr=spread, color=colours, capsize=2)
        axis.set_yticks(range(len(engines)), list(engines), fontsize=7)
        axis.invert_yaxis()
        axis.set_title(f"{case['title']}", fontsize=8)
        axis.set_xlabel("tokens/s", fontsize=7)
        axis.tick_params(axis="x", labelsize=7)
        axis.set_xlim(0, 1.45 * max(max(found["rates"]) for found in engines.values()))
        for place, found in enumerate(engines.values()):
            share = f", {found['roofline']:.0%}" if "roofline" in found else ""
            axis.text(max(found["rates"]), place, f"  {found['rate']:.0f}{share}", va="center", fontsize=6)
    figure.suptitle(f"{group}: tokens/s, median, least and most; share of the roofline", fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)
