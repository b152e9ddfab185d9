"""Counts of the attentions and norms that one forward pass of a module calls."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final

from torch import nn

KINDS: Final = ("attention", "norm")


def census(module: nn.Module, run: Callable[[], Any]) -> dict[str, int]:
    """Return how often ``run`` calls modules of each of ``KINDS``, recognized by their class names.

    A module inside another of its kind does not count: ``BertAttention`` holds a
    ``BertSelfAttention``. A module that several layers share counts once for each call.

    Args:
        module: The module.
        run: Function that calls the module.
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
    """Yield the outermost modules whose class name contains ``word``."""
    if word in type(module).__name__.lower():
        yield module
        return
    for child in module.children():
        yield from outermost(child, word)
