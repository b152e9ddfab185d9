"""A checkpoint's model: its config, its module, and how its parameters are made."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from llmopt.errors import UnsupportedModelError
from llmopt.models.config import DecoderConfig, EncoderConfig, LayerConfig
from llmopt.models.decoder_families import DECODERS
from llmopt.models.encoder_families import ENCODERS
from llmopt.models.family import Family, Fields, Weight, need, rows
from llmopt.models.recipe import Recipe
from llmopt.models.rope_config import refused

if TYPE_CHECKING:
    import torch

FAMILIES: Final[Mapping[str, Family]] = {**DECODERS, **ENCODERS}

# tensors that carry nothing the hidden states or logits depend on: what a module computes
# itself, and heads of the pre-training that every encoder comes from
_UNUSED: Final = re.compile(
    r"(rotary_emb\.inv_freq|attn\.masked_bias|attn\.bias|embeddings\.position_ids)$"
    r"|(^|\.)(pooler|cls|lm_head|vocab_transform|vocab_layer_norm|vocab_projector)\."
)


@dataclass(frozen=True)
class Definition:
    """What ``define`` found.

    Args:
        config: The whole model.
        family: The ``model_type`` it was found under.
        sources: How each parameter of the full module is made.
    """

    config: DecoderConfig | EncoderConfig
    family: str
    sources: Mapping[str, Recipe] = field(repr=False)

    def module(self, layers: Sequence[int] | None = None, device: str = "meta") -> torch.nn.Module:
        """Return the module in eval mode, its parameters not yet filled.

        Args:
            layers: The indices of the layers to make, in order; all where not given. Parameters
                keep them in their names: ``layers.5.attention.q_proj.weight``.
            device: Where parameters are. Computed buffers are never on the meta device.
        """
        return build(self.config, layers, device)

    def recipes(self) -> Mapping[str, Recipe]:
        """Return how each parameter of the full module is made of the checkpoint's tensors."""
        return self.sources

    def expected(self) -> Mapping[str, int]:
        """Return how many attentions, norms, rotaries and activations a forward pass has."""
        return self.config.expected()


def define(
    config: Mapping[str, Any],
    names: Collection[str],
    *,
    equal: Callable[[str, str], bool] | None = None,
) -> Definition:
    """Return the definition of a checkpoint.

    Args:
        config: Its config.json. ``pooling`` (``mean`` ``cls`` ``max`` ``mean_sqrt_len``) and
            ``normalize`` may be added for a sentence encoder.
        names: The names of its tensors.
        equal: Whether two of them hold the same numbers. Asked only where the config ties head
            and embedding and both are there; without it they are kept apart.

    Raises:
        UnsupportedModelError: The architecture, its head or a setting is not known here, tensors
            are missing, or there are some that would be left out.
    """
    names = frozenset(names)
    family = _family(config)
    parsed = family.parse(config)
    prefix = _prefix(family.weights["embed_tokens"].path, names)
    if isinstance(parsed, DecoderConfig):
        parsed = _untied(parsed, prefix + family.weights["embed_tokens"].path, names, equal)
    sources = {
        name: _recipe(parsed, family.weights, prefix, name, names)
        for name, _ in build(parsed).named_parameters()
    }
    used = {source for recipe in sources.values() for source in recipe.sources}
    _require(config, used - names)
    _refuse_rest(config, names - used)
    return Definition(parsed, str(config["model_type"]), sources)


def build(
    config: DecoderConfig | EncoderConfig,
    layers: Sequence[int] | None = None,
    device: str = "meta",
) -> torch.nn.Module:
    """Return the module of a config, as ``Definition.module`` does."""
    import torch

    from llmopt.models.decoder import Decoder
    from llmopt.models.encoder import Encoder

    chosen = range(len(config.layers)) if layers is None else layers
    with torch.device("meta"):
        module = (
            Decoder(config, chosen)
            if isinstance(config, DecoderConfig)
            else Encoder(config, chosen)
        )
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            empty = torch.empty_like(parameter, device=device)
            setattr(part, name, torch.nn.Parameter(empty, requires_grad=False))
        if device != "meta":
            for name, buffer in part.named_buffers(recurse=False):
                setattr(part, name, buffer.to(device))
    return module.eval()


