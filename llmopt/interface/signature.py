"""What each input and output of a model means."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from llmopt.errors import LlmoptError, UsageError
from llmopt.interface.arrays import Arrays


class Role(enum.StrEnum):
    """What a graph input or output means. The names are those of the artifact's manifest."""

    TOKENS = "tokens"  # input_ids [B, S]
    MASK = "mask"  # attention_mask [B, T]: 1 where a token is, 0 where padding is
    POSITIONS = "positions"  # position_ids [B, S]
    TOKEN_TYPES = "token_types"  # token_type_ids [B, S]  # noqa: S105
    PAST_KEY = "past_key"  # past_key_values.{layer}.key [B, G, P, D]
    PAST_VALUE = "past_value"
    PRESENT_KEY = "present_key"  # present.{layer}.key [B, G, T, D]
    PRESENT_VALUE = "present_value"
    FEATURES = "features"  # input_features [B, bands, 2 * C]: sounds, where no tokens are read
    PIXELS = "pixels"  # pixel_values [I, channels, height, width]
    IMAGE_FEATURES = "image_features"  # image_features [I, N, E], N for each image
    EMBEDS = "embeds"  # inputs_embeds [B, S, E], where a decoder takes no tokens
    SOURCE_MASK = "source_mask"  # encoder_attention_mask [B, C]: of what was read
    SOURCE_KEY = "source_key"  # past_key_values.{layer}.encoder.key [B, H, C, D]
    SOURCE_VALUE = "source_value"
    WRITE_INDICES = "write_indices"  # [B]: where new tokens go in a cache of fixed capacity
    LOGITS_TO_KEEP = "logits_to_keep"  # an overridable initializer: 1 by default, 0 for all
    LOGITS = "logits"  # [B, K, V]
    HIDDEN = "hidden"  # last_hidden_state [B, S, E]
    EMBEDDING = "embedding"  # sentence_embedding [B, E]
    OTHER = "other"


FORWARDED: Final[Mapping[Role, Role]] = {
    Role.SOURCE_KEY: Role.SOURCE_KEY,
    Role.SOURCE_VALUE: Role.SOURCE_VALUE,
    Role.SOURCE_MASK: Role.MASK,
    Role.IMAGE_FEATURES: Role.IMAGE_FEATURES,
    Role.EMBEDS: Role.EMBEDS,
}
"""Inputs that another component produces: their role here, and the role they have there."""


_PRESENT: Final = {Role.PAST_KEY: Role.PRESENT_KEY, Role.PAST_VALUE: Role.PRESENT_VALUE}


@dataclass(frozen=True)
class Port:
    """One input or output of the model.

    Args:
        name: The name in the model file.
        role: The meaning.
        dtype: Element type as numpy spells it.
        shape: A number for a fixed dimension, a letter of the glossary for a free one.
        layer: The layer whose cache it is, for the four cache roles.
    """

    name: str
    role: Role
    dtype: str
    shape: tuple[str | int, ...]
    layer: int | None = None

    def cache_shape(self, batch: int, length: int) -> tuple[int, ...]:
        """Return the shape [B, G, length, D] of a cache input; a fixed dimension is left as it is.

        Raises:
            UsageError: Heads or width are free.
        """
        free = (batch, None, length, None)
        shape = [
            dim if isinstance(dim, int) else size
            for dim, size in zip(self.shape, free, strict=True)
        ]
        sizes = tuple(size for size in shape if size is not None)
        if len(sizes) < len(shape):
            raise UsageError(f"{self.name}: the signature leaves heads or width of the cache open")
        return sizes


@dataclass(frozen=True)
class Signature:
    """Every input and output, in the model's order."""

    inputs: tuple[Port, ...] = ()
    outputs: tuple[Port, ...] = ()

    def find(self, role: Role) -> Port | None:
        """Return the first input, else output, that has ``role``."""
        return next((p for p in (*self.inputs, *self.outputs) if p.role == role), None)

    def need(self, role: Role) -> Port:
        """Return the first input, else output, that has ``role``.

        Raises:
            LlmoptError: There is none.
        """
        port = self.find(role)
        if port is None:
            raise LlmoptError(f"the model has no '{role}' input or output")
        return port

    @property
    def pasts(self) -> tuple[Port, ...]:
        """The cache inputs, in the model's order: keys and values of past tokens."""
        return tuple(p for p in self.inputs if p.role in (Role.PAST_KEY, Role.PAST_VALUE))

    @property
    def presents(self) -> tuple[Port, ...]:
        """The cache outputs, each where ``pasts`` has the input that it is fed back to."""
        by_meaning = {(port.role, port.layer): port for port in self.outputs}
        return tuple(by_meaning[_PRESENT[past.role], past.layer] for past in self.pasts)

    def cache_pairs(self) -> list[tuple[Port, Port]]:
        """Return the input and the output of every cache, in the order of the inputs."""
        return list(zip(self.pasts, self.presents, strict=True))

    @property
    def has_cache(self) -> bool:
        """Whether keys and values of past tokens go in and come out."""
        return self.find(Role.PAST_KEY) is not None

    def empty_caches(self, batch: int) -> Arrays:
        """Return every cache input of no past tokens, [B, G, 0, D], by name."""
        return {p.name: np.zeros(p.cache_shape(batch, 0), p.dtype) for p in self.pasts}


def forwarded(first: Signature, second: Signature) -> dict[str, str]:
    """Return which input of ``second`` is which output, or input, of ``first``: by name.

    Encoder keys and values are forwarded layer by layer, and so is the encoder's mask; image
    features and embeddings as they are.
    """
    produced = {(port.role, port.layer): port.name for port in (*first.inputs, *first.outputs)}
    return {
        port.name: produced[FORWARDED[port.role], port.layer]
        for port in second.inputs
        if port.role in FORWARDED
    }
