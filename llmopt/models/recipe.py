"""Recipes: parameters of a definition from tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Op = Literal["copy", "transpose", "add-one"]


@dataclass(frozen=True)
class ParameterRecipe:
    """One parameter: a tensor of the checkpoint, changed by ``op``, then cut to ``rows``.

    Args:
        sources: Names of the checkpoint's tensors; currently one.
        op: ``copy`` keeps the tensor, ``transpose`` swaps its two axes (GPT-2 stores
            [in, out]), ``add-one`` adds 1 (Gemma stores a norm's weight less 1).
        rows: First row, and the one after the last; None for all.
    """

    sources: tuple[str, ...]
    op: Op = "copy"
    rows: tuple[int, int] | None = None

    def apply(self, read: Callable[[str], npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """Return the parameter, of the dtype that ``read`` returns.

        ``add-one`` returns float32: 1 + w has more digits than a bfloat16 or float16 w.
        """
        (source,) = self.sources
        tensor = read(source)
        if self.op == "transpose":
            tensor = tensor.T
        if self.op == "add-one":
            tensor = tensor.astype(np.float32) + np.float32(1)
        return tensor if self.rows is None else tensor[slice(*self.rows)]

    def shape(self, stored: Callable[[str], tuple[int, ...]]) -> tuple[int, ...]:
        """Return the shape that ``apply`` returns, from the stored shapes."""
        (source,) = self.sources
        shape = stored(source)
        if self.op == "transpose":
            shape = shape[::-1]
        if self.rows is None or not shape:
            return shape
        return (len(range(shape[0])[slice(*self.rows)]), *shape[1:])
