"""Mean squares of the activations that each weight multiplies, measured on the source.

A column of a weight matters as much as the channel that it multiplies is large. Some channels are
thousands of times larger than others, on any text: a few hundred random tokens suffice to tell.
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
LEAST: Final = 1e-6  # of the mean: a channel that was silent here may still matter on other text
STEPS: Final = 4  # to a factor of two: so that the order of a sum decides nothing


def mean_squares(reference: Reference, batches: Sequence[Arrays]) -> dict[str, Squares]:
    """Return the mean square of each input channel of each weight, by the weight's name.

    Each is [K] float32 with a mean of about 1, rounded to quarter powers of two: measurements are
    good to a few percent, and builds must be reproducible. Only weights that
    ``torch.nn.functional.linear`` multiplies are measured.

    Args:
        reference: The source.
        batches: Inputs to run the source on, without padding.
    """
    with _Squares() as squares:
        for _ in reference.run(batches):
            pass
    return {name: _rounded(total) for name, total in squares.totals.items()}


class _Squares(TorchFunctionMode):
    """Intercepts calls of torch: sums the squared inputs of each named weight."""

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
    rounded: Squares = np.exp2(steps).astype(np.float32)
    return rounded
