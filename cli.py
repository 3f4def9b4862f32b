"""`optc`: the command group. Each command is imported when it is used, so that a lean install has the runtime's."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from .errors import OptcError

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

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; an error of ours becomes one line and its exit code, unless `--debug` wants the traceback."""
        try:
            return super().invoke(ctx)
        except OptcError as error:
            if ctx.params["debug"]:
                raise
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)


@click.command(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="optc")
@click.option("--debug", is_flag=True, help="Show the Python traceback of an error.")
def main(debug: bool) -> None:
    """Compile language models ahead of time, and run what comes out.

    \b
    Examples:
      optc compile ./my-llama -o my.optc
      optc compile Qwen/Qwen3-8B --target h100 --fp8
      optc run my.optc -p "def main("
      optc inspect my.optc

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 a gate was not met.
    """


if __name__ == "__main__":
    main()
