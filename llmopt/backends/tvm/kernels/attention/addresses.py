"""Where an attention kernel finds its numbers, and which of them its queries may see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T  # noqa: N812 - the script language's own name

from llmopt.backends.tvm.kernels.activations import softcapped
from llmopt.backends.tvm.kernels.attention.form import MASKED, AttentionForm
from llmopt.backends.tvm.kernels.vectors import lanes_of, splat


@dataclass(frozen=True)
class Addresses:
    """Buffers and sizes of a kernel while its text is read.

    Rows are (query, head) pairs of one key head: row s·R + r is query s of head g·R + r.

    Args:
        form: The attention.
        q: [M, H·D], or the packed rows [M, H·D + 2·G·D]; M = B·S.
        k: [B·T, G·D], the packed rows, or a cache [B, G, C, D].
        v: Values, as ``k``.
        mask: [B, T] int64, 0 for padding.
        y: [M, H·D].
        length: S.
        keys: T.
    """

    form: AttentionForm
    q: Any
    k: Any
    v: Any
    mask: Any
    y: Any
    length: Any
    keys: Any

    def row(self, b: Any, row: Any, g: Any) -> tuple[Any, Any]:
        """Return where a row's numbers begin in ``q`` and ``y``."""
        ratio = self.form.ratio
        return b * self.length + row // ratio, (g * ratio + row % ratio) * self.form.width

    def key(self, b: Any, g: Any, t: Any) -> tuple[Any, ...]:
        """Return where the numbers of key t begin in ``k``."""
        return self._held(b, g, t, self.form.heads)

    def value(self, b: Any, g: Any, t: Any) -> tuple[Any, ...]:
        """Return where the numbers of value t begin in ``v``."""
        return self._held(b, g, t, self.form.heads + self.form.kv_heads)

    def _held(self, b: Any, g: Any, t: Any, head: int) -> tuple[Any, ...]:
        if self.form.cached:
            return b, g, t, T.int64(0)
        first = head if self.form.packed else 0
        return b * self.keys + t, (g + first) * self.form.width

    @property
    def past(self) -> Any:
        """P: position of the first query among the keys."""
        return self.keys - self.length

    def begin(self, row: Any) -> Any:
        """Return the first key that a row sees, or a later row."""
        if self.form.left is None:
            return T.int64(0)
        return T.max(self.past + row // self.form.ratio - self.form.left, T.int64(0))

    def end(self, row: Any) -> Any:
        """Return the end of the keys that a row sees, or an earlier row."""
        if self.form.later is None:
            return self.keys
        query = T.min(row // self.form.ratio, self.length - 1)
        return T.min(self.past + query + self.form.later + 1, self.keys)

    def bias(self, b: Any, t: Any) -> Any:
        """Return what to add to scores of key t: 0, or `MASKED` for padding and past the end."""
        inside = T.float32(0.0)
        if self.form.masked:
            inside = T.if_then_else(self.mask[b, t] == T.int64(0), T.float32(MASKED), inside)
        return T.if_then_else(t < self.keys, inside, T.float32(MASKED))

    def capped(self, score: Any) -> Any:
        """Return scores after the softcap, times log2(e): exponents of two."""
        if not self.form.softcap:
            return score
        return softcapped(score, self.form.softcap)

    def windowed(self, score: Any, t: Any, position: Any) -> Any:
        """Return the scores of key t, `MASKED` where the rows at these positions do not see it."""
        lanes = lanes_of(score)
        key, hidden = _wide(T.cast(t, "int32"), lanes), splat(MASKED, lanes)
        if self.form.later is not None:
            last = position + _wide(T.int32(self.form.later), lanes)
            score = T.Select(key <= last, score, hidden)
        if self.form.left is not None:
            first = position - _wide(T.int32(self.form.left), lanes)
            score = T.Select(key >= first, score, hidden)
        return score


def _wide(number: Any, lanes: int) -> Any:
    return T.broadcast(number, lanes) if lanes > 1 else number
