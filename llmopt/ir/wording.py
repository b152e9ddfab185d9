"""The words of a difference: types, attributes and constants in few of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import onnx_ir as ir

from llmopt.ir import graph as g
from llmopt.ir.fingerprints import content

_MOST: Final = 8  # numbers: a larger constant is worded by type and shape


def ports(
    what: str, old: Sequence[ir.Value], new: Sequence[ir.Value], symbols: dict[str, str]
) -> Iterator[str]:
    """Yield what changed in inputs or outputs; ``symbols`` collects names of free sizes."""
    mine, theirs = ({str(v.name): v for v in side} for side in (old, new))
    for name in dict.fromkeys([*mine, *theirs]):
        if name not in theirs or name not in mine:
            value = mine.get(name) or theirs[name]
            yield f"{what} {name} {'removed' if name in mine else 'added'}: {type_of(value)}"
        elif not _same_type(mine[name], theirs[name], symbols):
            yield f"{what} {name}: {type_of(mine[name])} → {type_of(theirs[name])}"
    both = [[name for name in side if name in mine and name in theirs] for side in (mine, theirs)]
    if both[0] != both[1]:
        yield f"{what}s in another order: {', '.join(both[0])} → {', '.join(both[1])}"


def _same_type(old: ir.Value, new: ir.Value, symbols: dict[str, str]) -> bool:
    """Whether types are equal but for symbols that are called otherwise, everywhere alike."""
    mine, theirs = g.shape(old), g.shape(new)
    if old.dtype != new.dtype or mine is None or theirs is None:
        return old.dtype == new.dtype and mine == theirs
    if len(mine) != len(theirs):
        return False
    for one, other in zip(mine, theirs, strict=True):
        if isinstance(one, int) or isinstance(other, int):
            if one != other:
                return False
        elif one[:1] != "?" != other[:1] and not _renamed(one, other, symbols):
            return False
    return True


def _renamed(one: str, other: str, symbols: dict[str, str]) -> bool:
    """Whether a symbol has the one new name that it has everywhere, and no other has it."""
    return (
        symbols.setdefault(f"before {one}", other) == other
        and symbols.setdefault(f"after {other}", one) == one
    )


def fits(old: ir.Value, new: ir.Value) -> bool:
    """Whether what is known of both types agrees; symbols agree with each other."""
    mine, theirs = g.shape(old), g.shape(new)
    if old.dtype is not None and new.dtype is not None and old.dtype != new.dtype:
        return False
    if mine is None or theirs is None:
        return True
    known = [(a, b) for a, b in zip(mine, theirs, strict=False)]
    numbers = all(a == b for a, b in known if isinstance(a, int) and isinstance(b, int))
    return len(mine) == len(theirs) and numbers


def attributes(old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[str]:
    """Yield the attributes that are not what they were."""
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            yield f"{name} {_short(old.get(name))} → {_short(new.get(name))}"


def defaults(old: Sequence[ir.Value], new: Sequence[ir.Value]) -> Iterator[str]:
    """Yield what changed in the defaults of inputs that both sides have."""
    theirs = {value.name: value for value in new}
    for value in old:
        if value.name not in theirs:
            continue
        tensors = [each.const_value for each in (value, theirs[value.name])]
        digests = [None if tensor is None else content(tensor) for tensor in tensors]
        if digests[0] != digests[1]:
            texts = ["none" if tensor is None else values(tensor) for tensor in tensors]
            yield f"input {value.name}: default {' → '.join(texts)}"


def spelled_out(attributes: Mapping[str, str]) -> tuple[str, ...]:
    """Return attributes as ``name=value``, long values cut."""
    return tuple(f"{name}={_short(text)}" for name, text in attributes.items())


def _short(text: str | None, most: int = 40) -> str:
    if text is None:
        return "default"
    return text if len(text) <= most else f"{text[: most - 1]}…"


def numbers(left: ir.Value | None, right: ir.Value | None) -> str:
    """Return how two operands differ of which one at least holds numbers."""
    tensors = [None if v is None else ir.convenience.get_const_tensor(v) for v in (left, right)]
    if tensors[0] is None or tensors[1] is None:
        return f"{source(left)} → {source(right)}"
    texts = [values(tensor) for tensor in tensors if tensor is not None]
    if texts[0] == texts[1]:
        return f"has other numbers, {texts[0]}"
    return f"{texts[0]} → {texts[1]}"


def values(tensor: ir.TensorProtocol) -> str:
    """Return small constants by their numbers, others by type and shape."""
    kind = f"{tensor.dtype.name.lower()}{list(tensor.shape.numpy())}"
    return f"{kind} {tensor.numpy().tolist()}" if tensor.size <= _MOST else kind


def source(value: ir.Value | None) -> str:
    """Return what an operand is: a constant, an input, or computed."""
    if value is None:
        return "none"
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is not None and not value.is_graph_input():
        return values(tensor)
    return "an input" if value.is_graph_input() else "computed"


def type_of(value: ir.Value) -> str:
    """Return the type and shape of a value: ``float[B, S, 64]``."""
    dims = g.shape(value)
    sizes = (
        "[…]"
        if dims is None
        else f"[{', '.join('?' if str(d)[:1] == '?' else str(d) for d in dims)}]"
    )
    return f"{'?' if value.dtype is None else value.dtype.name.lower()}{sizes}"
