"""Run a pass until it has made some of its changes, to see what one of them does."""

from __future__ import annotations

from llmopt.ir import graph as g
from llmopt.ir.program import Program
from llmopt.passes.base import ON_HIT, Pass


class _StoppedError(Exception):
    """A pass has made as many changes as it was to make."""


def run_hits(item: Pass, program: Program, limit: int | None = None) -> int:
    """Run a pass on ``program`` in place, and return how many times it counted a change.

    Args:
        item: The pass, any that counts its changes with ``Outcome.hit``.
        program: Program to edit. No dead node is left in it, and every node has a unique name.
            After an exception it is as the pass left it.
        limit: Stop where this many were counted; 0 changes nothing.
    """
    counted = 0

    def count() -> None:
        nonlocal counted
        counted += 1
        if counted == limit:
            raise _StoppedError

    if limit == 0:
        return 0
    token = ON_HIT.set(count)
    try:
        item.run(program)
    except Exception:  # noqa: BLE001 - stopped, or failed: what it did until then is asked for
        g.remove_dead(program.model)
    finally:
        ON_HIT.reset(token)
    g.name_nodes(program.graph)
    return counted