def _family(config: Fields) -> Family:
    kind = str(need(config, "model_type"))
    classes = [str(each) for each in config.get("architectures") or []]
    if kind not in FAMILIES:
        raise UnsupportedModelError(
            f"model type {kind!r}" + (f" ({', '.join(classes)})" if classes else ""),
            [f"not an architecture llmopt defines (known: {', '.join(sorted(FAMILIES))})"],
            "pip install transformers to use its own definition, "
            "or pass the module itself as file.py:factory",
        )
    family = FAMILIES[kind]
    for name in classes:
        if not name.endswith(tuple(family.classes)):
            raise refused(
                config,
                f"{name}: its head is not defined here (only {', '.join(family.classes)} are), "
                "and hidden states alone would silently drop it",
            )
    if config.get("quantization_config"):
        method = dict(config["quantization_config"]).get("quant_method")
        raise refused(config, f"weights already quantized with {method!r}: give the original")
    return family


def _prefix(path: str, names: Collection[str]) -> str:
    """Return what stands before every name: ``""``, ``"model."``, ``"bert."``."""
    ending = f"{path}.weight"
    found = [name for name in names if name == ending or name.endswith(f".{ending}")]
    return min(found, key=len, default="").removesuffix(ending)


def _untied(
    config: DecoderConfig,
    embedding: str,
    names: Collection[str],
    equal: Callable[[str, str], bool] | None,
) -> DecoderConfig:
    """Return the config with the head apart from the embedding if the checkpoint has another."""
    if not config.tied or "lm_head.weight" not in names:
        return config
    same = equal is not None and equal(f"{embedding}.weight", "lm_head.weight")
    return replace(config, tied=same)


def _recipe(
    config: DecoderConfig | EncoderConfig,
    weights: Mapping[str, Weight],
    prefix: str,
    parameter: str,
    names: Collection[str],
) -> Recipe:
    """Return how one parameter of the module is made."""
    module, _, leaf = parameter.rpartition(".")
    layer = re.match(r"layers\.(\d+)\.", module)
    index = layer[1] if layer else ""
    weight = weights[module.replace(f".{index}.", ".{}.", 1) if layer else module]
    path = ("" if weight.rooted else prefix) + weight.path.format(index)
    kind = config.layers[int(index)] if layer else None
    cut = rows(kind, weight.part) if isinstance(kind, LayerConfig) else None
    op = weight.op if leaf == "weight" else "copy"
    return Recipe((_spelled(f"{path}.{leaf}", names),), op, cut)


def _spelled(name: str, names: Collection[str]) -> str:
    """Return the name, or what the checkpoints of BERT's first years call it."""
    old = re.sub(r"LayerNorm\.weight$", "LayerNorm.gamma", name)
    old = re.sub(r"LayerNorm\.bias$", "LayerNorm.beta", old)
    return old if name not in names and old in names else name


def _require(config: Fields, missing: Iterable[str]) -> None:
    if absent := sorted(missing):
        raise UnsupportedModelError(
            f"model type {config['model_type']!r}",
            [f"the checkpoint lacks {len(absent)} tensors: {_few(absent)}"],
            "download it again, or check that config.json belongs to it",
        )


def _refuse_rest(config: Fields, rest: Iterable[str]) -> None:
    if extra := sorted(name for name in rest if not _UNUSED.search(name)):
        raise UnsupportedModelError(
            f"model type {config['model_type']!r}",
            [f"{len(extra)} tensors of the checkpoint would be left out: {_few(extra)}"],
            "pass the module that uses them as file.py:factory, or check config.json",
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
