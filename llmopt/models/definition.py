"""A checkpoint's definition: its config, its module and the recipes of its parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

from llmopt.errors import UnsupportedModelError
from llmopt.models.config import DecoderConfig, EncoderDecoderConfig, LayerConfig
from llmopt.models.decoder_families import DECODERS
from llmopt.models.encoder_decoder_families import ENCODER_DECODERS
from llmopt.models.encoder_families import ENCODERS
from llmopt.models.family import Config, Family, Fields, Weight, need, rows
from llmopt.models.recipe import ParameterRecipe
from llmopt.models.rope_config import refused

if TYPE_CHECKING:
    import torch

FAMILIES: Final[Mapping[str, Family]] = {**DECODERS, **ENCODERS, **ENCODER_DECODERS}

# tensors that neither hidden states nor logits depend on: buffers that a module computes
# itself, pre-training heads of encoders, and further names of a shared embedding
_UNUSED: Final = re.compile(
    r"(rotary_emb\.inv_freq|attn\.masked_bias|attn\.bias|embeddings\.position_ids)$"
    r"|(^|\.)(pooler|cls|lm_head|proj_out|vocab_transform|vocab_layer_norm|vocab_projector)\."
    r"|(^|\.)(encoder|decoder)\.(embed_tokens|embed_positions)\.weight$"
    r"|EncDecAttention\.relative_attention_bias\.weight$"
)


_WithLogits = TypeVar("_WithLogits", DecoderConfig, EncoderDecoderConfig)


@dataclass(frozen=True)
class Definition:
    """A model from its config and its checkpoint's tensors.

    Args:
        config: Config of the model.
        family: ``model_type`` of the checkpoint.
        sources: Recipe of each parameter of the full module.
    """

    config: Config
    family: str
    sources: Mapping[str, ParameterRecipe] = field(repr=False)

    def module(self, layers: Sequence[int] | None = None, device: str = "meta") -> torch.nn.Module:
        """Return the module in eval mode, its parameters not yet filled.

        Args:
            layers: Indices of the layers to create, in order; all by default. Parameters keep
                them in their names: ``layers.5.attention.q_proj.weight``.
            device: Device of the parameters. Computed buffers are never on the meta device.
        """
        return build(self.config, layers, device)

    def recipes(self) -> Mapping[str, ParameterRecipe]:
        """Return the recipe of each parameter of the full module."""
        return self.sources

    def expected(self) -> Mapping[str, int]:
        """Return the number of attentions, norms, rotary embeddings and activations."""
        return self.config.expected()


def define(
    config: Mapping[str, Any],
    names: Collection[str],
    *,
    equal: Callable[[str, str], bool] | None = None,
) -> Definition:
    """Return the definition of a checkpoint.

    Args:
        config: Contents of config.json. For a sentence encoder, ``pooling`` (``mean`` ``cls``
            ``max`` ``mean_sqrt_len``) and ``normalize`` may be added.
        names: Names of the checkpoint's tensors.
        equal: Function that compares two tensors by value; called only where the config ties
            head and embedding and both exist. Without it they are kept apart.

    Raises:
        UnsupportedModelError: The architecture, its head or a setting is unknown, tensors are
            missing, or some would be unused.
    """
    names = frozenset(names)
    family = _family(config)
    parsed = family.parse(config)
    table = family.weights["embed_tokens"]
    prefix = _prefix(table, names)
    embedding = _named(table, prefix, names)
    if isinstance(parsed, DecoderConfig):
        parsed = _untied(parsed, embedding, names, equal)
    elif isinstance(parsed, EncoderDecoderConfig):
        parsed = _with_tables(_untied(parsed, embedding, names, equal), names)
    sources = {
        name: _recipe(parsed, family.weights, prefix, name, names)
        for name, _ in build(parsed).named_parameters()
    }
    used = {source for recipe in sources.values() for source in recipe.sources}
    _require(config, used - names)
    _refuse_rest(config, names - used)
    return Definition(parsed, str(config["model_type"]), sources)


def build(
    config: Config,
    layers: Sequence[int] | None = None,
    device: str = "meta",
) -> torch.nn.Module:
    """Return the module of a config, as ``Definition.module`` does."""
    import torch

    from llmopt.models.decoder import Decoder
    from llmopt.models.encoder import Encoder
    from llmopt.models.encoder_decoder import EncoderDecoder

    module: torch.nn.Module
    with torch.device("meta"):
        match config:
            case DecoderConfig():
                module = Decoder(config, _chosen(config.layers, layers))
            case EncoderDecoderConfig():
                longer = max(config.encoder.layers, config.decoder.layers, key=len)
                module = EncoderDecoder(config, _chosen(longer, layers))
            case _:
                module = Encoder(config, _chosen(config.layers, layers))
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            empty = torch.empty_like(parameter, device=device)
            setattr(part, name, torch.nn.Parameter(empty, requires_grad=False))
        if device != "meta":
            for name, buffer in part.named_buffers(recurse=False):
                setattr(part, name, buffer.to(device))
    return module.eval()


def _chosen(every: Sequence[object], layers: Sequence[int] | None) -> Sequence[int]:
    return range(len(every)) if layers is None else layers


def _family(config: Fields) -> Family:
    kind = str(need(config, "model_type"))
    classes = [str(each) for each in config.get("architectures") or []]
    if kind not in FAMILIES:
        raise UnsupportedModelError(
            f"model type {kind!r}" + (f" ({', '.join(classes)})" if classes else ""),
            [f"llmopt has no definition of it (known: {', '.join(sorted(FAMILIES))})"],
            "pip install transformers to use its own definition, "
            "or pass the module itself as file.py:factory",
        )
    family = FAMILIES[kind]
    for name in classes:
        if not name.endswith(tuple(family.classes)):
            raise refused(
                config,
                f"{name}: its head has no definition here (known: {', '.join(family.classes)}), "
                "and hidden states alone would silently drop it",
            )
    if config.get("quantization_config"):
        method = dict(config["quantization_config"]).get("quant_method")
        raise refused(config, f"weights already quantized with {method!r}: compile the original")
    return family


def _prefix(weight: Weight, names: Collection[str]) -> str:
    """Return the prefix of the tensors' names: ``""``, ``"model."``, ``"bert."``."""
    for path in filter(None, (weight.path, weight.instead)):
        ending = f"{path}.weight"
        matches = [name for name in names if name == ending or name.endswith(f".{ending}")]
        if matches:
            return min(matches, key=len).removesuffix(ending)
    return ""


