"""The option that adds passes, for every command that runs or lists them."""

from __future__ import annotations

from typing import Final

import click

plugin_option: Final = click.option(
    "--plugin",
    "plugins",
    multiple=True,
    metavar="FILE",
    help="A Python file or module that defines more passes. Repeatable.",
)
"""Gives a command the argument ``plugins``, which ``Pipeline.parse(..., plugins=)`` takes."""
