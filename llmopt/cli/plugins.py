"""The ``--plugin`` option, for every command that runs or lists passes."""

from __future__ import annotations

from typing import Final

import click

plugin_option: Final = click.option(
    "--plugin",
    "plugins",
    multiple=True,
    metavar="FILE",
    help="Python file or module that defines more passes. Repeatable.",
)
"""Adds the argument ``plugins``, for ``Pipeline.parse(..., plugins=)``."""
