"""The group of commands: which there are, and what becomes of an error."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

import click
from typing_extensions import override

from llmopt import lazy
from llmopt.cli import failures
from llmopt.version import __version__

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
"""In the order of ``llmopt --help``: what a new user needs first comes first."""


class App(click.Group):
    """Imports a command when it is asked for, and words every error in one line."""

    @override
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    @override
    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = lazy.load(COMMANDS[cmd_name])
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
        given = list(sys.argv[1:] if args is None else args)
        if not standalone_mode:
            return super().main(given, prog_name, complete_var, standalone_mode=False, **extra)
        with failures.told(given):
            code = super().main(given, prog_name, complete_var, standalone_mode=False, **extra)
        sys.exit(code if isinstance(code, int) else 0)


class _Warnings(logging.Handler):
    """Shows what the library warns of."""

    @override
    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"{record.levelname.capitalize()}: {record.getMessage()}", err=True)


@click.group(
    cls=App,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 ok, 1 the work failed, 2 usage, 3 backend or device missing, "
    "4 inconclusive, 130 interrupted.",
)
@click.version_option(__version__, prog_name="llmopt")
@click.pass_context
def app(ctx: click.Context) -> None:
    """Compile Transformers into the fastest artifact that is proven to compute the same thing.

    \b
    llmopt compile SmolLM2-135M-Instruct --target cpu --quantize w8
    llmopt run SmolLM2-135M-Instruct.onnxruntime-cpu --prompt "The sky is"
    """  # noqa: D301 - \b keeps click from joining the lines
    handler = _Warnings(logging.WARNING)
    logger = logging.getLogger("llmopt")
    logger.addHandler(handler)
    ctx.call_on_close(lambda: logger.removeHandler(handler))
