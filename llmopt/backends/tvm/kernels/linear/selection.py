"""Products with weights: which kernels compute one, and how its weight is packed for them.

`choose` takes what is wanted and gives kernels and a packing, `pack` applies the packing. The
packing depends on the weight, its scheme and the processor, not on how many rows there are or
whether the product is exact: all kernels of one weight read the same arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from llmopt.backends.tvm.features import Features
from llmopt.backends.tvm.kernels.kernel import Kernel
from llmopt.backends.tvm.kernels.linear import pack as linear_pack
from llmopt.backends.tvm.kernels.linear.storage import (
    Halves,
    Storage,
    block_storage,
    channel_storage,
    half_storage,
    tiles,
)
from llmopt.interface.arrays import Array
from llmopt.quantization.dynamic import Columns
from llmopt.quantization.numerics import Quantized
from llmopt.quantization.packing import Packed
from llmopt.quantization.schemes import Blockwise, Cast, DynamicInt8

Weight = Array | Quantized | Packed | Columns
EPILOGUES: Final = ("bias", "gelu", "gelu_tanh", "swiglu", "residual")


@dataclass(frozen=True)
class Linear:
    """A product ``y = epilogue(x @ W.T)`` of x [M, K] with a weight W [N, K].

    Args:
        n: Rows of the weight; gate and up rows together, where the epilogue is gated.
        k: Columns of the weight.
        scheme: Rounding of the weight: None for float32, `Cast` for bfloat16.
        rows: ``"one"`` for M = 1, ``"many"`` for any M, known when the kernel runs.
        epilogue: Steps: ``"bias"``, then one of ``"gelu"``, ``"gelu_tanh"``, ``"swiglu"`` (the
            first half of the rows are gates, the result has N / 2 columns), then ``"residual"``.
        features: The processor's instructions.
        exact: Whether activations stay float32 where a scheme would round them.
        scale: Type in which scales of blocks are stored. ``"float16"`` saves half a bit a weight
            in blocks of 32 and rounds each scale by at most 2**-11 of it.
        limit: The largest magnitude of int8 codes, as ``quantize-dynamic`` was told.

    Raises:
        ValueError: an unknown epilogue, or steps in another order.
    """

    n: int
    k: int
    scheme: Blockwise | DynamicInt8 | Cast | None = None
    rows: Literal["one", "many"] = "many"
    epilogue: tuple[str, ...] = ()
    features: Features = Features()  # noqa: RUF009 - frozen
    exact: bool = False
    scale: Literal["float16", "float32"] = "float16"
    limit: int = 64

    def __post_init__(self) -> None:
        """Refuse what no kernel has."""
        order = [("bias",), ("gelu", "gelu_tanh", "swiglu"), ("residual",)]
        places = [next((i for i, of in enumerate(order) if s in of), -1) for s in self.epilogue]
        if -1 in places or places != sorted(set(places)):
            raise ValueError(f"epilogue {self.epilogue}: bias, an activation, residual at most")
        if self.paired and self.n % 2:
            raise ValueError(f"n={self.n}: a gated product has as many gate rows as up rows")

    @property
    def paired(self) -> bool:
        """Whether gate and up rows belong together."""
        return "swiglu" in self.epilogue

    @property
    def columns(self) -> int:
        """Columns of the result."""
        return self.n // 2 if self.paired else self.n

    @property
    def storage(self) -> Storage | Halves | None:
        """How integer weights, or bfloat16 ones, are stored; None for float32."""
        if isinstance(self.scheme, Blockwise):
            return block_storage(self.scheme, self.k, self.scale, self.features)
        if isinstance(self.scheme, DynamicInt8):
            return channel_storage(self.k, self.limit, self.features)
        if isinstance(self.scheme, Cast):
            return half_storage(self.k, self.features)
        return None


@dataclass(frozen=True)
class Packing:
    """How the weight of a product is laid out: see `linear_storage`.

    Args:
        n: Rows of the weight.
        k: Columns of the weight.
        storage: Layout of integer weights, or of bfloat16; None for float32.
        paired: Whether each tile has gates and what they multiply.
    """

    n: int
    k: int
    storage: Storage | Halves | None
    paired: bool

    @property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """The shape and type of each array that `pack` returns, by its name."""
        count = tiles(self.n, paired=self.paired)
        if self.storage is None:
            return {"weights": ((count, self.k, 32), "float32")}
        if isinstance(self.storage, Halves):
            return {"weights": ((count, self.storage.columns // 2, 32), "int32")}
        storage = self.storage
        found: dict[str, tuple[tuple[int, ...], str]] = {
            "codes": ((count, storage.columns * storage.bits // 32, 32), "int32"),
            "scale": ((count, storage.blocks, 32), storage.scale),
        }
        if storage.zero_points:
            kind = "int8" if storage.signed else "uint8"
            found["zero_point"] = ((count, storage.blocks, 32), kind)
        return found


@dataclass(frozen=True)
class LinearKernels:
    """How a product is computed.

    Args:
        kernels: Kernels in the order of their calls. Inputs: ``x`` [M, K], the arrays of the
            packing by name, ``bias`` [N] and ``residual`` [M, columns] where the epilogue has them;
            output: ``y`` [M, columns]. All float32 where the packing does not say otherwise.
        packing: Packing of the weight.
    """

    kernels: tuple[Kernel, ...]
    packing: Packing


def choose(wanted: Linear) -> LinearKernels:
    """Return the kernels of a product and the packing they read."""
    packing = Packing(wanted.n, wanted.k, wanted.storage, wanted.paired)
    return LinearKernels((_kernel(wanted, packing),), packing)


def pack(weight: Weight, packing: Packing) -> dict[str, Array]:
    """Return the arrays of a weight by the kernels' names of them.

    Args:
        weight: [N, K] of any float type, rounded here if the packing is of integers; or
            `Quantized` or `Packed` in the packing's scheme; or `Columns` of int8, [K, N].
        packing: Packing from `choose`.

    Raises:
        ValueError: the weight is not of the packing's shape or scheme.
        UnsupportedModelError: a scale or a code that the packing cannot hold.
    """
    n, paired, storage = packing.n, packing.paired, packing.storage
    _check(weight, packing)
    if not isinstance(storage, Storage):
        assert isinstance(weight, np.ndarray)
        if storage is None:
            return linear_pack.pack_floats(weight, n, paired=paired)
        return linear_pack.pack_halves(weight, n, storage.columns, paired=paired)
    if isinstance(weight, Columns):
        return linear_pack.pack_channels(weight, n, storage, paired=paired)
    return linear_pack.pack_blocks(weight, n, storage, paired=paired)


def _check(weight: Weight, packing: Packing) -> None:
    if isinstance(weight, Columns):
        found: tuple[int, ...] = weight.codes.shape[::-1]
    elif isinstance(weight, np.ndarray):
        found = weight.shape
    else:
        found = (len(weight.scale), weight.columns)
    if found != (packing.n, packing.k):
        raise ValueError(f"weight {found} for a packing of {(packing.n, packing.k)}")
    storage = packing.storage
    fits = isinstance(weight, Columns) == (isinstance(storage, Storage) and storage.channels)
    if isinstance(weight, Packed | Quantized):
        fits = isinstance(storage, Storage) and weight.scheme == storage.scheme
    if not fits:
        raise ValueError(f"a {type(weight).__name__} does not fit {storage}")


def _kernel(wanted: Linear, packing: Packing) -> Kernel:
    from llmopt.backends.tvm.kernels.signature import Argument, kernel

    m: int | str = 1 if wanted.rows == "one" else "m"
    arguments = [Argument("x", (m, wanted.k))]
    arguments += [Argument(name, *of) for name, of in packing.arrays.items()]
    if "bias" in wanted.epilogue:
        arguments.append(Argument("bias", (wanted.n,)))
    if "residual" in wanted.epilogue:
        arguments.append(Argument("residual", (m, wanted.columns)))
    outputs = [Argument("y", (m, wanted.columns))]
    return kernel(_name(wanted), arguments, outputs, _body(wanted))


def _body(wanted: Linear) -> Callable[[Mapping[str, Any]], None]:
    """Return what emits the kernel's code."""
    from llmopt.backends.tvm.kernels import amx
    from llmopt.backends.tvm.kernels.linear import (
        amx as linear_amx,
    )
    from llmopt.backends.tvm.kernels.linear import (
        bfloat as linear_bfloat,
    )
    from llmopt.backends.tvm.kernels.linear import (
        exact as linear_exact,
    )
    from llmopt.backends.tvm.kernels.linear import (
        float as linear_float,
    )
    from llmopt.backends.tvm.kernels.linear import (
        gemm as linear_gemm,
    )
    from llmopt.backends.tvm.kernels.linear import (
        gemv as linear_gemv,
    )
    from llmopt.backends.tvm.kernels.linear.epilogue import Epilogue
    from llmopt.backends.tvm.kernels.linear.products import products

    storage, features, k = wanted.storage, wanted.features, wanted.k
    one = wanted.rows == "one"

    def body(buffers: Mapping[str, Any]) -> None:
        epilogue = Epilogue(wanted.n, wanted.epilogue, buffers)
        if isinstance(storage, Halves) and features.amx_bf16 and not (one or wanted.exact):
            linear_bfloat.emit(buffers, epilogue, k, amx.Intrinsics())
        elif not isinstance(storage, Storage):
            emit = linear_float.emit_row if one else linear_float.emit_rows
            emit(buffers, epilogue, k, features)
        elif wanted.exact:
            linear_exact.emit(buffers, epilogue, k, storage, features.lanes)
        elif not one and features.amx_int8 and linear_amx.fits(storage):
            linear_amx.emit(buffers, epilogue, k, storage, amx.Intrinsics())
        else:
            unit = products(features, largest=storage.largest, signed=storage.signed)
            (linear_gemv if one else linear_gemm).emit(buffers, epilogue, k, storage, unit)

    return body


def _name(wanted: Linear) -> str:
    """Return a name that no other product has."""
    scheme = wanted.scheme
    kind = "f32" if scheme is None else str(scheme)
    if isinstance(scheme, Blockwise):
        zero = "" if scheme.symmetric else "z"
        kind = f"w{scheme.bits}{zero}_b{scheme.block}_{wanted.scale}"
    elif isinstance(scheme, DynamicInt8):
        kind = f"w8a8_{wanted.limit}"
    use = ("decode" if wanted.rows == "one" else "prefill") + ("_exact" if wanted.exact else "")
    parts = [f"linear_{kind}_{use}_n{wanted.n}_k{wanted.k}", *wanted.epilogue]
    return "_".join([*parts, wanted.features.label])
