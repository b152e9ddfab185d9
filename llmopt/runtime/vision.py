"""The decoder of a vision-language artifact, with the vision and embedding models before it.

Two models run before the decoder: ``vision`` makes features of images, ``embedding`` looks tokens
up and puts features where image tokens stand. Together the three are a session that takes tokens,
as any decoder does, and images beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from typing_extensions import override

from llmopt.errors import UsageError
from llmopt.interface.arrays import Array
from llmopt.interface.signature import FORWARDED, Port, Role, Signature
from llmopt.interface.stepping import Step, Stepper
from llmopt.runtime.session import Session, open_session

VISION: Final = "vision"
EMBEDDING: Final = "embedding"
FEATURES: Final = "image_features"
"""What features are called among the inputs that are the same in every step."""

Prompts = Sequence[Sequence[int]]


def with_vision(folder: Path, decoder: Session) -> Session:
    """Return a decoder with the models that run before it; itself, if none of them sees.

    Args:
        folder: The artifact.
        decoder: Session of the main model.

    Raises:
        ArtifactError: A file cannot be read.
        BackendUnavailableError: What it needs is not installed here.
    """
    parts = [decoder.manifest.component(name) for name in (VISION, EMBEDDING)]
    vision, embedding = (
        None if part is None else open_session(folder, part, decoder.threads) for part in parts
    )
    if vision is None or embedding is None:
        return decoder
    return VisionSession(vision, embedding, decoder)


class VisionSession(Session):
    """Three models that run as one.

    Args:
        vision: Makes features of images.
        embedding: Makes embeddings of tokens and features.
        decoder: Goes on from there.
    """

    def __init__(self, vision: Session, embedding: Session, decoder: Session) -> None:
        every = (vision, embedding, decoder)
        inputs = [p for each in every for p in each.inputs.values() if p.role not in FORWARDED]
        signature = Signature(tuple(inputs), decoder.signature.outputs)
        super().__init__(replace(decoder.manifest, signature=signature), decoder.threads)
        self._vision = vision
        self._embedding = embedding
        self._decoder = decoder
        facts = decoder.manifest.model
        self.token = -1 if facts.image_token is None else facts.image_token  # one that none is
        self.length = facts.image_length

    @override
    def run(
        self, feeds: Mapping[str, Array], names: Sequence[str] | None = None
    ) -> dict[str, Array]:
        pixels = feeds.get(self.need(Role.PIXELS).name)
        features = None if pixels is None else self._features(pixels)
        embeds = self.embeds(feeds[self.need(Role.TOKENS).name], features)
        rest = {name: array for name, array in feeds.items() if name in self._decoder.inputs}
        return self._decoder.run({**rest, self._decoder.need(Role.EMBEDS).name: embeds}, names)

    @override
    def stepper(self, batch: int, capacity: int) -> Stepper:
        return _VisionStepper(self, self._decoder.stepper(batch, capacity))

    def features(self, images: Any) -> Array:
        """Return the features [I, N, E] of images.

        Args:
            images: [I, channels, height, width], one of these, or [B, images, channels, height,
                width]; any float type.

        Raises:
            UsageError: They are of another shape.
        """
        port = self.need(Role.PIXELS)
        array = np.asarray(images, port.dtype)
        size = tuple(n for n in port.shape[1:] if isinstance(n, int))
        if array.shape[-len(size) :] != size or array.ndim > len(size) + 2 or not array.size:
            wanted = ", ".join(map(str, size))
            raise UsageError(f"images should be [I, {wanted}], not {list(np.shape(images))}")
        return self._features(np.ascontiguousarray(array.reshape(-1, *size)))

    def embeds(self, tokens: Array, features: Array | None) -> Array:
        """Return the embeddings [B, S, E] of tokens, features of images among them if given."""
        port = self._embedding.need(Role.IMAGE_FEATURES)
        if features is None:
            features = np.zeros(_none_of(port), port.dtype)
        taken = self._embedding.need(Role.TOKENS)
        given = {taken.name: np.ascontiguousarray(tokens, taken.dtype), port.name: features}
        name = self._embedding.need(Role.EMBEDS).name
        return self._embedding.run(given, [name])[name]

    def _features(self, pixels: Array) -> Array:
        name = self._vision.need(Role.IMAGE_FEATURES).name
        return self._vision.run({self.need(Role.PIXELS).name: pixels}, [name])[name]


class _VisionStepper:
    """A decoder's steps, of which the first may hold images.

    An image token that a later step is given is a token like any other: what a model writes stands
    for no image.

    Args:
        session: Session that makes embeddings.
        decoder: Stepper of the decoder.
    """

    def __init__(self, session: VisionSession, decoder: Stepper) -> None:
        self._session = session
        self._decoder = decoder
        self._begun = False

    def run(self, step: Step) -> Array:
        """Return logits [B, K, V]; the array is overwritten by the next run."""
        features = None if self._begun else step.steady.get(FEATURES)
        self._begun = True
        embeds = self._session.embeds(step.tokens, features)
        return self._decoder.run(replace(step, embeds=embeds, steady={}))


def _none_of(port: Port) -> list[int]:
    return [n if isinstance(n, int) else 0 for n in port.shape]


def insert_image_tokens(
    session: Session, prompts: Prompts, images: Any
) -> tuple[Prompts, dict[str, Array]]:
    """Return prompts with as many image tokens as images have features, and those.

    Args:
        session: The model.
        prompts: Tokens, one list a row. An image token may stand for an image, or one for each
            of its features, as the checkpoint's own processor writes them.
        images: Images as `VisionSession.features` takes them, in the order of their tokens, row
            after row; None for no image.

    Raises:
        UsageError: The model sees no images, or the prompts have other image tokens than there
            are images.
    """
    if not isinstance(session, VisionSession):
        if images is not None:
            raise UsageError(
                f"images need a vision-language artifact; this one is for {session.manifest.task!r}"
            )
        return prompts, {}
    stand = sum(list(row).count(session.token) for row in prompts)
    if images is None:
        if stand:
            raise UsageError(
                f"the prompt has {stand} image tokens, but images is empty; pass images="
            )
        return prompts, {}
    features = session.features(images)
    count, length = len(features), session.length
    if stand == count * length:
        return prompts, {FEATURES: features}
    if stand != count:
        raise UsageError(
            f"{count} images, but {stand} image tokens (number {session.token}): write "
            f"one for each image, or {length}"
        )
    return [_widened(row, session.token, length) for row in prompts], {FEATURES: features}


def image_features_of(session: Session, tokens: Array, images: Any) -> dict[str, Array]:
    """Return the features of images whose tokens [B, S] are all there already.

    Raises:
        UsageError: As `insert_image_tokens`, or an image has one token alone.
    """
    rows, given = insert_image_tokens(session, tokens.tolist(), images)
    if any(len(row) > tokens.shape[1] for row in rows):
        length = session.manifest.model.image_length
        raise UsageError(f"an image has one token here; write {length} for each")
    return given


def _widened(row: Sequence[int], token: int, length: int) -> list[int]:
    """Return tokens, each image token as often as an image has features.

    >>> _widened([5, 9, 6], 9, 3)
    [5, 9, 9, 9, 6]
    """
    return [each for known in row for each in [known] * (length if known == token else 1)]
