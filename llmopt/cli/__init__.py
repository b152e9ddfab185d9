"""The command line: each command parses, calls the API and prints.

Data goes to stdout, everything else to stderr. Nothing heavy is imported before a command needs
it, so that ``llmopt --help`` answers at once.
"""

from __future__ import annotations

import sys

try:
    from llmopt.cli.app import app
except KeyboardInterrupt:  # Ctrl-C right after the start: the same line as later
    sys.stderr.write("interrupted; nothing was written\n")
    raise SystemExit(130) from None

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line and exit with its code."""
    app(prog_name="llmopt")
