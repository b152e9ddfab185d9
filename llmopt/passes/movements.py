"""Where each number goes in a chain of reshapes and transposes, and the shortest such chain.

A shape says how long an axis is. Here an axis is a product of *atoms*, outermost first, and an atom
is a part of an axis of what the chain begins with. Reshaping groups atoms anew, transposing puts
axes in another order. Whatever the chain was, three operators do the same: a Reshape that takes
apart what is going to be parted, a Transpose, and a Reshape that joins.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Self

from llmopt.ir import graph as g
from llmopt.ir.sizes import factors, product, quotient

Sizes = tuple[g.Dim, ...]
Order = tuple[int, ...]
_LAST: Final = (1 << 30,)  # axes of size one have no place: they go where they are not in the way


@dataclass(frozen=True)
class Atom:
    """A part of an axis.

    Args:
        position: The axis that it was at the start, and which part of it: in order, atoms are where
            they were.
        size: Length of the axis; never 1.
    """

    position: tuple[int, ...]
    size: g.Dim

    def cut(self, outer: g.Dim, inner: g.Dim) -> tuple[Atom, Atom]:
        """Return its two parts."""
        return Atom((*self.position, 0), outer), Atom((*self.position, 1), inner)


Axis = tuple[Atom, ...]


@dataclass(frozen=True)
class MovementStep:
    """One operator.

    Args:
        sizes: Sizes of the result.
        order: The axis of the operand that each axis is, of a Transpose; empty for a Reshape.
    """

    sizes: Sizes
    order: Order = ()


@dataclass(frozen=True)
class Movement:
    """What a chain of reshapes and transposes does.

    Args:
        before: Sizes of what it begins with.
        after: Sizes of what it ends with.
        axes: Atoms that each axis of the end consists of.
    """

    before: Sizes
    after: Sizes
    axes: tuple[Axis, ...]

    @classmethod
    def start(cls, sizes: Sequence[g.Dim]) -> Self:
        """Return the movement that moves nothing."""
        axes = [() if size == 1 else (Atom((i,), size),) for i, size in enumerate(sizes)]
        return cls(tuple(sizes), tuple(sizes), tuple(axes))

    def transposed(self, order: Sequence[int]) -> Movement:
        """Return it with a Transpose behind."""
        after = tuple(self.after[axis] for axis in order)
        return Movement(self.before, after, tuple(self.axes[axis] for axis in order))

    def reshaped(self, after: Sequence[g.Dim]) -> Movement | None:
        """Return it with a Reshape behind, or None where the joined and split axes are unknown."""
        axes = _grouped([atom for axis in self.axes for atom in axis], after)
        return None if axes is None else Movement(self.before, tuple(after), axes)

    def plans(self) -> list[list[MovementStep]]:
        """Return the chains that do the same, those of fewer transposes and operators first."""
        if self._atoms == sorted(self._atoms, key=_place):
            return [[] if self.before == self.after else [MovementStep(self.after)]]
        found = [self._transposed_first(), self._reshaped_first(), self._in_blocks()]
        return sorted((plan for plan in found if plan is not None), key=len)

    def reshape_first(self) -> tuple[Sizes, Order] | None:
        """Return the sizes and the order of a Reshape and a Transpose that do the same."""
        whole = sorted(self._atoms, key=_place)
        if any(not _run(axis, whole) for axis in self.axes):
            return None
        begins = [axis[0].position if axis else _LAST for axis in self.axes]
        turned = sorted(range(len(begins)), key=begins.__getitem__)
        order = [turned.index(axis) for axis in range(len(begins))]
        return tuple(self.after[axis] for axis in turned), tuple(order)

    @property
    def _atoms(self) -> list[Atom]:
        return [atom for axis in self.axes for atom in axis]

    @property
    def _source(self) -> list[Axis]:
        """The atoms of each axis that there is at the start."""
        atoms = sorted(self._atoms, key=_place)
        return [tuple(a for a in atoms if a.position[0] == i) for i in range(len(self.before))]

    def _transposed_first(self) -> list[MovementStep] | None:
        """Return a Transpose and, if needed, a Reshape; axes of the start stay whole."""
        atoms, source = self._atoms, self._source
        if any(not _run(axis, atoms) for axis in source):
            return None
        order = self._exact(source)
        if order is not None:
            return [MovementStep(self.after, order)]
        kept = [i for i, axis in enumerate(source) if axis]
        kept.sort(key=lambda i: atoms.index(source[i][0]))
        order = (*kept, *(i for i, axis in enumerate(source) if not axis))
        return [MovementStep(tuple(self.before[i] for i in order), order), MovementStep(self.after)]

    def _exact(self, source: list[Axis]) -> Order | None:
        """Return the order of a Transpose that does it all, if there is one."""
        ones = deque(i for i, axis in enumerate(source) if not axis)
        order = []
        for axis in self.axes:
            if axis and axis not in source:
                return None
            if not axis and not ones:
                return None
            order.append(source.index(axis) if axis else ones.popleft())
        return tuple(order) if len(order) == len(source) else None

    def _reshaped_first(self) -> list[MovementStep] | None:
        """Return a Reshape and a Transpose; axes of the end are whole from the first on."""
        found = self.reshape_first()
        if found is None:
            return None
        sizes, order = found
        turned = MovementStep(self.after, order)
        return [turned] if sizes == self.before else [MovementStep(sizes), turned]

    def _in_blocks(self) -> list[MovementStep]:
        """Return a Reshape, a Transpose and a Reshape of as few axes as can be."""
        blocks: list[list[Atom]] = []
        whole = sorted(self._atoms, key=_place)
        for atom in self._atoms:
            if blocks and _run((blocks[-1][-1], atom), whole):
                blocks[-1].append(atom)
            else:
                blocks.append([atom])
        begun = sorted(blocks, key=lambda block: block[0].position)
        first = tuple(self._size(tuple(block)) for block in begun)
        order = tuple(begun.index(block) for block in blocks)
        return [
            MovementStep(first),
            MovementStep(tuple(first[axis] for axis in order), order),
            MovementStep(self.after),
        ]

    def _size(self, atoms: Axis) -> g.Dim:
        """Return how long some atoms are together, by its name if an axis has one."""
        for axes, sizes in ((self._source, self.before), (self.axes, self.after)):
            if atoms in axes:
                return sizes[list(axes).index(atoms)]
        found = [factors(atom.size) for atom in atoms]
        symbols = (symbol for _, names in found for symbol in names)
        return product(math.prod(count for count, _ in found), symbols)


def composed(first: Sequence[int], second: Sequence[int]) -> Order:
    """Return the order of a Transpose that does what two do, one after the other.

    >>> composed((0, 2, 1), (2, 0, 1))
    (1, 0, 2)
    """
    return tuple(first[axis] for axis in second)


def inverse(order: Sequence[int]) -> Order:
    """Return the order of the Transpose that takes another back.

    >>> inverse((2, 0, 1))
    (1, 2, 0)
    """
    return tuple(order.index(axis) for axis in range(len(order)))


def stays(sizes: Iterable[g.Dim], order: Sequence[int]) -> bool:
    """Whether a Transpose of what has these sizes moves axes of size one alone.

    >>> stays(["B", 1, "S", 8], (0, 2, 1, 3))
    True
    """
    sizes = list(sizes)
    moved = [axis for axis in order if sizes[axis] != 1]
    return moved == sorted(moved)


def _place(atom: Atom) -> tuple[int, ...]:
    return atom.position


def _run(axis: Sequence[Atom], atoms: Sequence[Atom]) -> bool:
    """Whether ``axis`` is a run of ``atoms``."""
    if not axis:
        return True
    start = atoms.index(axis[0])
    return list(atoms[start : start + len(axis)]) == list(axis)


def _grouped(atoms: list[Atom], after: Sequence[g.Dim]) -> tuple[Axis, ...] | None:
    """Return the atoms of each axis of ``after``, from both ends; what is left is one size."""
    if 0 in after or any(atom.size == 0 for atom in atoms):
        return None
    rest, sizes = deque(atoms), deque(after)
    front, back = list[Axis](), list[Axis]()
    while sizes and (axis := _taken(rest, sizes[0], at=0)) is not None:
        front.append(axis)
        sizes.popleft()
    while sizes and (axis := _taken(rest, sizes[-1], at=-1)) is not None:
        back.append(axis)
        sizes.pop()
    middle = _middle(list(rest), list(sizes))
    return None if middle is None else (*front, *middle, *back[::-1])


def _middle(atoms: list[Atom], sizes: list[g.Dim]) -> list[Axis] | None:
    """Return the atoms of axes that end where the sizes on both sides say."""
    if not atoms and not sizes:
        return []
    if not atoms or not sizes:
        return None
    if len(sizes) == 1:
        return [tuple(atoms)] if _may_equal([atom.size for atom in atoms], sizes) else None
    if len(atoms) > 1 or not _may_equal([atoms[0].size], sizes):
        return None
    parts = [Atom((*atoms[0].position, i), size) for i, size in enumerate(sizes)]
    return [() if part.size == 1 else (part,) for part in parts]


def _may_equal(one: Sequence[g.Dim], other: Sequence[g.Dim]) -> bool:
    """Whether two products may be equal: numbers alone have to be."""
    if not all(isinstance(size, int) for size in (*one, *other)):
        return True
    return math.prod(map(int, one)) == math.prod(map(int, other))


def _taken(rest: deque[Atom], size: g.Dim, *, at: int) -> Axis | None:
    """Take the atoms that make up ``size`` off one end, or none if they do not."""
    left, axis = deque(rest), deque[Atom]()
    while size != 1:
        if not left:
            return None
        atom = left.popleft() if at == 0 else left.pop()
        wanted, over = quotient(size, atom.size), quotient(atom.size, size)
        if wanted is None and over is None:
            return None
        if wanted is None:
            assert over is not None
            outer, inner = atom.cut(*((size, over) if at == 0 else (over, size)))
            atom = outer if at == 0 else inner
            (left.appendleft if at == 0 else left.append)(inner if at == 0 else outer)
        (axis.append if at == 0 else axis.appendleft)(atom)
        size = 1 if wanted is None else wanted
    rest.clear()
    rest.extend(left)
    return tuple(axis)
