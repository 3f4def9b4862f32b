"""The runtime's commands: run, inspect."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click
from rich.console import Console

from ..errors import RequestError, UsageError
from .byte_size import BYTES
from .params import StructuredOutput

if TYPE_CHECKING:
    from .llm import LLM


@click.command("run", short_help="Generate text from an artifact.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", help="The prompt; - reads standard input.")
@click.option("--token-ids", metavar="IDS", help="The prompt as token ids, separated by commas.")
@click.option("--chat", is_flag=True, help="Use the chat template; without -p, talk line by line.")
@click.option("-n", "--max-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--temperature", type=float, help="0 is greedy.  [default: the model's]")
@click.option("--top-k", type=int, help="0 is all.  [default: the model's]")
@click.option("--top-p", type=float, help="[default: the model's]")
@click.option("--min-p", type=float, help="[default: the model's]")
@click.option("--repetition-penalty", type=float, help="1 is none.  [default: the model's]")
@click.option("--seed", type=int, help="Same seed, same tokens.")
@click.option("--stop", multiple=True, help="End before this text; may be given several times.")
@click.option("--json-schema", type=click.File(encoding="utf-8"), help="File: the completion is JSON of this schema.")
@click.option("--regex", help="The completion matches this regular expression.")
@click.option("--choice", multiple=True, help="The completion is one of these; given several times.")
@click.option("--grammar", type=click.File(encoding="utf-8"), help="File: a grammar in Lark's EBNF or in GBNF.")
@click.option("--kv-cache-memory", type=BYTES, help="Such as 4GiB.  [default: a sequence of full length]")
@click.option("--no-native", is_flag=True, help="Load no native code: only data, run by known ops.")
@click.option("--verify", is_flag=True, help="Hash every file first, even if that was done before.")
@click.option("-q", "--quiet", is_flag=True, help="Print the completion only.")
def run_command(
    artifact: Path,
    prompt: str | None,
    token_ids: str | None,
    chat: bool,
    no_native: bool,
    verify: bool,
    quiet: bool,
    max_tokens: int,
    kv_cache_memory: int | None,
    json_schema: TextIO | None,
    regex: str | None,
    choice: tuple[str, ...],
    grammar: TextIO | None,
    **sampling: Any,
) -> None:
    """Generate from ARTIFACT, streaming the text as it comes.

    \b
    Examples:
      optc run my.optc -p "def main("
      optc run my.optc --chat
      echo "Once upon a time" | optc run my.optc -p - --temperature 0.8 --seed 1
      optc run my.optc --token-ids 1,17,42
      optc run my.optc -p "Name and age: " --json-schema person.json
    """
    if token_ids is not None and (prompt is not None or chat):
        raise UsageError("--token-ids goes with neither --prompt nor --chat")
    if prompt is None and token_ids is None and not chat:
        raise UsageError("give a prompt with -p (or -p - for standard input), --token-ids, or --chat")
    logging.basicConfig(level=logging.ERROR if quiet else logging.WARNING, format="%(message)s", stream=sys.stderr)
    started = time.perf_counter()
    structured: dict[str, Any] = {
        "json_schema": json_schema.read() if json_schema else None,
        "regex": regex,
        "choice": list(choice) or None,
        "grammar": grammar.read() if grammar else None,
    }
    if any(value is not None for value in structured.values()):
        sampling["structured"] = StructuredOutput(**structured)
    with _load(artifact, native=not no_native, verify=verify, quiet=quiet, kv_cache_memory=kv_cache_memory) as llm:
        loaded = time.perf_counter() - started
        options = {"max_tokens": max_tokens, **_sampling(llm.manifest.generation, sampling)}
        started = time.perf_counter()
        if token_ids is not None:
            result = llm.generate(_parse_ids(token_ids), **options)[0]
            if result.error is not None:
                raise RequestError(result.error)
            click.echo(",".join(map(str, result.token_ids)))
        elif chat and prompt is None:
            llm.chat_prompt(
                [{"role": "user", "content": "?"}]
            )  # no chat template: say so before the first line is typed
            _converse(llm, options)
        else:
            assert prompt is not None
            text = _read_stdin() if prompt == "-" else prompt
            _print_stream(llm.stream(llm.chat_prompt([{"role": "user", "content": text}]) if chat else text, **options))
        count, seconds = llm.engine.counters.generated_tokens, time.perf_counter() - started
    if not quiet:
        click.echo(
            f"[loaded in {loaded:.2f} s; {count} tokens in {seconds:.2f} s, {count / seconds:.0f} a second]", err=True
        )


def _load(artifact: Path, *, native: bool, verify: bool, quiet: bool, kv_cache_memory: int | None) -> LLM:
    """The artifact; while its files are hashed, which takes seconds for a large one, a spinner says so."""
    from .llm import LLM

    console = Console(stderr=True, quiet=quiet)
    with console.status(f"loading {artifact.name}") as status:
        return LLM(
            artifact,
            native=native,
            verify=verify,
            max_num_seqs=1,
            kv_cache_memory=kv_cache_memory,
            on_hash=lambda file: status.update(f"checking {file}"),
        )


def _read_stdin() -> str:
    content = sys.stdin.buffer.read()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"standard input is not UTF-8 text: byte {error.start} is {content[error.start]:#x}"
        ) from error


def _sampling(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The command line's parameters, over those of the model's generation_config.json if that samples."""
    options = {name: value for name, value in given.items() if value is not None and value != ()}
    if not defaults.get("do_sample"):
        return options
    names = [name for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty") if name in defaults]
    return {"temperature": 1.0, **{name: defaults[name] for name in names}, **options}


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--token-ids {text!r}: expected integers separated by commas") from error


def _print_stream(pieces: Iterator[str]) -> None:
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()


def _converse(llm: LLM, options: dict[str, Any]) -> None:
    messages: list[dict[str, str]] = []
    for line in sys.stdin if not sys.stdin.isatty() else _typed_lines():
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.strip()})
        answer = ""
        for piece in llm.stream(llm.chat_prompt(messages), **options):
            click.echo(piece, nl=False)
            answer += piece
        click.echo()
        messages.append({"role": "assistant", "content": answer})


def _typed_lines() -> Iterator[str]:
    while True:
        try:
            yield click.prompt("you", prompt_suffix="> ", default="", show_default=False, err=True)
        except click.Abort:
            return


@click.command("inspect", short_help="Show what is in an artifact.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
@click.option("--layers", is_flag=True, help="List every quantized weight, each with its scheme and error.")
@click.option("--verify", is_flag=True, help="Check the digest of every file.")
def inspect_command(artifact: Path, as_json: bool, layers: bool, verify: bool) -> None:
    """Show the model, target, KV cache, quantization, accuracy, passes and files of ARTIFACT.

    \b
    Examples:
      optc inspect my.optc
      optc inspect my.optc --json | jq .identity
      optc inspect my.optc --layers
      optc inspect my.optc --verify
    """
    from .artifact import open_artifact, read_manifest
    from .report import report_tables

    manifest = open_artifact(artifact, verify=True).manifest if verify else read_manifest(artifact)
    if as_json:
        click.echo(manifest.model_dump_json(indent=1))
        return
    console = Console()
    for table in report_tables(manifest, layers=layers):
        console.print(table)
    if verify:
        click.echo("every file matches its digest")
