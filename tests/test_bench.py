"""`optc bench`: the figures are what they say, and the commands measure a real engine."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from optc.cli import main
from optc.errors import UsageError
from optc.runtime.bench.figures import Served, distribution, parse_slo, summarize
from optc.runtime.bench.workload import Lengths, arrival_times, from_file, prefix_repetition, synthetic


def bench(*arguments: object) -> str:
    done = CliRunner().invoke(main, ["bench", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_times_of_a_request() -> None:
    one = Served(10, sent=1.0, arrivals=[(1.5, 1), (1.7, 1), (2.3, 3)])
    assert (one.ttft, one.e2e, one.num_tokens) == (pytest.approx(0.5), pytest.approx(1.3), 5)
    assert one.tpot == pytest.approx(0.8 / 4)
    assert one.itl == pytest.approx([0.2, 0.2, 0.2, 0.2])
    assert Served(1, 0.0, [(1.0, 1)]).tpot is None


def test_summary_and_goodput() -> None:
    fast = Served(10, 0.0, [(0.1, 1), (0.2, 1)])
    slow = Served(10, 0.0, [(0.9, 1), (1.0, 1)])
    failed = Served(10, 0.0, [], error="x")
    found = summarize([fast, slow, failed], 2.0, parse_slo("ttft:500ms,tpot:150ms"))
    assert (found["requests"], found["failed"], found["generated_tokens"]) == (3, 1, 4)
    assert found["total_tokens_per_second"] == 12.0 and found["requests_per_second"] == 1.0
    assert found["goodput"] == 0.5 and found["goodput_share"] == pytest.approx(1 / 3)
    assert found["ttft_ms"]["mean"] == pytest.approx(500)


def test_percentiles() -> None:
    found = distribution([number / 1000 for number in range(101)])
    assert found == pytest.approx({"mean": 50, "p50": 50, "p95": 95, "p99": 99})
    assert distribution([0.002])["p99"] == 2.0


@pytest.mark.parametrize("text", ["", "ttft", "ttft:5", "tftt:5ms", "ttft:5ms;tpot:1ms", "ttft:-5ms"])
def test_wrong_limits(text: str) -> None:
    with pytest.raises(UsageError, match="--slo"):
        parse_slo(text)


@pytest.mark.parametrize("text", ["0", "a", "5-", "-5", "9-3", "1-2-3", ""])
def test_wrong_lengths(text: str) -> None:
    if text == "5-":  # the same as 5
        assert Lengths.parse(text) == Lengths(5, 5)
        return
    with pytest.raises(UsageError, match="length"):
        Lengths.parse(text)


def test_workloads_repeat_and_keep_their_lengths() -> None:
    options: dict[str, Any] = {"vocab_size": 50, "seed": 3}
    tasks = synthetic(40, Lengths(3, 9), Lengths(2, 4), **options)
    assert tasks == synthetic(40, Lengths(3, 9), Lengths(2, 4), **options)
    assert {len(task.prompt) for task in tasks} == set(range(3, 10)) and {t.max_tokens for t in tasks} == {2, 3, 4}
    shared = prefix_repetition(8, Lengths(5, 5), Lengths(2, 2), prefixes=2, prefix_length=20, **options)
    assert len({tuple(task.prompt[:20]) for task in shared}) == 2 and {len(task.prompt) for task in shared} == {25}


@pytest.mark.parametrize("burstiness", [0.3, 1.0, 5.0])
def test_arrivals(burstiness: float) -> None:
    times = arrival_times(4000, rate=10, burstiness=burstiness, seed=1)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert times[0] == 0 and mean == pytest.approx(0.1, rel=0.1)
    assert variance / mean**2 == pytest.approx(1 / burstiness, rel=0.25)
    assert arrival_times(3, rate=None, burstiness=1, seed=0) == [0, 0, 0]


def test_files(tmp_path: Path) -> None:
    def encode(text: str) -> list[int]:
        return [len(text)]

    options: dict[str, Any] = {"encode": encode, "seed": 0}
    lines = tmp_path / "prompts.txt"
    lines.write_text("one\n\nthree\n", encoding="utf-8")
    assert [task.prompt for task in from_file(lines, 3, Lengths(4, 4), **options)] == [[3], [5], [3]]
    records = tmp_path / "prompts.jsonl"
    records.write_text('{"prompt": "ab", "max_tokens": 7}\n{"prompt": [4, 5]}\n', encoding="utf-8")
    found = from_file(records, 2, Lengths(4, 4), **options)
    assert [(task.prompt, task.max_tokens) for task in found] == [([2], 7), ([4, 5], 4)]
    for content in ("{", '{"text": "a"}', '{"prompt": 5}', '{"prompt": "a", "max_tokens": 0}', "[]"):
        records.write_text(content, encoding="utf-8")
        with pytest.raises(UsageError, match="line 1"):
            from_file(records, 1, Lengths(4, 4), **options)
    for content in (b"", b"\xff\xfe\xfd"):
        lines.write_bytes(content)
        with pytest.raises(UsageError):
            from_file(lines, 1, Lengths(4, 4), **options)


def test_latency(artifact: Path, tmp_path: Path) -> None:
    shown = bench(
        artifact,
        "latency",
        "--batch",
        3,
        "--rounds",
        2,
        "--input-len",
        8,
        "--output-len",
        6,
        "--json",
        tmp_path / "a.json",
    )
    found = json.loads((tmp_path / "a.json").read_text())
    assert "output_tokens_per_second" in shown and found["mode"] == "latency" and found["batch"] == 3
    assert 0 < found["ttft_ms"]["mean"] <= found["e2e_ms"]["mean"]


def test_throughput(artifact: Path, tmp_path: Path) -> None:
    bench(
        artifact, "throughput", "--max-num-seqs", 4, "--kv-cache-memory", "1MiB", "--requests", 10, "--prefixes", 2,
        "--prefix-len", 40, "--input-len", "4-9", "--output-len", "3-5", "--json", tmp_path / "a.json",
    )  # fmt: skip
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["requests"] == 10 and found["prefix_hit_rate"] > 0.4 and 0 <= found["kv_waste"] < 1
    assert found["generated_tokens"] == pytest.approx(40, abs=10) and found["preemptions"] == 0


def test_serve(artifact: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The quick brown fox\nOù est la bibliothèque ?\n", encoding="utf-8")
    bench(
        artifact, "serve", "--requests", 6, "--file", prompts, "--output-len", "5-9", "--rate", 200, "--concurrency", 2,
        "--slo", "ttft:10s,tpot:10s", "--json", tmp_path / "a.json",
    )  # fmt: skip
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["requests"] == 6 and found["failed"] == 0 and found["goodput_share"] == 1.0
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        assert 0 < found[name]["p50"] <= found[name]["p95"] <= found[name]["p99"]


def test_a_plot(artifact: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    bench(artifact, "serve", "--requests", 3, "--input-len", 5, "--output-len", 4, "--plot", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["throughput", "--input-len", "300"], "context length is 256"),
        (["throughput", "--input-len", "x"], "length 'x'"),
        (["serve", "--slo", "x"], "--slo"),
        (["serve", "--rate", "0"], "rate"),
        (["serve", "--decode-stretch", "0.5"], "decode_stretch"),
        (["latency", "--batch", "0"], "batch"),
    ],
    ids=str,
)
def test_wrong_options(arguments: list[str], said: str, artifact: Path) -> None:
    done = CliRunner().invoke(main, ["bench", str(artifact), *arguments])
    assert done.exit_code == 2 and said in done.output and "Traceback" not in done.output


@pytest.mark.parametrize("text", ["4QiB", "x", ""])
def test_wrong_sizes(text: str, artifact: Path) -> None:
    done = CliRunner().invoke(main, ["bench", str(artifact), "latency", "--kv-cache-memory", text])
    assert done.exit_code == 2 and "4GiB" in done.output


def test_random_numbers_of_workloads_are_their_own() -> None:
    random.seed(1)
    before = random.getstate()
    synthetic(3, Lengths(3, 9), Lengths(2, 4), vocab_size=50, seed=3)
    assert random.getstate() == before
