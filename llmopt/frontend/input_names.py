"""Common names of inputs, by role."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from llmopt.interface.signature import Role

NAMES: Final[Mapping[Role, frozenset[str]]] = {
    Role.MASK: frozenset({"attention_mask", "mask", "padding_mask", "attn_mask", "input_mask"}),
    Role.POSITIONS: frozenset({"position_ids", "positions", "pos", "position"}),
    Role.TOKEN_TYPES: frozenset({"token_type_ids", "token_types", "segment_ids", "token_type"}),
    Role.TOKENS: frozenset(
        {
            "input_ids",
            "tokens",
            "token_ids",
            "idx",
            "ids",
            "x",
            "input",
            "inputs",
            "src",
            "tokens_ids",
        }
    ),
}
"""Names of inputs by role, in lower case."""


def role_of(name: str) -> Role | None:
    """Return the role of an input by its name, None for any other name.

    >>> role_of("token_type_ids")
    <Role.TOKEN_TYPES: 'token_types'>
    """
    return next((role for role, names in NAMES.items() if name.lower() in names), None)
