"""The command group: its subcommands, and how errors are reported."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

import click
from typing_extensions import override

import llmopt
from llmopt.cli import failures

COMMANDS: Final[Mapping[str, str]] = {
    "compile": "llmopt.cli.compile:compile_command",
    "run": "llmopt.cli.run:run_command",
    "bench": "llmopt.cli.bench:bench_command",
    "check": "llmopt.cli.check:check_command",
    "evaluate": "llmopt.cli.evaluate:evaluate_command",
    "inspect": "llmopt.cli.inspect:inspect_command",
    "bundle": "llmopt.cli.bundle:bundle_group",
    "opt": "llmopt.cli.opt:opt_command",
    "diff": "llmopt.cli.diff:diff_command",
    "bisect": "llmopt.cli.bisect:bisect_command",
    "targets": "llmopt.cli.catalog:targets_command",
    "passes": "llmopt.cli.catalog:passes_command",
    "doctor": "llmopt.cli.doctor:doctor_command",
}
"""Import path of each command, in the order of ``llmopt --help``: a new user's first."""


class App(click.Group):
    """A group that imports a command on first use and reports every error in one line."""

    @override
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    @override
    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    @override
    def invoke(self, ctx: click.Context) -> Any:
        # Here and not in `main`: click turns it into an Abort and prints an empty line first.
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise failures.InterruptedByUser from error

    @override
    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        arguments = list(sys.argv[1:] if args is None else args)
        if not standalone_mode:
            return super().main(arguments, prog_name, complete_var, standalone_mode=False, **extra)
        with failures.reported(arguments):
            code = super().main(arguments, prog_name, complete_var, standalone_mode=False, **extra)
        sys.exit(code if isinstance(code, int) else 0)


class _Warnings(logging.Handler):
    """Handler that prints the library's warnings to stderr."""

    @override
    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"{record.levelname.capitalize()}: {record.getMessage()}", err=True)


@click.group(
    cls=App,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 success, 1 failure, 2 usage error, 3 backend or device missing, "
    "4 inconclusive, 130 interrupted.",
)
@click.version_option(llmopt.__version__, prog_name="llmopt")
@click.pass_context
def app(ctx: click.Context) -> None:
    """Compile Transformers into the fastest artifact that is verified to compute the same thing.

    \b
    llmopt compile SmolLM2-135M-Instruct --target cpu --quantize w8
    llmopt run SmolLM2-135M-Instruct.onnxruntime-cpu --prompt "The sky is"
    """  # noqa: D301 - \b keeps click from joining the lines
    handler = _Warnings(logging.WARNING)
    logger = logging.getLogger("llmopt")
    logger.addHandler(handler)
    ctx.call_on_close(lambda: logger.removeHandler(handler))
