"""The words that products are written in: a thin layer over TVMScript's builder.

Kernels are plain Python that runs once and emits a function: a Python loop is unrolled code, a
`with serial(n)` is a loop of the kernel. One vector lives in one `Register`, because TVM moves
whatever is larger than a kilobyte from the stack to its heap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm.tirx.script import builder as T  # noqa: N812 - the script language's own name

__all__ = [
    "Expr",
    "Register",
    "T",
    "bind",
    "bits",
    "cast",
    "integer",
    "intrinsic",
    "load",
    "number",
    "parallel",
    "prefetch",
    "serial",
    "splat",
    "store",
    "typed",
    "when",
]

Expr = Any


def typed(dtype: str, lanes: int) -> str:
    """Return the name of a vector type.

    >>> typed("int32", 16), typed("int32", 1)
    ('int32x16', 'int32')
    """
    return f"{dtype}x{lanes}" if lanes > 1 else dtype


def splat(value: Expr, lanes: int) -> Expr:
    """Return a vector of one value."""
    return T.broadcast(value, lanes) if lanes > 1 else value


def number(value: float, lanes: int = 1) -> Expr:
    """Return a float32 constant."""
    return splat(T.float32(value), lanes)


def integer(value: int, lanes: int = 1) -> Expr:
    """Return an int32 constant."""
    return splat(T.int32(value), lanes)


def load(buffer: Any, index: Sequence[Expr], lanes: int) -> Expr:
    """Return ``lanes`` neighbours of a buffer."""
    return buffer.vload(list(index), dtype=typed(str(buffer.ty.dtype), lanes))


def store(buffer: Any, index: Sequence[Expr], value: Expr, lanes: int) -> None:
    """Write ``lanes`` neighbours of a buffer."""
    *first, last = index
    T.buffer_store(buffer, value, [*first, T.ramp(last, 1, lanes) if lanes > 1 else last])


def cast(dtype: str, value: Expr, lanes: int) -> Expr:
    """Return ``value`` converted."""
    return T.Cast(typed(dtype, lanes), value)


def bits(dtype: str, value: Expr, lanes: int) -> Expr:
    """Return the bits of ``value`` as another type."""
    return T.reinterpret(typed(dtype, lanes), value)


def bind(value: Expr) -> Expr:
    """Return ``value`` as a variable, so that its many uses compute it once."""
    return T.Bind(value)


def intrinsic(name: str, dtype: str, *operands: Expr) -> Expr:
    """Return LLVM's intrinsic ``name``, which reads nothing but its operands."""
    return T.call_llvm_pure_intrin(dtype, name, *operands)


def prefetch(buffer: Any, index: Sequence[Expr], *, write: bool = False, near: int = 3) -> None:
    """Ask for the line of memory that an element lies in.

    Args:
        buffer: Buffer to prefetch from.
        index: The element; behind the buffer's end nothing happens.
        write: Whether it will be written.
        near: 3 for the first cache, 2 for the second.
    """
    operands = (T.int32(int(write)), T.int32(near), T.int32(1))  # 1: data, not code
    T.evaluate(
        T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(buffer[tuple(index)]), *operands)
    )


def serial(extent: Expr) -> Any:
    """Return a loop for a ``with`` statement, which names its index."""
    return T.serial(extent)


def parallel(extent: Expr) -> Any:
    """Return a loop whose iterations threads share, each a run of neighbours."""
    return T.parallel(extent)


@contextmanager
def when(condition: Expr) -> Iterator[None]:
    """Emit what follows under a condition; a Python bool decides at once."""
    with T.If(condition), T.Then():
        yield


class Register:
    """One vector that changes in loops; LLVM keeps it in a register.

    Its memory is of TVM's scope ``global``: below a kilobyte that is the stack, while ``local``
    is asked of TVM's heap in every iteration.

    Args:
        lanes: Number of elements.
        dtype: Their type.
    """

    def __init__(self, lanes: int, dtype: str = "float32") -> None:
        self.lanes = lanes
        self.buffer = T.alloc_buffer((lanes,), dtype)

    def get(self) -> Expr:
        """Return its value."""
        return load(self.buffer, [0], self.lanes)

    def set(self, value: Expr) -> None:
        """Give it a value."""
        store(self.buffer, [0], value, self.lanes)
