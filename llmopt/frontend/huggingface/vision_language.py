"""A vision-language model becomes a Program of three components.

``vision`` computes the features of each image, ``embedding`` looks tokens up and replaces image
tokens by features, and ``decoder`` continues from there with a KV cache. The vision encoder is
traced from transformers' module; the text model is a definition. Before anything is compiled, both
are run to check that together they compute what transformers computes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor, nn

from llmopt.errors import UnsupportedModelError, UsageError
from llmopt.frontend.base import Source, SourceOptions
from llmopt.frontend.census import KINDS, outermost
from llmopt.frontend.definitions.assemble import Assembly
from llmopt.frontend.definitions.definition import decoder_facts, trace_decoder
from llmopt.frontend.definitions.parts import Dims, trace_part
from llmopt.frontend.dims import name_dims
from llmopt.frontend.huggingface.checkpoint import digest
from llmopt.frontend.huggingface.files import shipped_files
from llmopt.frontend.huggingface.loading import Loaded, one_line, pixels, special_tokens
from llmopt.frontend.huggingface.vision_parts import HINT, Parts, parts_of, text_of
from llmopt.frontend.reference import ModuleReference, StreamedReference, Transform
from llmopt.frontend.tensors import Read
from llmopt.frontend.torch.trace import Traced, trace_module
from llmopt.interface.arrays import Arrays
from llmopt.interface.facts import ModelFacts, SourceRecord
from llmopt.interface.signature import Port, Role, Signature
from llmopt.ir import graph as g
from llmopt.ir.components import PIXELS
from llmopt.ir.program import Facts, Program
from llmopt.ir.weights import Leaf
from llmopt.models import Definition
from llmopt.models.config import DecoderConfig
from llmopt.models.decoder import Decoder
from llmopt.models.images import with_images

VISION, EMBEDDING = "vision", "embedding"
FEATURES: Final = "image_features"
_SAME: Final = 1e-3  # relative: float32 sums in another order, of models of any depth
_IMAGES: Final = 2


def open_vision_language(loaded: Loaded, options: SourceOptions) -> Source:
    """Return the source of a vision-language model.

    Raises:
        UnsupportedModelError: The model's structure is unknown, its text model has no definition,
            or the three components compute something else.
        UsageError: The task is not ``"generate"``.
    """
    if options.task not in (None, "generate"):
        raise UsageError(f"--task {options.task}: this checkpoint is for 'generate'; omit --task")
    label = str(loaded.config.get("model_type"))
    parts = parts_of(loaded.module, label)
    definition, config, read = text_of(parts, label)
    images = _random_like(pixels(loaded.module.config, label, _IMAGES))
    length = _features(parts, images, config, label)
    reference = _reference(parts, definition, config, read, length)
    _prove(loaded, parts, reference, images, length)
    model, notes = _facts(loaded, definition, config, options), list(loaded.notes)
    model = dataclasses.replace(model, image_token=parts.image_token, image_length=length)
    files, more = shipped_files(loaded.path, loaded.generation, model)
    traced = _traced(parts, images)
    record = SourceRecord(loaded.path.resolve().name, "huggingface", digest(loaded.path))
    expected = _expected(definition, parts.vision, traced.model.graph)
    facts = Facts("generate", model, record, expected, files)
    components = {
        VISION: _vision(traced, facts),
        EMBEDDING: _embedding(definition, config, read, facts),
        "decoder": trace_decoder(definition, config, read, facts, embeds=True),
    }
    program = Program.joined(components, facts)
    return Source(record.name, program, reference, (*notes, *more))


def _random_like(like: Tensor) -> Tensor:
    """Return random images: a model may skip black ones."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(0))


