"""A checkpoint's model: its config, its module, and how its parameters are made."""

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

# tensors that carry nothing the hidden states or logits depend on: what a module computes
# itself, heads of the pre-training that every encoder comes from, and further names of one
# embedding
_UNUSED: Final = re.compile(
    r"(rotary_emb\.inv_freq|attn\.masked_bias|attn\.bias|embeddings\.position_ids)$"
    r"|(^|\.)(pooler|cls|lm_head|proj_out|vocab_transform|vocab_layer_norm|vocab_projector)\."
    r"|(^|\.)(encoder|decoder)\.(embed_tokens|embed_positions)\.weight$"
    r"|EncDecAttention\.relative_attention_bias\.weight$"
)


_Writer = TypeVar("_Writer", DecoderConfig, EncoderDecoderConfig)


@dataclass(frozen=True)
class Definition:
    """What ``define`` found.

    Args:
        config: The whole model.
        family: The ``model_type`` it was found under.
        sources: How each parameter of the full module is made.
    """

    config: Config
    family: str
    sources: Mapping[str, ParameterRecipe] = field(repr=False)

    def module(self, layers: Sequence[int] | None = None, device: str = "meta") -> torch.nn.Module:
        """Return the module in eval mode, its parameters not yet filled.

        Args:
            layers: The indices of the layers to make, in order; all where not given. Parameters
                keep them in their names: ``layers.5.attention.q_proj.weight``.
            device: Where parameters are. Computed buffers are never on the meta device.
        """
        return build(self.config, layers, device)

    def recipes(self) -> Mapping[str, ParameterRecipe]:
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


def _prefix(weight: Weight, names: Collection[str]) -> str:
    """Return what stands before every name: ``""``, ``"model."``, ``"bert."``."""
    for path in filter(None, (weight.path, weight.instead)):
        ending = f"{path}.weight"
        found = [name for name in names if name == ending or name.endswith(f".{ending}")]
        if found:
            return min(found, key=len).removesuffix(ending)
    return ""


def _named(weight: Weight, prefix: str, names: Collection[str], layer: str = "") -> str:
    """Return where a module's parameters are: at its path, or at the other if nothing is there."""
    before = "" if weight.rooted else prefix
    first, second = (before + path.format(layer) for path in (weight.path, weight.instead))
    if not weight.instead or f"{first}.weight" in names or f"{second}.weight" not in names:
        return first
    return second


def _untied(
    config: _Writer,
    embedding: str,
    names: Collection[str],
    equal: Callable[[str, str], bool] | None,
) -> _Writer:
    """Return the config with the head apart from the embedding if the checkpoint has another."""
    if not config.tied or "lm_head.weight" not in names:
        return config
    same = equal is not None and equal(f"{embedding}.weight", "lm_head.weight")
    return replace(config, tied=same)


def _with_tables(config: EncoderDecoderConfig, names: Collection[str]) -> EncoderDecoderConfig:
    """Return the config with tables of positions read where the checkpoint has them."""
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
    """Return how one parameter of the module is made."""
    if parameter in weights:
        whole = weights[parameter]
        return ParameterRecipe((("" if whole.rooted else prefix) + whole.path,), whole.op)
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
