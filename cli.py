"""`optc`: the command group. Each command is imported when it is used, so that a lean install has the runtime's."""

from __future__ import annotations

import sys
from importlib import import_module

import click

_COMMANDS = {
    "compile": "optimizer",
    "targets": "optimizer",
    "passes": "optimizer",
    "run": "runtime",
    "inspect": "runtime",
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        command = getattr(import_module(f".{_COMMANDS[name]}.cli", __package__), f"{name}_command")
        assert isinstance(command, click.Command)
        return command


@click.command(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="optc")
@click.option("--debug", is_flag=True, help="Show the Python traceback of an error.")
@click.pass_context
def optc(ctx: click.Context, debug: bool) -> None:
    """Compile language models ahead of time, and run what comes out.

    \b
    Examples:
      optc compile ./my-llama -o my.optc
      optc compile Qwen/Qwen3-8B --target h100 --fp8
      optc run my.optc -p "def main("
      optc inspect my.optc

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 a gate was not met.
    """
    ctx.obj = {"debug": debug}


def main() -> None:
    """Entry point of the console script: errors on one line, without a traceback unless `--debug` asks for it."""
    from .errors import OptcError

    try:
        optc(standalone_mode=True)
    except OptcError as error:
        if "--debug" in sys.argv:
            raise
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
