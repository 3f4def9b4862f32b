"""Docs and examples that can be run or generated are run and compared."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from click.testing import CliRunner

from optc.cli import _COMMANDS, main
from optc.runtime.manifest import schema_json

ROOT = Path(__file__).resolve().parents[1]


def test_manifest_schema_is_up_to_date() -> None:
    assert (ROOT / "docs/manifest.schema.json").read_text() == schema_json(), "run `make schema`"


def test_write_a_pass_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples/write_a_pass.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "merge_silu: 1 rewrites" in printed
    assert "caught: pass drop_silu changed the logits" in printed


@pytest.mark.parametrize("command", _COMMANDS)
def test_help_has_examples(command: str) -> None:
    result = CliRunner().invoke(main, [command, "--help"])
    assert result.exit_code == 0
    assert "Example" in result.output and f"optc {command}" in result.output
