"""`optc`: the command group. Each command is imported when it is used, so that a lean install has the runtime's."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from .errors import BudgetError, OptcError

_COMMANDS = {
    "compile": "optimizer",
    "targets": "optimizer",
    "passes": "optimizer",
    "eval": "optimizer",
    "lm-eval": "optimizer",
    "export": "optimizer",
    "run": "runtime",
    "bench": "runtime.bench",
    "inspect": "runtime",
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        command = getattr(import_module(f".{_COMMANDS[name]}.cli", __package__), f"{name.replace('-', '_')}_command")
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; an error of ours becomes one line and its exit code, unless `--debug` wants the traceback."""
        try:
            return super().invoke(ctx)
        except (OptcError, OSError, MemoryError, ModuleNotFoundError) as error:
            if ctx.params["debug"] or isinstance(error, BrokenPipeError):
                raise
            for line in error.details if isinstance(error, BudgetError) else ():
                click.echo(line, err=True)
            click.echo(f"error: {_one_line(error)}", err=True)
            ctx.exit(error.exit_code if isinstance(error, OptcError) else 1)


def _one_line(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f'{error}; the compiler needs more than the runtime: pip install "optc[compile]"'
    if isinstance(error, MemoryError):
        return "out of memory"
    return " ".join(str(error).split())


@click.command(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="optc")
@click.option("--debug", is_flag=True, help="Show the Python traceback of an error.")
def main(debug: bool) -> None:
    """Compile language models ahead of time, and run what comes out.

    \b
    Examples:
      optc compile ./my-llama -o my.optc
      optc compile Qwen/Qwen3-8B --target h100 --fp8
      optc compile ./my-llama --int4 --calibration texts/ --eval heldout.txt
      optc eval my.optc --text heldout.txt --against ./my-llama
      optc run my.optc -p "def main("
      optc bench my.optc serve --rate 4 --slo ttft:500ms,tpot:50ms
      optc inspect my.optc

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 a gate (an accuracy budget, or the numeric check of a
    pass) was not met.
    """


if __name__ == "__main__":
    main()
