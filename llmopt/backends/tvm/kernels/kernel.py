"""What a kernel is: one function of TVM and the names of what it reads and writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kernel:
    """A function in destination-passing style: its parameters are inputs, then outputs.

    Args:
        name: Name, one for each distinct function,
            ``"linear_w4_decode_n576_k1536_b32_avx512vnni"``.
        function: ``tvm.tirx.PrimFunc`` whose parameters are buffers.
        inputs: Meaning of the first parameters: ``("x", "codes", "scale", "bias")``.
        outputs: Meaning of the other parameters.
    """

    name: str
    function: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
