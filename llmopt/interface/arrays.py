"""Arrays by name, and what runs a model on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]
"""A tensor of any shape and element type."""

Arrays = dict[str, Array]
"""Tensors by the name of the input or output that they belong to."""

Run = Callable[[Mapping[str, Array]], Arrays]
"""A model ready to run: inputs by name in, outputs by name out."""
