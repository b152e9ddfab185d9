"""Precision plans: the scheme of each tensor, written in manifests as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Self

from llmopt.errors import UsageError
from llmopt.quantization.schemes import Scheme, parse_scheme


@dataclass(frozen=True)
class PrecisionPlan:
    """The scheme of each quantized tensor; other tensors keep their type.

    Two plans are equal if they have the same schemes, in any order or spelling:

    >>> plan = PrecisionPlan.uniform(["b", "a"], "w4{block=32}")
    >>> plan.to_json()
    '{"a": "w4", "b": "w4"}'
    >>> PrecisionPlan.from_json(plan.to_json()) == plan
    True

    Args:
        schemes: Tensor name → scheme text, for example ``"w4{block=64}"``.

    Raises:
        UnknownNameError: A scheme or an option of it is unknown.
        UsageError: A text is malformed.
    """

    schemes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Normalize every scheme, sort by name and freeze."""
        normalized = {name: str(parse_scheme(self.schemes[name])) for name in sorted(self.schemes)}
        object.__setattr__(self, "schemes", MappingProxyType(normalized))

    @classmethod
    def uniform(
        cls,
        names: Iterable[str],
        scheme: str | Scheme,
        *,
        overrides: Mapping[str, str | Scheme] | None = None,
    ) -> Self:
        """Return the plan that gives every name the same scheme.

        >>> head = {"lm_head.weight": "w8"}
        >>> PrecisionPlan.uniform(["q", "lm_head.weight"], "w4", overrides=head).to_json()
        '{"lm_head.weight": "w8", "q": "w4"}'

        Args:
            names: Names of the tensors to quantize.
            scheme: Scheme of all of them.
            overrides: Other schemes by name; names beyond ``names`` are ignored.
        """
        other = overrides or {}
        return cls({name: str(other.get(name, scheme)) for name in names})

    def scheme(self, name: str) -> Scheme | None:
        """Return the scheme of the tensor ``name``, None where it keeps its type."""
        return parse_scheme(self.schemes[name]) if name in self.schemes else None

    def to_json(self) -> str:
        """Return one JSON object, names sorted: equal plans give equal text."""
        return json.dumps(dict(self.schemes), sort_keys=True, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the plan that `to_json` wrote.

        Raises:
            UsageError: The text is not a JSON object of strings, or a string is not a scheme.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise UsageError(f"precision plan: not JSON ({error}); write name: scheme") from error
        if not isinstance(data, dict) or not all(isinstance(v, str) for v in data.values()):
            raise UsageError("precision plan: expected a JSON object of tensor name: scheme")
        return cls(data)

    def __len__(self) -> int:
        """Return the number of quantized tensors."""
        return len(self.schemes)

    def __iter__(self) -> Iterator[str]:
        """Yield the names of the quantized tensors, sorted."""
        return iter(self.schemes)

    def __hash__(self) -> int:
        """Hash what equality compares."""
        return hash(self.to_json())
