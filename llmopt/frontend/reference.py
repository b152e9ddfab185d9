"""References: sources run by torch, which Programs are compared with.

A definition's module runs layer by layer: every batch passes a layer before the next layer's
weights are read, so that no more than one layer's weights are ever in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from llmopt.frontend.tensors import Read, to_numpy
from llmopt.interface.arrays import Arrays
from llmopt.models import Definition
from llmopt.models.decoder import Decoder
from llmopt.models.encoder import Encoder
from llmopt.models.encoder_decoder import EncoderDecoder

Transform = Callable[[str, npt.NDArray[Any]], npt.NDArray[Any]]
"""Function from a parameter's name and value to a replacement: quantized and back, say."""


class Reference(Protocol):
    """The source, ready to be run."""

    def run(
        self, batches: Sequence[Arrays], transform: Transform | None = None
    ) -> Iterator[Arrays]:
        """Yield the outputs of each batch, by the Program's output names; no cache is used."""


Merge = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
"""Function from embeddings [B, S, E] and a batch to embeddings with image features inserted."""


class StreamedReference:
    """A definition's module with its weights read layer by layer.

    Args:
        definition: The model.
        read: Function from a parameter's name to its values, float32.
        merge: Function applied to a decoder's embeddings before its first layer.
    """

    def __init__(
        self, definition: Definition, read: Read, merge: Merge = lambda embeds, _: embeds
    ) -> None:
        self._definition = definition
        self._read = read
        self._merge = merge

    def run(
        self, batches: Sequence[Arrays], transform: Transform | None = None
    ) -> Iterator[Arrays]:
        """Yield the outputs of each batch: logits of every token, or hidden states."""
        module = self._definition.module()
        load = _Loader(self._read, transform)
        feeds = [{name: torch.from_numpy(a) for name, a in batch.items()} for batch in batches]
        with torch.inference_mode():
            if isinstance(module, Decoder):
                yield from _decode(module, feeds, load, self._merge)
            elif isinstance(module, Encoder):
                yield from _encode(module, feeds, load)
            elif isinstance(module, EncoderDecoder):
                yield from _encode_decode(module, feeds, load)


class _Loader:
    """Loads weights into a part of a module while it is in use."""

    def __init__(self, read: Read, transform: Transform | None) -> None:
        self._read = read
        self._transform = transform

    @contextlib.contextmanager
    def __call__(self, module: nn.Module, *prefixes: str) -> Iterator[None]:
        """Load the parameters whose names begin with one of ``prefixes``."""
        replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
        for name, parameter in list(module.named_parameters()):
            if name.startswith(prefixes):
                path, _, leaf = name.rpartition(".")
                owner = module.get_submodule(path)
                replaced.append((owner, leaf, parameter))
                loaded = nn.Parameter(self._tensor(name), requires_grad=False)
                setattr(owner, leaf, _named(loaded, name))
        try:
            yield
        finally:
            for owner, leaf, parameter in replaced:
                setattr(owner, leaf, parameter)

    def _tensor(self, name: str) -> Tensor:
        array = self._read(name).astype(np.float32, copy=False)
        if self._transform is not None:
            array = self._transform(name, array)
        return torch.from_numpy(np.ascontiguousarray(array))


def name_of(tensor: Tensor) -> str | None:
    """Return a parameter's name while a reference runs, None for any other tensor."""
    name: str | None = vars(tensor).get("llmopt_name")
    return name


def _named(parameter: nn.Parameter, name: str) -> nn.Parameter:
    vars(parameter)["llmopt_name"] = name
    return parameter


@contextlib.contextmanager
def _naming(module: Callable[..., Any]) -> Iterator[None]:
    """Label the parameters of a module with their names."""
    named = list(module.named_parameters()) if isinstance(module, nn.Module) else []
    for name, parameter in named:
        _named(parameter, name)
    try:
        yield
    finally:
        for _, parameter in named:
            del vars(parameter)["llmopt_name"]


def _decode(
    module: Decoder, feeds: Sequence[Mapping[str, Tensor]], load: _Loader, merge: Merge
) -> Iterator[Arrays]:
    with load(module, "embed_"):
        embeds = [merge(module.look_up(f["input_ids"]), f) for f in feeds]
        hidden = [module.begin(e, f["position_ids"]) for e, f in zip(embeds, feeds, strict=True)]
    contexts = [module.context(f["attention_mask"], f["position_ids"], ()) for f in feeds]
    for index, layer in module.layers.items():
        kind = module.config.layers[int(index)]
        with load(module, f"layers.{index}."):
            for number, state in enumerate(hidden):
                empty = torch.zeros(len(state), kind.kv_heads, 0, kind.head_width)
                hidden[number], _ = layer(state, contexts[number], (empty, empty))
    with load(module, "norm.", *(("embed_tokens.",) if module.config.tied else ("lm_head.",))):
        for state in hidden:
            yield {"logits": module.head(module.finish(state)).numpy()}


