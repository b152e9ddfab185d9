"""Parts of transformers' vision-language models, recognized by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from typing_extensions import override

from llmopt.errors import UnsupportedModelError
from llmopt.frontend.tensors import Read, to_numpy
from llmopt.models import Definition, define
from llmopt.models.config import DecoderConfig
from llmopt.models.decoder_families import DECODERS

HINT: Final = "pass its vision encoder or its text model as file.py:factory"
_TEXTS: Final = ("language_model", "text_model")
_WAYS: Final = (
    "vision_tower and multi_modal_projector, with vision_feature_layer and "
    "vision_feature_select_strategy in the config; vision_model and connector"
)


@dataclass(frozen=True)
class Parts:
    """A model that inserts features of images among the embeddings of tokens.

    Args:
        vision: Vision encoder, ``pixel_values`` [I, channels, height, width] to features [I, N, E].
        nested: Whether the model takes images by row, [B, images, channels, height, width].
        text: Text model that continues from the embeddings, without its head.
        head: Linear layer from the last hidden states to logits.
        image_token: Token that is the placeholder of one feature.
    """

    vision: nn.Module
    nested: bool
    text: nn.Module
    head: nn.Module
    image_token: int


def is_vision_language(module: Any) -> bool:
    """Return whether a model inserts images among the tokens of a text that it continues."""
    config = module.config
    marked = getattr(config, "image_token_id", None) is not None
    if not marked or getattr(config, "is_encoder_decoder", False):
        return False
    return hasattr(module, "get_image_features") and module.get_output_embeddings() is not None


def parts_of(module: Any, label: str) -> Parts:
    """Return the parts of a vision-language model.

    Args:
        module: Model for which ``is_vision_language`` is true.
        label: Name of the model in messages.

    Raises:
        UnsupportedModelError: The path from images to features is unknown.
    """
    base = getattr(module, "model", module)
    text = next((getattr(base, name) for name in _TEXTS if hasattr(base, name)), None)
    names = {name for name, _ in base.named_children()}
    vision: nn.Module
    if {"vision_tower", "multi_modal_projector"} <= names and _chooses(module.config):
        vision, nested = Tower(base, module.config), False
    elif {"vision_model", "connector"} <= names:
        vision, nested = Connected(base), True
    else:
        children = ", ".join(sorted(names))
        problem = f"unknown path from images to features: it has {children}"
        raise UnsupportedModelError(label, [f"{problem} (known: {_WAYS})"], HINT)
    if text is None:
        raise UnsupportedModelError(label, [f"it has no {' or '.join(_TEXTS)}"], HINT)
    head, token = module.get_output_embeddings(), int(module.config.image_token_id)
    return Parts(vision.eval(), nested, text, head, token)


def _chooses(config: Any) -> bool:
    return hasattr(config, "vision_feature_layer") and hasattr(
        config, "vision_feature_select_strategy"
    )


class Tower(nn.Module):
    """Hidden states of one or several layers of a vision tower, projected.

    Args:
        base: Module with the tower and its projector.
        config: Config that selects the layers, and whether their first token is dropped.
    """

    def __init__(self, base: Any, config: Any) -> None:
        super().__init__()
        self.tower = base.vision_tower
        self.projector = base.multi_modal_projector
        layers = config.vision_feature_layer
        self._layers: Sequence[int] = [layers] if isinstance(layers, int) else list(layers)
        self._first = 1 if config.vision_feature_select_strategy == "default" else 0

    @override
    def forward(self, pixel_values: Tensor) -> Any:
        """Return the features [I, N, E] of images [I, channels, height, width]."""
        states = self.tower(pixel_values, output_hidden_states=True).hidden_states
        chosen = [states[layer][:, self._first :] for layer in self._layers]
        return self.projector(chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=-1))


class Connected(nn.Module):
    """Last hidden states of a vision tower, passed through its connector.

    Args:
        base: Module with the tower and the connector.
    """

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.tower = base.vision_model
        self.connector = base.connector

    @override
    def forward(self, pixel_values: Tensor) -> Any:
        """Return the features [I, N, E] of images [I, channels, height, width]."""
        return self.connector(self.tower(pixel_values).last_hidden_state)


def text_of(parts: Parts, label: str) -> tuple[Definition, DecoderConfig, Read]:
    """Return the definition of a model's text model, its config and its parameters.

    Raises:
        UnsupportedModelError: llmopt has no definition of the text model.
    """
    text: Any = parts.text
    config = {**text.config.to_dict(), "architectures": [], "tie_word_embeddings": True}
    if config["model_type"] not in DECODERS:
        problem = f"its text model {config['model_type']!r} has no definition in llmopt"
        raise UnsupportedModelError(label, [f"{problem} (known: {', '.join(DECODERS)})"], HINT)
    tensors = {f"model.{name}": tensor for name, tensor in text.state_dict().items()}
    head: Any = parts.head.weight
    if head.data_ptr() != text.get_input_embeddings().weight.data_ptr():
        config["tie_word_embeddings"] = False
        tensors["lm_head.weight"] = head
    definition = define(config, tensors.keys())
    ours = definition.config
    assert isinstance(ours, DecoderConfig)
    if ours.embedding_multiplier != 1.0:
        problem = f"its text model {config['model_type']!r} scales the embeddings of tokens"
        unknown = "and it is unknown whether features of images are scaled"
        raise UnsupportedModelError(label, [f"{problem}, {unknown}"], HINT)
    return definition, ours, _read(definition, tensors)


def _read(definition: Definition, tensors: Mapping[str, Tensor]) -> Read:
    recipes = definition.recipes()

    def read(name: str) -> Any:
        return recipes[name].apply(lambda source: to_numpy(tensors[source]))

    return read
