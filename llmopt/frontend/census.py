"""Count the attentions and norms of a module by what it calls, one forward pass long."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final

from torch import nn

KINDS: Final = ("attention", "norm")


def census(module: nn.Module, run: Callable[[], Any]) -> dict[str, int]:
    """Return how often ``run`` calls a module whose class is named after each of ``KINDS``.

    A module inside another one of its kind is not counted apart: ``BertAttention`` holds a
    ``BertSelfAttention``. One that several layers share counts as often as it is called.

    Args:
        module: The module.
        run: Calls it.
    """
    with _counting(module) as counts:
        run()
    return {kind: counts[kind] for kind in KINDS if counts[kind]}


@contextlib.contextmanager
def _counting(module: nn.Module) -> Iterator[Counter[str]]:
    counts: Counter[str] = Counter()

    def counter(kind: str) -> Callable[..., None]:
        return lambda *_: counts.update((kind,))

    hooks = [
        part.register_forward_pre_hook(counter(kind))
        for kind in KINDS
        for part in dict.fromkeys(outermost(module, kind))
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def outermost(module: nn.Module, word: str) -> Iterator[nn.Module]:
    """Yield modules whose class is named after ``word``, none inside another such one."""
    if word in type(module).__name__.lower():
        yield module
        return
    for child in module.children():
        yield from outermost(child, word)
