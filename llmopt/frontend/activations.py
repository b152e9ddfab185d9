"""What meets each weight: mean squares of activations, measured on the source.

A column of a weight matters as much as the activation that meets it is large. Some are thousands
of times larger than others, on any text: a few hundred random tokens are enough to find them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from llmopt.frontend.reference import Reference, name_of
from llmopt.interface.arrays import Arrays

Squares = npt.NDArray[np.float32]
LEAST: Final = 1e-6  # of the mean: a column that met nothing is no reason to give it up
STEPS: Final = 4  # to a factor of two: so that the order of a sum decides nothing


def mean_squares(reference: Reference, batches: Sequence[Arrays]) -> dict[str, Squares]:
    """Return the mean square of what meets each column of each weight, by the weight's name.

    Each is [K] float32, of mean about 1, and a power of two to a quarter: what is measured is
    good to a few percent, and artifacts are to be the same whenever they are built. Weights that
    are not multiplied by ``torch.nn.functional.linear`` are not found.

    Args:
        reference: The source.
        batches: Inputs to run it on; none of them padded.
    """
    with _Squares() as found:
        for _ in reference.run(batches):
            pass
    return {name: _rounded(total) for name, total in found.totals.items()}


class _Squares(TorchFunctionMode):
    """Sees every call of torch: adds up the squares of what is multiplied by a named weight."""

    def __init__(self) -> None:
        super().__init__()
        self.totals: dict[str, Tensor] = {}

    @override
    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is functional.linear and len(args) >= 2:
            self._add(args[0], args[1])
        return func(*args, **(kwargs or {}))

    def _add(self, x: Tensor, weight: Tensor) -> None:
        name = name_of(weight)
        if name is not None:
            squares = x.float().square().reshape(-1, x.shape[-1]).mean(dim=0)
            self.totals[name] = self.totals.get(name, torch.zeros(())) + squares


def _rounded(squares: Tensor) -> Squares:
    values = squares.double().numpy()
    mean = float(values.mean()) or 1.0
    steps = np.rint(np.log2(np.maximum(values / mean, LEAST)) * STEPS) / STEPS
    found: Squares = np.exp2(steps).astype(np.float32)
    return found