def _features(parts: Parts, images: Tensor, config: DecoderConfig, label: str) -> int:
    """Return the number of features of an image.

    Raises:
        UnsupportedModelError: The features need more than pixels, or differ in width from the
            embeddings.
    """
    try:
        with torch.no_grad():
            features = parts.vision(images)
    except Exception as error:  # transformers raises anything
        problem = f"its vision encoder does not run on pixels alone: {type(error).__name__}"
        raise UnsupportedModelError(label, [f"{problem}: {one_line(error)}"], HINT) from error
    if features.dim() != 3 or (len(features), features.shape[2]) != (len(images), config.hidden):
        problem = f"features of {len(images)} images have shape {list(features.shape)}"
        expected = f"[{len(images)}, N, {config.hidden}]"
        raise UnsupportedModelError(label, [f"{problem}, not {expected}"], HINT)
    return int(features.shape[1])


def _facts(
    loaded: Loaded, definition: Definition, config: DecoderConfig, options: SourceOptions
) -> ModelFacts:
    """Return the facts that a runner needs, from the text model's config before the model's.

    The model's is less reliable: SmolVLM's names a padding token beyond the vocabulary.
    """
    text = loaded.module.config.get_text_config().to_dict()
    known = {name: value for name, value in text.items() if value is not None}
    special = special_tokens(dataclasses.replace(loaded, config={**loaded.config, **known}))
    if (special["pad"] or 0) >= config.vocabulary:
        special["pad"] = None
    limits = filter(None, (config.max_length, options.max_length))
    facts = decoder_facts(definition, config, **special, max_length=min(limits))
    return dataclasses.replace(facts, family=str(loaded.config.get("model_type")))


