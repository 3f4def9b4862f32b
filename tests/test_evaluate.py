"""`optc eval`: the figures equal independent ones, their standard errors are right, and bad input is refused in one line."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from click.testing import CliRunner, Result
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import optc
from optc.cli import main
from optc.errors import ExecutionError, UsageError
from optc.optimizer.accuracy import Tokenwise, compare, measure, summarize
from optc.optimizer.evaluate import evaluate, make_windows, read_text, special_prefix
from optc.runtime.artifact import open_artifact, read_manifest
from optc.runtime.scorer import Scored, Scorer

BUNDLED = Path(__file__).resolve().parents[1] / "examples/tiny-llama"
WINDOW = 48


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About ten windows of words, the last one not full."""
    words = ["the", "quick", "brown", "fox", "lazy", "dog", "Grüße", "München", "日本語", "def", "return", "x + 1"]
    path = tmp_path_factory.mktemp("text") / "held-out.txt"
    path.write_text(" ".join(random.Random(0).choices(words, k=130)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def perturbed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with a little noise on every weight."""
    folder = Path(shutil.copytree(checkpoint, tmp_path_factory.mktemp("perturbed") / "noisy"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def load(folder: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def cut(checkpoint: Path, text: Path) -> list[list[int]]:
    """The protocol, spelled out once more: BOS and the next 47 tokens, all of the text."""
    tokenizer = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    ids = tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False).ids
    windows = [[0, *ids[start : start + WINDOW - 1]] for start in range(0, len(ids), WINDOW - 1)]
    assert len(windows) > 5 and len(windows[-1]) < WINDOW
    return windows


@torch.no_grad()
def log_probabilities(model: LlamaForCausalLM, window: list[int]) -> Tensor:
    return torch.log_softmax(model(torch.tensor([window])).logits[0, :-1].double(), -1)


def test_perplexity_is_that_of_transformers(artifact: Path, checkpoint: Path, text: Path) -> None:
    model, windows = load(checkpoint), cut(checkpoint, text)
    scores = [log_probabilities(model, w).gather(1, torch.tensor(w)[1:, None]) for w in windows]
    expected = math.exp(-torch.cat(scores).mean().item())
    record = evaluate(artifact, text, window=WINDOW)
    assert record.figures.perplexity.value == pytest.approx(expected, rel=1e-5)
    assert (record.figures.windows, record.figures.tokens) == (len(windows), sum(len(w) - 1 for w in windows))
    assert (record.text, record.window, record.prefix, record.native) == (text.name, WINDOW, (0,), False)
    assert record.figures.kl_mean is None and record.reference is None
    first = evaluate(artifact, text, window=WINDOW, max_windows=2).figures
    assert first.windows == 2
    assert first.perplexity.value == pytest.approx(math.exp(-torch.cat(scores[:2]).mean().item()), rel=1e-5)


def test_native_code_is_what_is_measured(native_artifact: Path, artifact: Path, text: Path) -> None:
    native, portable = evaluate(native_artifact, text, window=WINDOW), evaluate(artifact, text, window=WINDOW)
    assert (native.native, portable.native) == (True, False)
    assert native.figures.perplexity.value == pytest.approx(portable.figures.perplexity.value, rel=1e-4)
    assert not evaluate(native_artifact, text, window=WINDOW, native=False).native


def test_a_model_does_not_differ_from_itself(artifact: Path, checkpoint: Path, text: Path) -> None:
    figures = evaluate(artifact, text, against=checkpoint, window=WINDOW).figures
    assert figures.kl_mean is not None and 0 <= figures.kl_mean.value < 1e-9
    assert figures.same_top is not None and figures.same_top.value == 1
    assert figures.perplexity_delta is not None and abs(figures.perplexity_delta.value) < 1e-3
    to_itself = evaluate(artifact, text, against=artifact, window=WINDOW).figures
    assert to_itself.kl_p999 is not None and to_itself.kl_p999.value == 0


def test_divergence_from_another_model_is_the_direct_one(
    artifact: Path, checkpoint: Path, perturbed: Path, text: Path
) -> None:
    model, other = load(checkpoint), load(perturbed)
    divergences, same, scores, other_scores = [], [], [], []
    for window in cut(checkpoint, text):
        log_q, log_p = log_probabilities(model, window), log_probabilities(other, window)
        divergences.append(torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1))
        same.append((log_q.argmax(1) == log_p.argmax(1)).double())
        targets = torch.tensor(window)[1:, None]
        scores.append(log_q.gather(1, targets))
        other_scores.append(log_p.gather(1, targets))
    kl, ppl, other_ppl = torch.cat(divergences), *(math.exp(-torch.cat(s).mean()) for s in (scores, other_scores))
    record = evaluate(artifact, text, against=perturbed, window=WINDOW)
    found = {name: estimate["value"] for name, estimate in record.figures.model_dump(include=FIGURES).items()}
    assert record.reference == str(perturbed)
    assert kl.mean() > 1e-3 and torch.cat(same).mean() < 1
    expected = {
        "perplexity": ppl,
        "reference_perplexity": other_ppl,
        "perplexity_delta": ppl - other_ppl,
        "perplexity_increase": ppl / other_ppl - 1,
        "kl_mean": kl.mean().item(),
        "kl_p99": np.quantile(kl.numpy(), 0.99, method="inverted_cdf"),
        "kl_p999": kl.max().item(),  # of fewer than a thousand tokens
        "same_top": torch.cat(same).mean().item(),
    }
    assert found == pytest.approx(expected, rel=1e-3)


FIGURES = {
    "perplexity", "reference_perplexity", "perplexity_delta", "perplexity_increase",
    "kl_mean", "kl_p99", "kl_p999", "same_top",
}  # fmt: skip


def sample(generator: np.random.Generator, num_windows: int) -> list[Tokenwise]:
    """Windows whose tokens share an offset, as those of one text do."""
    found = []
    for _ in range(num_windows):
        shared, count = 0.5 * generator.normal(), int(generator.integers(20, 60))
        reference = 3 + shared + generator.normal(size=count)
        kl = np.exp(shared + generator.normal(size=count) - 4)
        same = (generator.random(count) > 0.05 * np.exp(shared)).astype(np.float64)
        found.append(
            Tokenwise(reference + 0.1 * generator.normal(size=count) + 0.02 + 0.01 * shared, reference, kl, same)
        )
    return found


def test_standard_errors_are_the_spread_over_new_texts() -> None:
    generator = np.random.default_rng(1)
    draws = [summarize(sample(generator, 60)).model_dump(include=FIGURES) for _ in range(100)]
    for name in FIGURES - {"kl_p999"}:  # three tokens lie above it here, too few for any estimate of its error
        spread = np.std([draw[name]["value"] for draw in draws])
        typical = np.sqrt(np.mean([draw[name]["standard_error"] ** 2 for draw in draws]))
        assert typical == pytest.approx(spread, rel=0.3), name


def test_standard_errors_are_those_of_a_bootstrap_over_windows() -> None:
    windows = sample(np.random.default_rng(2), 60)
    found = summarize(windows).model_dump(include=FIGURES)
    generator = np.random.default_rng(3)
    resampled = []
    for _ in range(300):
        chosen = [windows[i] for i in generator.integers(len(windows), size=len(windows))]
        nll, reference, kl, same = (
            np.concatenate([getattr(w, name) for w in chosen]) for name in ("nll", "reference_nll", "kl", "same_top")
        )
        ppl, base = np.exp(nll.mean()), np.exp(reference.mean())
        quantiles = np.quantile(kl, [0.99, 0.999], method="inverted_cdf")
        resampled.append([ppl, base, ppl - base, ppl / base - 1, kl.mean(), *quantiles, same.mean()])
    names = ("perplexity", "reference_perplexity", "perplexity_delta", "perplexity_increase",
             "kl_mean", "kl_p99", "kl_p999", "same_top")  # fmt: skip
    for name, spread in zip(names, np.std(resampled, axis=0), strict=True):
        assert found[name]["standard_error"] == pytest.approx(spread, rel=0.25), name


def test_the_difference_is_paired() -> None:
    """Texts differ far more than two models of one text, so pairing shows what separate errors would hide."""
    found = summarize(sample(np.random.default_rng(0), 60))
    assert found.perplexity_delta is not None and found.perplexity_delta.standard_error is not None
    assert found.perplexity.standard_error is not None
    assert found.perplexity_delta.standard_error < 0.2 * found.perplexity.standard_error


def test_one_window_has_no_standard_error(artifact: Path, text: Path) -> None:
    figures = evaluate(artifact, text, against=artifact, window=WINDOW, max_windows=1).figures
    for name in FIGURES:
        assert getattr(figures, name).standard_error is None


def test_logits_that_are_not_finite_are_an_error() -> None:
    window = torch.arange(4)
    for bad in (math.nan, math.inf):
        with pytest.raises(ExecutionError, match="not finite"):
            compare(window, torch.zeros(4, 8).index_fill(0, torch.tensor([1]), bad))
    hopeless = measure(lambda ids: 1e4 * torch.eye(8)[(ids + 2) % 8], [window, window])
    assert math.isfinite(hopeless.perplexity.value) and hopeless.perplexity.value > 1e40


def test_packed_sequences_and_chunks_give_the_same_logits(artifact: Path, checkpoint: Path) -> None:
    model = load(checkpoint)
    generator = torch.Generator().manual_seed(0)
    lengths = (1, 40, 7, 16, 33, 200, 3, 15, 17)
    sequences = [torch.randint(0, 320, (length,), generator=generator) for length in lengths]
    firsts = [0, 39, 3, 0, 32, 150, 2, 15, 1]
    scorer = Scorer(open_artifact(artifact), max_length=200, max_num_seqs=4, max_num_batched_tokens=48)
    scored = [Scored(ids.tolist(), first) for ids, first in zip(sequences, firsts, strict=True)]
    found = list(scorer.score(scored))
    assert len(found) == len(sequences)
    for ids, first, logits in zip(sequences, firsts, found, strict=True):
        with torch.no_grad():
            expected = model(ids[None]).logits[0, first:]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_windows_begin_as_the_tokenizer_begins(checkpoint: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    bare = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    bare.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    assert (special_prefix(tokenizer), special_prefix(bare)) == ((0,), ())
    words = "the lazy dog " * 20
    ids = bare.encode(words).ids
    with_bos = make_windows(tokenizer, words, "words", limit=256, window=9)
    without = make_windows(bare, words, "words", limit=256, window=9)
    assert [token for window in with_bos.tokens for token in window.tolist()[1:]] == ids
    assert [token for window in without.tokens for token in window.tolist()] == ids[: len(ids) - (len(ids) % 9 == 1)]
    assert (with_bos.skip, without.skip) == (1, 1)
    assert make_windows(tokenizer, "the fox " * 2000, "words", limit=4096).length == 1024
    assert make_windows(tokenizer, words * 9, "words", limit=64).length == 64


def test_bad_text_is_refused(artifact: Path, tmp_path: Path) -> None:
    cases: list[tuple[bytes | None, str]] = [
        (None, "no such file"),
        (b"", "empty"),
        (b" \n\n", "empty"),
        (b"text \xff\xfe", "not UTF-8 text: byte 5 is 0xff"),
        (b"ELF\0\0", "character 3 is NUL"),
        (b"too short", "do not fill one window of 256"),
    ]
    for content, message in cases:
        path = tmp_path / "text.txt"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UsageError, match=message):
            evaluate(artifact, path)
        result = run("eval", artifact, "--text", path)
        assert result.exit_code == 2 and message in " ".join(result.stderr.split()), result.output
        assert result.stderr.count("error: ") == 1 and "Traceback" not in result.output
    with pytest.raises(UsageError, match="is a folder"):
        read_text(tmp_path)


def test_bad_windows_and_references_are_refused(
    artifact: Path,
    editable: Path,
    editable_checkpoint: Path,
    edit_manifest: Callable[..., None],
    text: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(UsageError, match="a window of 257 tokens: expected 2 to 256"):
        evaluate(artifact, text, window=257)
    with pytest.raises(UsageError, match="a window of 1 tokens"):
        evaluate(artifact, text, window=1)
    with pytest.raises(UsageError, match="max_windows 0"):
        evaluate(artifact, text, window=WINDOW, max_windows=0)
    assert run("eval", artifact, "--text", text, "--against", tmp_path / "nowhere").exit_code == 1

    tokenizer = json.loads((editable_checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["t"], vocabulary["h"] = vocabulary["h"], vocabulary["t"]
    (editable_checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(UsageError, match="its tokenizer is another"):
        evaluate(artifact, text, against=editable_checkpoint, window=WINDOW)

    def shrink(content: dict[str, Any]) -> None:
        content["model"] |= {"vocab_size": 300}

    edit_manifest(editable, shrink)
    with pytest.raises(UsageError, match="a vocabulary of 300 tokens"):
        evaluate(artifact, text, against=editable, window=WINDOW)

    def shorten(content: dict[str, Any]) -> None:
        content["model"] |= {"vocab_size": 320, "max_model_len": 40}

    edit_manifest(editable, shorten)
    with pytest.raises(UsageError, match="takes 40 tokens"):
        evaluate(artifact, text, against=editable, window=WINDOW)

    def forget(content: dict[str, Any]) -> None:
        content["tokenizer"] = None

    edit_manifest(editable, forget)
    with pytest.raises(UsageError, match="has no tokenizer"):
        evaluate(editable, text)


def test_command_line(artifact: Path, checkpoint: Path, text: Path) -> None:
    result = run("eval", artifact, "--text", text, "--against", checkpoint, "--window", WINDOW, "--no-native", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    expected = evaluate(artifact, text, against=checkpoint, window=WINDOW, native=False)
    assert found == {"artifact": str(artifact), **expected.model_dump(mode="json")}
    shown = run("eval", artifact, "--text", text, "--window", WINDOW, "--max-windows", 1)
    assert shown.exit_code == 0, shown.output
    assert f"{expected.text}" in shown.stdout and "portable program" in shown.stdout and " - " in shown.stdout
    assert "KL divergence" not in shown.stdout


@pytest.fixture(scope="module")
def long_text(text: Path) -> Path:
    path = text.with_name("long.txt")
    path.write_text(text.read_text(encoding="utf-8") + " " + "the lazy dog " * 40, encoding="utf-8")
    return path


def test_compile_writes_the_figures_into_manifest_and_report(
    artifact: Path, checkpoint: Path, long_text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.optc"
    result = run("compile", checkpoint, "-o", output, "--backend", "eager", "--block-size", 16, "--eval", long_text)
    assert result.exit_code == 0, result.output
    manifest = open_artifact(output, verify=True).manifest
    assert manifest.accuracy is not None
    assert manifest.accuracy == evaluate(output, long_text, against=checkpoint)
    assert "evaluate" in manifest.stages
    assert manifest.identity == read_manifest(artifact).identity  # a measurement is no part of it
    for shown in (result.stdout, run("inspect", output).stdout, (output / "report.html").read_text()):
        assert "Accuracy" in shown and "perplexity of the reference" in shown and long_text.name in shown


def test_compile_refuses_a_bad_text_and_leaves_nothing(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.optc"
    short = tmp_path / "short.txt"
    short.write_text("too short")
    for path in (tmp_path / "none.txt", short):
        result = run("compile", checkpoint, "-o", output, "--backend", "eager", "--eval", path)
        assert result.exit_code == 2 and path.name in result.stderr, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_compile_that_fails_in_the_evaluation_leaves_nothing(
    checkpoint: Path, long_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Scorer, token_ids: Tensor) -> Tensor:
        return torch.full((len(token_ids), 320), math.nan)

    monkeypatch.setattr(Scorer, "__call__", broken)
    with pytest.raises(ExecutionError, match="not finite"):
        optc.compile(checkpoint, tmp_path / "out.optc", backend="eager", evaluate=long_text)
    assert list(tmp_path.iterdir()) == []


def test_the_bundled_model_has_the_perplexity_of_its_card(tmp_path: Path) -> None:
    """On three windows of the held-out text, against the formula that the card's figure was measured by."""
    output = optc.compile(BUNDLED, tmp_path / "tiny.optc", backend="eager", dtype="float32", verify=False)
    found = evaluate(output, BUNDLED / "heldout.txt", max_windows=3).figures
    tokenizer = tokenizers.Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    ids = tokenizer.encode((BUNDLED / "heldout.txt").read_text(encoding="utf-8"), add_special_tokens=False).ids
    model, total = load(BUNDLED), 0.0
    for start in range(0, 3 * 1023, 1023):
        window = [0, *ids[start : start + 1023]]
        total -= log_probabilities(model, window).gather(1, torch.tensor(window)[1:, None]).sum().item()
    assert found.tokens == 3 * 1023
    assert found.perplexity.value == pytest.approx(math.exp(total / found.tokens), rel=1e-4)
