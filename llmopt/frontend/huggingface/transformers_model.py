"""Hugging Face folders of families without a definition: transformers' own module.

A decoder is traced with its cache if that is keys and values alone. Any other model is traced
without a cache.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from typing_extensions import override

from llmopt.errors import UnsupportedModelError, UsageError
from llmopt.frontend.base import Source, SourceOptions
from llmopt.frontend.census import census
from llmopt.frontend.huggingface.cached import (
    DecoderCache,
    FullPass,
    cached_program,
    find_caches,
    trace_cached,
)
from llmopt.frontend.huggingface.checkpoint import digest
from llmopt.frontend.huggingface.files import shipped_files
from llmopt.frontend.huggingface.loading import GIVE, Loaded, load, pixels, special_tokens
from llmopt.frontend.huggingface.vision_language import open_vision_language
from llmopt.frontend.huggingface.vision_parts import is_vision_language
from llmopt.frontend.meaning import UNBOUNDED, TracedModel, finish
from llmopt.frontend.reference import ModuleReference
from llmopt.frontend.tables import longest
from llmopt.frontend.torch.examples import SIZES, dynamic_shapes
from llmopt.frontend.torch.trace import trace_module
from llmopt.interface.facts import ModelFacts, SourceRecord
from llmopt.interface.signature import Role
from llmopt.ir.program import Facts, Program

_LIMITS: Final = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def open_generic(path: Path, config: Mapping[str, Any], options: SourceOptions) -> Source:
    """Return the source of a folder, loaded by transformers.

    Raises:
        RemoteCodeRefusedError: The module is code in the folder.
        UnsupportedModelError: transformers is not installed or does not know the family, or the
            module cannot be traced.
        SourceError: Weights are missing.
    """
    loaded = load(path, config, trust_remote_code=options.trust_remote_code)
    if is_vision_language(loaded.module):
        return open_vision_language(loaded, options)
    inputs = _inputs(loaded.module, label=str(config.get("model_type")))
    if not _decodes(loaded.module):
        return _plain(loaded, inputs, options)
    caches = find_caches(loaded.module, {k: v for k, v in inputs.items() if k != "position_ids"})
    if isinstance(caches, DecoderCache):
        try:
            return _cached(loaded, inputs, caches, options)
        except UnsupportedModelError as error:
            caches = "; ".join(error.problems)
    note = f"traced without a KV cache: {caches}"
    return _plain(dataclasses.replace(loaded, notes=(*loaded.notes, note)), inputs, options)


def _inputs(module: Any, label: str) -> dict[str, Tensor]:
    """Return example inputs: tokens [B, S] and pixels [B, C, height, width]."""
    takes, config = inspect.signature(module.forward).parameters, module.config
    if getattr(config, "is_encoder_decoder", False):
        problem = "an encoder-decoder, which has no single graph"
        raise UnsupportedModelError(label, [problem], "compile its encoder as file.py:factory")
    inputs: dict[str, Tensor] = {}
    if "input_ids" in takes:
        generator = torch.Generator().manual_seed(0)
        text = config.get_text_config()
        inputs["input_ids"] = torch.randint(3, int(text.vocab_size), SIZES, generator=generator)
        if "attention_mask" in takes:
            inputs["attention_mask"] = torch.ones(SIZES, dtype=torch.int64)
        if "position_ids" in takes and _decodes(module):
            inputs["position_ids"] = torch.arange(SIZES[1]).repeat(SIZES[0], 1)
        if "token_type_ids" in takes and (getattr(config, "type_vocab_size", 0) or 0) > 1:
            inputs["token_type_ids"] = torch.zeros(SIZES, dtype=torch.int64)
    if "pixel_values" in takes:
        inputs["pixel_values"] = pixels(config, label, SIZES[0])
    if not inputs:
        problem = f"its main input {module.main_input_name!r} is neither tokens nor pixels"
        raise UnsupportedModelError(label, [problem], GIVE)
    return inputs


def _decodes(module: Any) -> bool:
    """Return whether the module maps tokens to next-token logits."""
    name = type(module).__name__
    return name.endswith(("ForCausalLM", "LMHeadModel")) and module.main_input_name == "input_ids"


class _Plain(nn.Module):
    """A transformers model that takes tensors in order and returns tensors by name.

    Args:
        model: Model of transformers.
        names: Names of its inputs, in order.
        options: Further arguments of each call.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...], options: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self._names = names
        self._options = options

    @override
    def forward(self, *tensors: Tensor) -> dict[str, Tensor]:
        """Return the tensors of the model's output; nested ones are omitted."""
        named = dict(zip(self._names, tensors, strict=True))
        output = self.model(**named, **self._options)
        return {name: value for name, value in output.items() if isinstance(value, Tensor)}