def _reference(
    parts: Parts, definition: Definition, config: DecoderConfig, read: Read, length: int
) -> VisionLanguageReference:
    def merge(embeds: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return with_images(embeds, batch["input_ids"], batch[FEATURES], parts.image_token)

    vision = ModuleReference(parts.vision, [PIXELS], [FEATURES], positional=1)
    text = StreamedReference(definition, read, merge)
    return VisionLanguageReference(vision, text, np.zeros((0, length, config.hidden), np.float32))


class VisionLanguageReference:
    """Image features from transformers' module, and logits from the text model's definition.

    Args:
        vision: Vision encoder.
        text: Text model.
        no_images: Empty features [0, N, E].
    """

    def __init__(
        self, vision: ModuleReference, text: StreamedReference, no_images: npt.NDArray[np.float32]
    ) -> None:
        self._vision = vision
        self._text = text
        self._no_images = no_images

    def run(
        self, batches: Sequence[Arrays], transform: Transform | None = None
    ) -> Iterator[Arrays]:
        """Yield each batch's logits and, if it has images, their features."""
        pictured = [{PIXELS: batch[PIXELS]} for batch in batches if PIXELS in batch]
        features = list(self._vision.run(pictured, transform))
        remaining = iter(features)
        visual = [dict(next(remaining)) if PIXELS in batch else {} for batch in batches]
        texts = [
            {n: a for n, a in batch.items() if n != PIXELS}
            | {FEATURES: outputs.get(FEATURES, self._no_images)}
            for batch, outputs in zip(batches, visual, strict=True)
        ]
        for outputs, logits in zip(visual, self._text.run(texts, transform), strict=True):
            yield outputs | logits


def _prove(
    loaded: Loaded, parts: Parts, reference: VisionLanguageReference, images: Tensor, length: int
) -> None:
    """Compare the parts with the model on two rows, each an image between tokens.

    Raises:
        UnsupportedModelError: The logits differ, or the model needs more than images and tokens.
    """
    label = str(loaded.config.get("model_type"))
    first, second, third = [token for token in range(4) if token != parts.image_token][:3]
    row = [first, second, *[parts.image_token] * length, third, first, second]
    ids = torch.tensor([row, row[::-1]])
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    try:
        with torch.no_grad():
            shaped = images[:, None] if parts.nested else images
            expected = loaded.module(**tokens, pixel_values=shaped, use_cache=False).logits.numpy()
    except Exception as error:  # transformers raises anything
        problem = f"it does not run on pixels and tokens alone: {type(error).__name__}"
        raise UnsupportedModelError(label, [f"{problem}: {one_line(error)}"], HINT) from error
    positions = torch.arange(len(row)).repeat(len(ids), 1)
    batch = {n: t.numpy() for n, t in {**tokens, "position_ids": positions, PIXELS: images}.items()}
    [outputs] = reference.run([batch])
    error_rel = float(np.abs(outputs["logits"] - expected).max() / np.abs(expected).max())
    if not error_rel <= _SAME:
        problem = "its logits differ from those of a decoder with features among its embeddings"
        raise UnsupportedModelError(label, [f"{problem}, by {error_rel:.2g}"], HINT)


def _traced(parts: Parts, images: Tensor) -> Traced:
    return trace_module(parts.vision, (images,), ({0: torch.export.Dim.DYNAMIC},))


def _vision(traced: Traced, facts: Facts) -> Program:
    graph = traced.model.graph
    pixel, features = graph.inputs[0], graph.outputs[0]
    pixel.name = PIXELS
    shape: tuple[int | str, ...] = ("I", *(g.static(pixel, axis) or 0 for axis in (1, 2, 3)))
    name_dims(graph, {PIXELS: shape})
    features.name = FEATURES
    width = ("I", facts.model.image_length, facts.model.hidden)
    features.shape = ir.Shape(width)
    g.name_nodes(graph)
    signature = Signature(
        (Port(PIXELS, Role.PIXELS, "float32", shape),),
        (Port(FEATURES, Role.IMAGE_FEATURES, "float32", width),),
    )
    return Program(traced.model, signature, facts, VISION)


def _embedding(definition: Definition, config: DecoderConfig, read: Read, facts: Facts) -> Program:
    module = definition.module(layers=[])
    assert isinstance(module, Decoder)
    token = facts.model.image_token
    assert token is not None

    def compute(input_ids: Tensor, features: Tensor) -> Tensor:
        return with_images(module.look_up(input_ids), input_ids, features, token)

    width = config.hidden
    ports = (
        Port("input_ids", Role.TOKENS, "int64", ("B", "S")),
        Port(FEATURES, Role.IMAGE_FEATURES, "float32", ("I", facts.model.image_length, width)),
    )
    inputs: dict[str, tuple[Dims, torch.dtype]] = {
        port.name: (port.shape, _TORCH[port.dtype]) for port in ports
    }
    assembly = Assembly(read)
    values = [assembly.input(port.name, _TYPES[port.dtype], port.shape) for port in ports]
    part = trace_part(module, compute, inputs, scope="embed_tokens")
    (embeds,) = assembly.add(part, values)
    assembly.output(embeds, "inputs_embeds")
    output = Port("inputs_embeds", Role.EMBEDS, "float32", ("B", "S", width))
    return Program(assembly.model(), Signature(ports, (output,)), facts, EMBEDDING)


_TORCH: Final = {"int64": torch.int64, "float32": torch.float32}
_TYPES: Final = {"int64": ir.DataType.INT64, "float32": ir.DataType.FLOAT}


def _expected(definition: Definition, vision: nn.Module, graph: ir.Graph) -> dict[str, int]:
    """Return the number of attentions, norms and rotary embeddings of the model.

    In the vision encoder those count whose weights are used: its last layers may be unused.
    """
    used_tensors = [value.const_value for value in graph.initializers.values() if value.uses()]
    read = [tensor.source for tensor in used_tensors if isinstance(tensor, Leaf)]
    names = {part: name for name, part in vision.named_modules()}
    used = {
        kind: sum(
            any(name.startswith(f"{names[part]}.") for name in read)
            for part in outermost(vision, kind)
        )
        for kind in KINDS
    }
    text = definition.expected()
    return {kind: text.get(kind, 0) + used.get(kind, 0) for kind in (*KINDS, "rotary")}
