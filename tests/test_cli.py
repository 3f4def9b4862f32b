"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from optc.cli import main
from optc.runtime import LLM
from optc.runtime.ops.kernels import supports


def run(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)


def failed(result: Result, code: int, *words: str) -> None:
    """One line that holds the words, no traceback, the right exit code."""
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.output
    assert all(word in lines[0] for word in words), lines[0]


def test_compile_reports_and_inspect_shows(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.optc"
    result = run("compile", checkpoint, "-o", output, "--backend", "eager", "--dump", tmp_path / "graphs")
    assert result.exit_code == 0, result.output
    for word in ("LlamaForCausalLM", "paged_attention", "weights.safetensors", "identity"):
        assert word in result.stdout
    dumped = sorted(path.name for path in (tmp_path / "graphs").rglob("*.txt"))
    assert "00_kv_cache.before.txt" in dumped and "02_gather_logits.after.txt" in dumped
    shown = run("inspect", output, "--verify")
    assert shown.exit_code == 0 and "every file matches its digest" in shown.stdout
    manifest = json.loads(run("inspect", output, "--json").stdout)
    assert manifest["model"]["architecture"] == "LlamaForCausalLM"
    assert "kv_cache" in (output / "report.html").read_text()


def test_compile_json_and_quiet(checkpoint: Path, tmp_path: Path) -> None:
    result = run("compile", checkpoint, "-o", tmp_path / "a.optc", "--backend", "eager", "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["artifact"] == str(tmp_path / "a.optc") and report["passes"][0]["max_error"] is not None
    quiet = run("compile", checkpoint, "-o", tmp_path / "b.optc", "--backend", "eager", "--quiet", "--no-verify")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")
    assert json.loads(run("inspect", tmp_path / "b.optc", "--json").stdout)["passes"][0]["max_error"] is None


def test_the_command_that_must_always_work(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "h100.optc"
    result = run("compile", checkpoint, "--target", "h100", "--fp8", "-o", output)
    assert result.exit_code == 0, result.output
    manifest = json.loads(run("inspect", output, "--json").stdout)
    assert manifest["native"][0]["status"] == "pending"
    assert any(record["dtype"] == "float8_e4m3fn" for record in manifest["constants"].values())
    ran = subprocess.run(
        [sys.executable, "-m", "optc.cli", "run", str(output), "-p", "The quick", "-n", "4"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "no native code yet" in ran.stderr and len(ran.stdout.strip()) > 0


def test_run_streams_what_generate_gives(artifact: Path) -> None:
    wanted = LLM(artifact).generate("The quick", max_tokens=12)[0]
    result = run("run", artifact, "-p", "The quick", "-n", 12, "--temperature", 0, "--quiet")
    assert (result.exit_code, result.stdout) == (0, wanted.text + "\n")
    piped = run("run", artifact, "-p", "-", "-n", 12, "--temperature", 0, "--quiet", stdin="The quick")
    assert piped.stdout == result.stdout
    ids = ",".join(map(str, wanted.prompt_token_ids))
    by_ids = run("run", artifact, "--token-ids", ids, "-n", 12, "--temperature", 0)
    assert by_ids.stdout == ",".join(map(str, wanted.token_ids)) + "\n"


def test_run_takes_the_models_sampling_defaults_and_a_seed(artifact: Path) -> None:
    once, again, other = (
        run("run", artifact, "-p", "The", "-n", 16, "--seed", seed, "--quiet").stdout for seed in (1, 1, 2)
    )
    assert once == again != other  # generation_config.json samples at 0.7


def test_chat(artifact: Path) -> None:
    result = run("run", artifact, "--chat", "-p", "hello", "-n", 8, "--temperature", 0, "--quiet")
    wanted = LLM(artifact).chat([{"role": "user", "content": "hello"}], max_tokens=8)[0].text
    assert result.stdout == f"{wanted}\n"
    talk = run("run", artifact, "--chat", "-n", 8, "--temperature", 0, "--quiet", stdin="hello\n\nand then\n")
    assert talk.exit_code == 0 and talk.stdout.startswith(f"{wanted}\n")


def test_targets_and_passes(checkpoint: Path) -> None:
    targets = json.loads(run("targets", "--json").stdout)
    assert {"native", "t4", "l4", "a10g", "a100", "l40s", "h100", "h200", "b200"} <= {t["name"] for t in targets}
    assert {"cpu-avx2", "cpu-avx512", "cpu-amx"} <= {target["name"] for target in targets}
    assert "h100" in run("targets").stdout
    passes = [record["name"] for record in json.loads(run("passes", "--json").stdout)]
    assert passes[:2] == ["canonicalize", "smooth_quant"] and passes[-1] == "fuse_quantize"
    assert passes.index("quantize") < passes.index("kv_cache") < passes.index("paged_attention")
    assert "paged_attention" in run("passes").stdout


def test_compile_errors(checkpoint: Path, tmp_path: Path, artifact: Path) -> None:
    output = tmp_path / "out.optc"
    failed(run("compile", tmp_path / "nowhere", "-o", output), 1, "nowhere", "no such folder")
    failed(run("compile", checkpoint, "-o", output, "--target", "h900"), 2, "h900", "h100")
    failed(run("compile", checkpoint, "-o", output, "--target", "a100", "--fp8"), 2, "sm_80", "h100")
    failed(run("compile", checkpoint, "-o", output, "--max-model-len", 9999), 2, "9999", "256")
    failed(run("compile", checkpoint, "-o", artifact, "--backend", "eager"), 2, "exists", "--force")
    (tmp_path / "file").write_text("")
    failed(run("compile", checkpoint, "-o", output, "--dump", tmp_path / "file"), 1, "file")
    assert not output.exists() and not list(tmp_path.glob(".*"))


def test_usage_errors_are_clicks_own(checkpoint: Path) -> None:
    for arguments in (["compile"], ["compile", checkpoint, "--backend", "magic"], ["frobnicate"], ["run"]):
        result = run(*arguments)
        assert result.exit_code == 2 and "Usage:" in result.stderr


def test_run_errors(artifact: Path, tmp_path: Path) -> None:
    failed(run("run", tmp_path / "none.optc", "-p", "x"), 1, "no such artifact")
    failed(run("run", artifact), 2, "-p")
    failed(run("run", artifact, "-p", "x", "--token-ids", "1"), 2, "--token-ids")
    failed(run("run", artifact, "--chat", "--token-ids", "1"), 2, "--chat")
    failed(run("run", "x" * 300, "-p", "x"), 1, "too long")
    bad_text = CliRunner().invoke(main, ["run", str(artifact), "-p", "-"], input=b"a\xff")
    failed(bad_text, 2, "not UTF-8", "0xff")
    failed(run("run", artifact, "--token-ids", "1,x"), 2, "1,x")
    failed(run("run", artifact, "--token-ids", "1,99999"), 1, "99999")
    failed(run("run", artifact, "-p", ""), 1, "empty prompt")
    failed(run("run", artifact, "-p", "word " * 400), 1, "256")
    failed(run("run", artifact, "-p", "x", "--temperature", "-1"), 1, "temperature")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cpu-generic", "cpu-avx2", "cpu-avx512"])
def test_code_for_each_instruction_set(target: str, checkpoint: Path, artifact: Path, tmp_path: Path) -> None:
    """In a process of its own each, since the first kernels of a process stay."""
    output = tmp_path / "out.optc"
    assert run("compile", checkpoint, "-o", output, "--target", target, "-q").exit_code == 0
    command = [
        sys.executable,
        "-m",
        "optc.cli",
        "run",
        str(output),
        "-p",
        "The quick",
        "-n",
        "12",
        "--temperature",
        "0",
        "-q",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (code,) = json.loads(run("inspect", output, "--json").stdout)["native"]
    needed = set(code["cpu_features"])
    assert ("avx2" in needed, "avx512f" in needed) == (target != "cpu-generic", target == "cpu-avx512")
    assert not needed & {"avx512_vnni", "avx512_bf16", "amx_tile"}  # only what the named target has
    if supports(target.removeprefix("cpu-")):
        assert done.stdout == f"{LLM(artifact).generate('The quick', max_tokens=12)[0].text}\n"
    else:
        assert done.returncode == 1 and "this processor lacks" in done.stderr


def test_output_name_and_odd_manifests(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit_manifest: Callable[..., None]
) -> None:
    monkeypatch.chdir(shutil.copytree(checkpoint, tmp_path / "my-model"))
    assert run("compile", ".", "--backend", "eager", "-q").exit_code == 0
    output = tmp_path / "my-model" / "my-model.optc"
    assert output.is_dir()

    def change(content: dict[str, Any]) -> None:
        content["model"]["source"] = "x[/b]\x1b[31m"

    edit_manifest(output, change)
    shown = run("inspect", output)
    assert shown.exit_code == 0 and "x[/b]" in shown.stdout and "\x1b" not in shown.stdout


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = run("--debug", "inspect", tmp_path / "none.optc")
    assert result.exception is not None and not isinstance(result.exception, SystemExit)


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from optc.cli import main; main(['--help'], standalone_mode=False); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
