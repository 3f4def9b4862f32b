"""Calibration data: files of text and conversations, the draw, the overlap with evaluation text, and bad input."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import processors

import optc
from optc.errors import UsageError
from optc.optimizer.calibration import (
    _pieces,
    check_calibration,
    find_calibration,
    load_calibration,
    overlap,
)
from optc.optimizer.checkpoint import TokenizerData, load_tokenizer
from optc.passes.quantize.calibrate import Calibration

from .conftest import TEXT
from .test_cli import failed, run

BOS, EOS = 0, 1


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> TokenizerData:
    """Puts BOS before a text."""
    found = load_tokenizer(checkpoint)
    assert found is not None
    return found


def encode(tokenizer: TokenizerData, text: str) -> list[int]:
    ids: list[int] = tokenizers.Tokenizer.from_str(tokenizer.json).encode(text, add_special_tokens=False).ids
    return ids


def with_processor(tokenizer: TokenizerData, single: str) -> TokenizerData:
    """The same tokenizer with other special tokens around a text."""
    changed = tokenizers.Tokenizer.from_str(tokenizer.json)
    special = [("<s>", BOS), ("</s>", EOS)]
    changed.post_processor = processors.TemplateProcessing(single=single, pair="$A $B", special_tokens=special)
    return TokenizerData(changed.to_str(), tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template)


def written(path: Path, content: str | bytes | list[dict[str, Any]]) -> Path:
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def whole(path: Path, tokenizer: TokenizerData, count: int) -> list[int]:
    """All `count` tokens of a path, in one sequence."""
    calibration, _ = load_calibration(path, tokenizer, num_samples=1, sequence_length=count)
    (sample,) = calibration.samples
    return sample.tolist()  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------- the draw


def test_sequences_are_windows_of_the_text_behind_bos(tmp_path: Path, tokenizer: TokenizerData) -> None:
    path = written(tmp_path / "a.txt", TEXT * 20)
    ids = encode(tokenizer, TEXT * 20)
    calibration, notes = load_calibration(path, tokenizer, num_samples=8, sequence_length=33, seed=3)
    assert (calibration.source, calibration.seed, notes) == ("a.txt", 3, [])
    starts = []
    for sample in calibration.samples:
        assert sample.dtype == torch.int64 and len(sample) == 33 and sample[0] == BOS
        window = sample[1:].tolist()
        starts += [start for start in range(0, len(ids), 32) if ids[start : start + 32] == window][:1]
    assert len(starts) == 8
    assert starts != sorted(starts), "drawn, not the first ones"


def test_the_draw_is_without_replacement_and_by_seed(tmp_path: Path, tokenizer: TokenizerData) -> None:
    words = " ".join(f"word{number}" for number in range(2000))
    path = written(tmp_path / "a.txt", words)

    def drawn(seed: int) -> list[tuple[int, ...]]:
        found, _ = load_calibration(path, tokenizer, num_samples=50, sequence_length=16, seed=seed)
        return [tuple(sample.tolist()) for sample in found.samples]

    assert drawn(0) == drawn(0) != drawn(1)
    assert len(set(drawn(0))) == 50


def test_fewer_sequences_than_asked_are_taken_with_a_note(tmp_path: Path, tokenizer: TokenizerData) -> None:
    path = written(tmp_path / "a.txt", TEXT)
    count = len(encode(tokenizer, TEXT)) // 32
    calibration, (note,) = load_calibration(path, tokenizer, num_samples=1000, sequence_length=33)
    assert len(calibration.samples) == count
    assert note == f"a.txt gives {count} calibration sequences of 33 tokens, not 1000"


@pytest.mark.parametrize(
    ("single", "prefix", "separator"),
    [("<s> $A", [BOS], [BOS]), ("$A </s>", [], [EOS]), ("<s> $A </s>", [BOS], [EOS, BOS]), ("$A", [], [EOS])],
)
def test_documents_are_separated_as_the_tokenizer_does(
    single: str, prefix: list[int], separator: list[int], tmp_path: Path, tokenizer: TokenizerData
) -> None:
    changed = with_processor(tokenizer, single)
    path = written(tmp_path / "a.jsonl", [{"text": "The fox"}, {"text": ""}, {"text": "the dog"}])
    expected = [*prefix, *encode(tokenizer, "The fox"), *separator, *encode(tokenizer, "the dog")]
    assert whole(path, changed, len(expected)) == expected


def test_a_conversation_goes_through_the_chat_template(tmp_path: Path, tokenizer: TokenizerData) -> None:
    """The template writes BOS itself; it must not come twice."""
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    path = written(tmp_path / "a.jsonl", [{"messages": messages, "id": 7}, {"messages": messages}])
    body = encode(tokenizer, "<s><user>hi</s>\n<assistant>hello</s>\n")
    assert body.count(BOS) == 1 and body.count(EOS) == 2
    assert whole(path, tokenizer, 2 * len(body)) == body * 2


def test_a_folder_is_all_its_files_in_order(tmp_path: Path, tokenizer: TokenizerData) -> None:
    written(tmp_path / "b.jsonl", [{"text": "the dog"}])
    written(tmp_path / "a.txt", "The fox")
    written(tmp_path / "README.md", "not this")
    expected = [BOS, *encode(tokenizer, "The fox"), BOS, *encode(tokenizer, "the dog")]
    assert whole(tmp_path, tokenizer, len(expected)) == expected


def test_parquet_has_the_same_columns(tmp_path: Path, tokenizer: TokenizerData) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    for name, rows in (("text", [{"text": "The fox"}, {"text": "the dog"}]), ("chat", [{"messages": messages}])):
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
        lines = written(tmp_path / f"{name}.jsonl", rows)
        expected = whole(lines, tokenizer, 7)
        assert whole(tmp_path / f"{name}.parquet", tokenizer, 7) == expected
    parquet.write_table(pyarrow.Table.from_pylist([{"body": "x"}]), tmp_path / "wrong.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([{"text": "x"}, {"text": None}]), tmp_path / "null.parquet")
    for name, words in (("wrong", "has the columns body; expected text"), ("null", "row 2: has the keys none")):
        with pytest.raises(UsageError, match=rf"{name}\.parquet.*{words}"):
            load_calibration(tmp_path / f"{name}.parquet", tokenizer)


def test_a_long_text_is_tokenized_in_pieces_that_join_to_it() -> None:
    text = ("x" * 99 + "\n") * 25000 + "the end"
    pieces = list(_pieces(text))
    assert len(pieces) == 3 and "".join(pieces) == text
    assert all(piece.endswith("\n") for piece in pieces[:-1])
    assert list(_pieces("")) == []


def test_the_checkpoints_own_data_is_found(tmp_path: Path) -> None:
    assert find_calibration(tmp_path) is None
    written(tmp_path / "calibration.jsonl", [{"text": "x"}])
    assert find_calibration(tmp_path) == tmp_path / "calibration.jsonl"
    written(tmp_path / "calibration.txt", "x")
    assert find_calibration(tmp_path) == tmp_path / "calibration.txt"


# ------------------------------------------------------------------------------------------------- overlap


def test_overlap_is_the_share_of_runs_of_32_tokens_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = torch.randint(100, (500,), generator=generator)
    other = torch.randint(100, (500,), generator=generator)
    calibration = Calibration((seen[:250], seen[250:]), "a", 0)
    assert overlap(calibration, [other]) == 0
    assert overlap(calibration, [seen[7:207]]) == 1
    mixed = torch.cat([seen[:131], other[:100]])  # 100 runs of 200 lie in what was seen
    assert overlap(calibration, [mixed]) == 0.5
    assert overlap(calibration, [seen[:31]]) == 0  # too short to tell


# ------------------------------------------------------------------------------------------------- bad input

BAD: dict[str, tuple[str, str | bytes, str]] = {
    "empty": ("a.txt", "", "a.txt: empty"),
    "blank": ("a.txt", " \n\n ", "a.txt: empty"),
    "binary": ("a.txt", b"\x00\x01\x02text", "a.txt: not text"),
    "not UTF-8": ("a.txt", b"abc\xff", "a.txt: not UTF-8 text: byte 3 is 0xff"),
    "too short": ("a.txt", "The quick brown fox", "or --calibration-length"),
    "one byte": ("a.jsonl", '{"text": ""}\n', "0 tokens do not make one sequence of 512; give more text"),
    "empty lines": ("a.jsonl", "\n\n", "a.jsonl: empty"),
    "not JSON": ("a.jsonl", '{"text": "x"}\n\n{"text": \n', "a.jsonl line 3: not JSON"),
    "deep": ("a.jsonl", "[" * 100000, "a.jsonl line 1: not JSON"),
    "a list": ("a.jsonl", "[1]", "a.jsonl line 1: a JSON list, expected an object with text"),
    "other keys": (
        "a.jsonl",
        '{"prompt": "x", "completion": "y"}',
        "line 1: has the keys prompt, completion; expected text",
    ),
    "no keys": ("a.jsonl", "{}", "line 1: has the keys none; expected text"),
    "text of a wrong type": (
        "a.jsonl",
        '{"text": "x"}\n{"text": 5}',
        "line 2: text is a int; expected text (a string)",
    ),
    "messages of a wrong type": ("a.jsonl", '{"messages": "x"}', "line 1: messages is a str"),
    "no messages": ("a.jsonl", '{"messages": []}', "line 1: messages: expected a list"),
    "messages without role": ("a.jsonl", '{"messages": [{"content": "x"}]}', "line 1: messages: expected a list"),
    "messages that are refused": (
        "a.jsonl",
        '{"messages": [{"role": "fox", "content": "x"}]}',
        "line 1: the chat template refuses these messages: unknown role",
    ),
    "lone surrogate": ("a.jsonl", '{"text": "ab\\ud800"}', "line 1: a lone surrogate at character 2"),
    "not parquet": ("a.parquet", b"PAR1 no", "a.parquet: not a readable parquet file"),
    "another kind": ("a.csv", "text\nx\n", "a .csv file; expected .txt, .jsonl or .parquet"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named_with_their_line(case: str, tmp_path: Path, tokenizer: TokenizerData) -> None:
    name, content, words = BAD[case]
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(UsageError) as caught:
        load_calibration(written(tmp_path / name, content), tokenizer)
    assert words in str(caught.value) and str(tmp_path / name) in str(caught.value), caught.value


def test_a_text_that_is_too_short_says_what_fits(tmp_path: Path, tokenizer: TokenizerData) -> None:
    path = written(tmp_path / "a.txt", "The quick brown fox")
    count = len(encode(tokenizer, "The quick brown fox"))
    with pytest.raises(UsageError, match=rf"{count} tokens do not.*or --calibration-length {count + 1}$"):
        load_calibration(path, tokenizer)
    assert len(load_calibration(path, tokenizer, sequence_length=count + 1)[0].samples) == 1


def test_bad_paths(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file or folder"):
        check_calibration(tmp_path / "none.txt")
    written(tmp_path / "README.md", "x")
    with pytest.raises(UsageError, match=r"holds no \.txt, \.jsonl or \.parquet file"):
        check_calibration(tmp_path)


def test_parquet_without_pyarrow_names_the_extra(
    tmp_path: Path, tokenizer: TokenizerData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r'pip install "optc\[parquet\]"'):
        load_calibration(written(tmp_path / "a.parquet", b"PAR1"), tokenizer)


def test_messages_without_a_chat_template(tmp_path: Path, tokenizer: TokenizerData) -> None:
    bare = TokenizerData(tokenizer.json, tokenizer.bos_token, tokenizer.eos_token, None)
    path = written(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    with pytest.raises(UsageError, match="line 1: messages, and the checkpoint has no chat template"):
        load_calibration(path, bare)


# ------------------------------------------------------------------------------------------------- the command line


def compiled(checkpoint: Path, output: Path, *arguments: object) -> dict[str, Any]:
    """The report of a compilation; `stderr` beside it."""
    result = run("compile", checkpoint, "-o", output, "--backend", "eager", "--json", "--no-verify", *arguments)
    assert result.exit_code == 0, result.output
    return {**json.loads(result.stdout), "stderr": result.stderr}


SMALL = ("--calibration-samples", 2, "--calibration-length", 32)


def test_the_default_without_data_is_rounded_with_a_note(checkpoint: Path, tmp_path: Path) -> None:
    report = compiled(checkpoint, tmp_path / "out.optc", "--int4")
    (note,) = report["model"]["notes"]
    assert "rounded to nearest, not by GPTQ" in note and "--calibration FILE" in note
    assert {layer["algorithm"] for layer in report["quantization"]["layers"]} == {"rtn"}
    assert report["quantization"]["calibration"] is None


def test_the_checkpoints_own_data_is_the_default(editable_checkpoint: Path, tmp_path: Path) -> None:
    written(editable_checkpoint / "calibration.txt", TEXT * 4)
    report = compiled(editable_checkpoint, tmp_path / "out.optc", "--int4", *SMALL, "--seed", 5)
    record = report["quantization"]["calibration"]
    assert (record["source"], record["num_samples"], record["sequence_length"], record["seed"]) == (
        "calibration.txt", 2, 32, 5,
    )  # fmt: skip
    algorithms = {(layer["role"] == "lm_head", layer["algorithm"]) for layer in report["quantization"]["layers"]}
    assert algorithms == {(False, "gptq"), (True, "rtn")}  # the head has 8 bits
    assert report["model"]["notes"] == []


def test_data_that_is_not_used_and_sequences_that_are_too_long_are_noted(checkpoint: Path, tmp_path: Path) -> None:
    data = written(tmp_path / "a.txt", TEXT * 20)
    report = compiled(checkpoint, tmp_path / "a.optc", "--int8", "--calibration", data)
    assert any("the calibration data is not used" in note for note in report["model"]["notes"])
    report = compiled(checkpoint, tmp_path / "b.optc", "--int4", "--calibration", data, "--calibration-samples", 1)
    assert report["quantization"]["calibration"]["sequence_length"] == 256
    assert any("256 tokens, the most the model takes, not 512" in note for note in report["model"]["notes"])


def test_the_name_of_the_data_is_no_part_of_the_identity(checkpoint: Path, tmp_path: Path) -> None:
    def compiled_with(name: str, text: str) -> tuple[str, str, list[str]]:
        data = written(tmp_path / name, text)
        options = ("--scheme", "w4a8-g32", "--algorithm", "smoothquant+gptq", *SMALL)
        report = compiled(checkpoint, tmp_path / f"{name}.optc", "--calibration", data, *options)
        configs = [record["config_sha256"] for record in report["passes"]]
        return report["quantization"]["calibration"]["source"], report["identity"], configs

    first, renamed, other = (
        compiled_with("a.txt", TEXT * 4),
        compiled_with("b.txt", TEXT * 4),
        compiled_with("c.txt", TEXT),
    )
    assert (first[0], renamed[0]) == ("a.txt", "b.txt")
    assert first[1:] == renamed[1:] and first[1] != other[1]


@pytest.mark.parametrize(
    ("samples", "length", "words"),
    [
        (0, 32, "calibration samples 0: .*1 or more"),
        (2, 1, "calibration length 1: .*2 or more"),
        (2.5, 32, "samples 2.5"),
    ],
)
def test_too_few_samples_or_tokens_are_refused(samples: Any, length: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        optc.compile(tmp_path, tmp_path / "o", quantize="int4", calibration_samples=samples, calibration_length=length)


def test_evaluating_on_the_calibration_text_is_warned_of(checkpoint: Path, tmp_path: Path) -> None:
    data = written(tmp_path / "a.txt", TEXT * 4)
    few = ("--calibration-samples", 2, "--calibration-length", 128)
    report = compiled(checkpoint, tmp_path / "out.optc", "--int4", "--calibration", data, "--eval", data, *few)
    assert any("of a.txt is also in the calibration data a.txt" in note for note in report["model"]["notes"])
    assert "warning: " in report["stderr"]


def test_the_command_line_refuses_in_one_line_and_writes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.optc"

    def wrong(*arguments: object, words: tuple[str, ...], model: Path = checkpoint) -> None:
        failed(run("compile", model, "-o", output, "--backend", "eager", *arguments), 2, *words)
        assert not output.exists()

    wrong("--int4", "--calibration", tmp_path / "none.txt", words=("none.txt", "no such file"))
    wrong("--int4", "--calibration", written(tmp_path / "a.csv", "x"), words=("a.csv", ".jsonl"))
    wrong("--int4", "--calibration", written(tmp_path / "a.txt", ""), words=("a.txt", "empty"))
    short = written(tmp_path / "b.txt", "The fox")
    wrong("--int4", "--calibration", short, words=("b.txt", "do not make one sequence of 256"))
    for algorithm in ("gptq", "awq", "smoothquant+gptq"):
        named = algorithm.split("+")[0]
        scheme = ("--scheme", "w4a8-g32", "--algorithm", algorithm)
        wrong(*scheme, words=(f"{named} needs calibration data", "--calibration FILE"))
    wrong("--scheme", "w8a8-static", words=("static scale of activations needs calibration data",))
    bare = Path(shutil.copytree(checkpoint, tmp_path / "bare"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (bare / name).unlink()
    wrong("--int4", "--calibration", short, model=bare, words=("b.txt", "the checkpoint has no tokenizer"))
    wrong("--int4", "--algorithm", "gptq", model=bare, words=("gptq needs", "no tokenizer"))