def _plain(loaded: Loaded, inputs: dict[str, Tensor], options: SourceOptions) -> Source:
    """Return the source of a model without its cache."""
    takes = inspect.signature(loaded.module.forward).parameters
    more: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
    module = _Plain(loaded.module, tuple(inputs), more).eval()
    tensors = tuple(inputs.values())
    result: dict[str, Tensor] = {}
    with torch.no_grad():
        counted = census(loaded.module, lambda: result.update(module(*tensors)))
    traced = trace_module(module, tensors, (tuple(dynamic_shapes(inputs).values()),))
    for value, name in zip(traced.model.graph.inputs, inputs, strict=True):
        value.name = name
    names = list(inputs)
    traced_model = TracedModel(
        record=SourceRecord(loaded.path.resolve().name, "huggingface", digest(loaded.path)),
        family=str(loaded.config.get("model_type")),
        model=traced.model,
        outputs=list(result),
        expected={**traced.expected, **counted},
        limit=traced.limit,
        reference=lambda out: ModuleReference(module, names, out, positional=len(names)),
        notes=loaded.notes,
    )
    limit = min(filter(None, (_limit(loaded), options.max_length)), default=None)
    source = finish(traced_model, dataclasses.replace(options, max_length=limit))
    inferred = source.program.facts.model
    model = dataclasses.replace(inferred, **special_tokens(loaded), **_heads(loaded))
    return _shipped(loaded, source.program, model, source)


def _cached(
    loaded: Loaded, inputs: dict[str, Tensor], caches: DecoderCache, options: SourceOptions
) -> Source:
    """Return the source of a decoder with its cache."""
    if options.task not in (None, "generate"):
        raise UsageError(f"--task {options.task}: this checkpoint is for 'generate'; omit --task")
    module, names = loaded.module, list(inputs)
    keeps = "logits_to_keep" in inspect.signature(module.forward).parameters
    traced, signature = trace_cached(module, names, caches, keeps=keeps)
    full = FullPass(module).eval()
    with torch.no_grad():
        counted = census(module, lambda: full(**inputs))
    record = SourceRecord(loaded.path.resolve().name, "huggingface", digest(loaded.path))
    key = caches.shapes[0]
    vocabulary = int(module.config.get_text_config().vocab_size)
    model = ModelFacts(
        family=str(loaded.config.get("model_type")),
        layers=len(caches.shapes) // 2,
        vocabulary=vocabulary,
        cache="concat",
        **{**_heads(loaded), "kv_heads": key[1], "head_width": key[3]},
        **special_tokens(loaded),
    )
    expected = {**traced.expected, **counted}
    program = cached_program(traced, signature, Facts("generate", model, record, expected))
    limits = (_limit(loaded), longest(program, vocabulary), options.max_length)
    limit = min(filter(None, limits), default=UNBOUNDED)
    model = dataclasses.replace(model, max_length=limit)
    reference = ModuleReference(full, names, ["logits"], positional=0)
    source = Source(record.name, program, reference, loaded.notes)
    return _shipped(loaded, program, model, source)


def _shipped(loaded: Loaded, program: Program, model: ModelFacts, source: Source) -> Source:
    """Return the source with the folder's tokenizer and generation settings."""
    if program.signature.find(Role.TOKENS) is None:
        program.learn(model=model)
        return source
    files, notes = shipped_files(loaded.path, loaded.generation, model)
    program.learn(model=model, files=files)
    return dataclasses.replace(source, notes=(*source.notes, *notes))


def _limit(loaded: Loaded) -> int | None:
    text = loaded.module.config.get_text_config()
    return next((int(n) for key in _LIMITS if (n := getattr(text, key, None))), None)


def _heads(loaded: Loaded) -> dict[str, Any]:
    """Return the sizes in the config, by the names of `ModelFacts`."""
    text = loaded.module.config.get_text_config()
    heads = int(getattr(text, "num_attention_heads", 0) or 0)
    hidden = int(getattr(text, "hidden_size", 0) or 0)
    width = int(getattr(text, "head_dim", 0) or (hidden // heads if heads else 0))
    kv_heads = int(getattr(text, "num_key_value_heads", 0) or heads)
    return {"heads": heads, "kv_heads": kv_heads, "head_width": width, "hidden": hidden}