def _encode(
    module: Encoder, feeds: Sequence[Mapping[str, Tensor]], load: _Loader
) -> Iterator[Arrays]:
    with load(module, "embed_"):
        hidden = [module.embed(f["input_ids"], f.get("token_type_ids")) for f in feeds]
    with load(module, "relative_bias"):
        contexts = [module.context(f["attention_mask"]) for f in feeds]
    for index, layer in module.layers.items():
        with load(module, f"layers.{index}."):
            for number, state in enumerate(hidden):
                hidden[number] = layer(state, contexts[number])
    for state, f in zip(hidden, feeds, strict=True):
        outputs = {"last_hidden_state": module.finish(state).numpy()}
        if module.config.pooling is not None:
            pooled = module.pool(state, f["attention_mask"])
            outputs["sentence_embedding"] = pooled.numpy()
        yield outputs


def _encode_decode(
    module: EncoderDecoder, feeds: Sequence[Mapping[str, Tensor]], load: _Loader
) -> Iterator[Arrays]:
    """Run the encoder, then the decoder, each stack layer by layer."""
    memories = _encoder_states(module, feeds, load)
    tables = [f"decoder.{name}" for name in ("embed_", "relative_bias")]
    with load(module, "embed_tokens.", *tables):
        hidden = [module.embed(f["input_ids"], f["position_ids"]) for f in feeds]
        masks = [module.context(f["attention_mask"], f["input_ids"].shape[1]) for f in feeds]
    for name in module.decoder.layers:
        with load(module, f"decoder.layers.{name}."):
            for number, state in enumerate(hidden):
                memory, seen = memories[number], _source_mask(feeds[number])
                hidden[number] = module.decode_layer(name, state, masks[number], memory, seen)
    with load(module, "decoder.norm.", "embed_tokens.", "lm_head.", "logits_bias."):
        for state, memory in zip(hidden, memories, strict=True):
            logits = module.head(module.decoder.finish(state))
            yield {"last_hidden_state": memory.numpy(), "logits": logits.numpy()}


def _encoder_states(
    module: EncoderDecoder, feeds: Sequence[Mapping[str, Tensor]], load: _Loader
) -> list[Tensor]:
    """Return the encoder's hidden states of each batch, [B, C, E]."""
    source = "encoder.input_features" if module.config.bands else "encoder.input_ids"
    tables = [f"encoder.{name}" for name in ("embed_", "relative_bias")]
    with load(module, "embed_tokens.", "source_tokens.", "sounds.", *tables):
        hidden = [module.embed_source(f[source]) for f in feeds]
        source_masks = [_source_mask(f) for f in feeds]
        masks = [None if mask is None else module.source_context(mask) for mask in source_masks]
    for name, layer in module.encoder.layers.items():
        with load(module, f"encoder.layers.{name}."):
            hidden = [layer(state, mask) for state, mask in zip(hidden, masks, strict=True)]
    with load(module, "encoder.norm."):
        return [module.encoder.finish(state) for state in hidden]


def _source_mask(feeds: Mapping[str, Tensor]) -> Tensor | None:
    return feeds.get("encoder.attention_mask")


class ModuleReference:
    """A live module, called as it was traced.

    Args:
        module: Module; run in eval mode, then put back into its former mode.
        inputs: Names of the module's inputs, in order.
        outputs: Names of the module's outputs, in order.
        positional: Number of inputs passed by position; the others are passed by name.
    """

    def __init__(
        self,
        module: Callable[..., Any],
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        positional: int,
    ) -> None:
        self._module = module
        self._inputs = tuple(inputs)
        self._outputs = tuple(outputs)
        self._positional = positional

    def run(
        self, batches: Sequence[Arrays], transform: Transform | None = None
    ) -> Iterator[Arrays]:
        """Yield the outputs of each batch."""
        with (
            torch.inference_mode(),
            evaluating(self._module),
            self._changed(transform),
            _naming(self._module),
        ):
            for batch in batches:
                tensors = {name: torch.from_numpy(batch[name]) for name in self._inputs}
                items = list(tensors.items())
                args = [tensor for _, tensor in items[: self._positional]]
                result = self._module(*args, **dict(items[self._positional :]))
                flat = torch.utils._pytree.tree_leaves(result)  # noqa: SLF001 - torch's only one
                arrays = [to_numpy(leaf) for leaf in flat if isinstance(leaf, Tensor)]
                yield dict(zip(self._outputs, arrays, strict=True))

    @contextlib.contextmanager
    def _changed(self, transform: Transform | None) -> Iterator[None]:
        """Replace the parameters by what ``transform`` returns, and restore them afterwards."""
        module = self._module
        if transform is None or not isinstance(module, nn.Module):
            yield
            return
        originals = {name: p.data for name, p in module.named_parameters()}
        try:
            for name, parameter in module.named_parameters():
                array = transform(name, to_numpy(originals[name]))
                parameter.data = torch.from_numpy(np.ascontiguousarray(array))
            yield
        finally:
            for name, parameter in module.named_parameters():
                parameter.data = originals[name]


@contextlib.contextmanager
def evaluating(module: Callable[..., Any]) -> Iterator[None]:
    """Put every submodule into eval mode, and each back into its former mode."""
    parts = list(module.modules()) if isinstance(module, nn.Module) else []
    training = [part for part in parts if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
