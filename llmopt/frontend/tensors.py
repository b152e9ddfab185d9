"""PyTorch tensors as numpy arrays, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from llmopt.interface.arrays import Array

Read = Callable[[str], Array]
"""Function from the name of a parameter or buffer to its values."""


def reader(tensors: Mapping[str, torch.Tensor]) -> Read:
    """Return a function that reads a live module's tensors by name."""
    return lambda name: to_numpy(tensors[name])


def to_numpy(tensor: torch.Tensor) -> Array:
    """Return a tensor's values; bfloat16 as ``ml_dtypes.bfloat16``."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
