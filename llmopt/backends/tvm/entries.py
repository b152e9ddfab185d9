"""The functions of a compiled Program: how each is called, and how much it has to serve.

==========  ======================================================================
prefill     logits of the last of S new tokens, keys and values written to the cache
score       the same with logits of all S
decode      one token of one sequence: matrices are multiplied by a vector
main        what is no decoder with a cache: every output, nothing kept
==========  ======================================================================

A function takes the Program's inputs in their order, with caches [B, G, C, D] of any capacity C
in place of the past, and then one list of all weights. With ``exact``, a second set of functions
(``exact_prefill``…) multiplies rounded weights by activations that are not: what verification
compares with the source.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmopt.backends.tvm.lower_linear import DOMAIN
from llmopt.interface.signature import Role
from llmopt.ir import graph as g
from llmopt.ir.program import Program


@dataclass(frozen=True)
class EntryPoint:
    """One way of calling a Program.

    Args:
        name: The function's name.
        one: Whether B = S = 1.
        every: Whether logits of all new tokens are wanted.
        exact: Whether activations stay float.
    """

    name: str
    one: bool = False
    every: bool = False
    exact: bool = False


@dataclass(frozen=True)
class Capacity:
    """The most that functions have to serve: memory is planned for it.

    Args:
        batch: Sequences at once, B.
        tokens: New tokens at once, S; 0 for any.
    """

    batch: int
    tokens: int


def entries(program: Program) -> list[EntryPoint]:
    """Return the functions that a Program needs."""
    exact = [False, True] if _rounds(program) else [False]
    if not program.signature.has_cache:
        return [EntryPoint("exact_main" if e else "main", exact=e) for e in exact]
    found = []
    for e in exact:
        head = "exact_" if e else ""
        if program.signature.find(Role.LOGITS_TO_KEEP) is not None:
            found.append(EntryPoint(f"{head}prefill", exact=e))
        found.append(EntryPoint(f"{head}score", every=True, exact=e))
        found.append(EntryPoint(f"{head}decode", one=True, exact=e))
    return found


def _rounds(program: Program) -> bool:
    products = g.nodes(program.graph, "Linear", domain=DOMAIN)
    return any(g.attribute(node, "scheme", "") for node in products)
