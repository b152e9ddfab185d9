"""A precision plan: which tensor gets which scheme. A value, written in manifests as JSON."""

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
    """The scheme of each tensor that is quantized; what is not named keeps its type.

    Two plans are equal when they name the same schemes, in whatever order or spelling:

    >>> plan = PrecisionPlan.uniform(["b", "a"], "w4{block=32}")
    >>> plan.to_json()
    '{"a": "w4", "b": "w4"}'
    >>> PrecisionPlan.from_json(plan.to_json()) == plan
    True

    Args:
        schemes: Tensor name → scheme text, for example ``"w4{block=64}"``.

    Raises:
        UnknownNameError: a text names no scheme, or no option of it.
        UsageError: a text is not of that form.
    """

    schemes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Spell every scheme one way, in the order of the names, and freeze them."""
        spelt = {name: str(parse_scheme(self.schemes[name])) for name in sorted(self.schemes)}
        object.__setattr__(self, "schemes", MappingProxyType(spelt))

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
            names: The tensors to quantize: which ones may be is the caller's knowledge.
            scheme: Scheme of all tensors.
            overrides: Other schemes of some tensors; names beyond ``names`` are ignored.
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
            UsageError: the text is not a JSON object of texts, or a text is no scheme.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise UsageError(f"precision plan: not JSON: {error}; write name: scheme") from error
        if not isinstance(data, dict) or not all(isinstance(v, str) for v in data.values()):
            raise UsageError("precision plan: a JSON object of tensor name: scheme was expected")
        return cls(data)

    def __len__(self) -> int:
        """Return how many tensors are quantized."""
        return len(self.schemes)

    def __iter__(self) -> Iterator[str]:
        """Yield the names of the tensors that are quantized, sorted."""
        return iter(self.schemes)

    def __hash__(self) -> int:
        """Hash what equality compares."""
        return hash(self.to_json())