def _named(weight: Weight, prefix: str, names: Collection[str], layer: str = "") -> str:
    """Return the path of a module's parameters, or the alternative if that has none."""
    before = "" if weight.rooted else prefix
    first, second = (before + path.format(layer) for path in (weight.path, weight.instead))
    if not weight.instead or f"{first}.weight" in names or f"{second}.weight" not in names:
        return first
    return second


def _untied(
    config: _WithLogits,
    embedding: str,
    names: Collection[str],
    equal: Callable[[str, str], bool] | None,
) -> _WithLogits:
    """Return the config with an untied head if the checkpoint has one of its own."""
    if not config.tied or "lm_head.weight" not in names:
        return config
    same = equal is not None and equal(f"{embedding}.weight", "lm_head.weight")
    return replace(config, tied=same)


def _with_tables(config: EncoderDecoderConfig, names: Collection[str]) -> EncoderDecoderConfig:
    """Return the config with position embeddings read where the checkpoint has them."""
    stored = [
        side
        for side in ("encoder", "decoder")
        if any(name.endswith(f"{side}.embed_positions.weight") for name in names)
    ]
    read = {side: replace(getattr(config, side), sinusoidal=False) for side in stored}
    return replace(config, **read)


def _recipe(
    config: Config,
    weights: Mapping[str, Weight],
    prefix: str,
    parameter: str,
    names: Collection[str],
) -> ParameterRecipe:
    """Return the recipe of one parameter of the module."""
    if parameter in weights:
        entry = weights[parameter]
        return ParameterRecipe((("" if entry.rooted else prefix) + entry.path,), entry.op)
    module, _, leaf = parameter.rpartition(".")
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", module)
    index = layer[1] if layer else ""
    weight = weights[module.replace(f"layers.{index}.", "layers.{}.", 1) if layer else module]
    path = _named(weight, prefix, names, index)
    cut = None
    if weight.part and not isinstance(config, EncoderDecoderConfig):
        kind = config.layers[int(index)]
        cut = rows(kind, weight.part) if isinstance(kind, LayerConfig) else None
    op = weight.op if leaf == "weight" else "copy"
    return ParameterRecipe((_spelled(f"{path}.{leaf}", names),), op, cut)


def _spelled(name: str, names: Collection[str]) -> str:
    """Return the name, or its spelling in early BERT checkpoints."""
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
            [f"{len(extra)} tensors of the checkpoint would be unused: {_few(extra)}"],
            "pass the module that uses them as file.py:factory, or check config.json",
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
