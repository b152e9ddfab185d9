"""A Hugging Face folder of a family that has no definition here: transformers' own module.

A decoder is traced with its cache if that is keys and values; else, and everything else, as it
is called without one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from typing_extensions import override

from llmopt.bundle.manifest import ModelFacts, SourceRecord
from llmopt.errors import RemoteCodeRefusedError, SourceError, UnsupportedModelError, UsageError
from llmopt.frontend.cached import Caches, FullPass, cached_program, find_caches, trace_cached
from llmopt.frontend.census import census
from llmopt.frontend.checkpoint import digest
from llmopt.frontend.examples import SIZES, dynamic_shapes
from llmopt.frontend.files import shipped_files
from llmopt.frontend.meaning import UNBOUNDED, Found, finish
from llmopt.frontend.reference import ModuleReference
from llmopt.frontend.source import Source, SourceOptions
from llmopt.frontend.tables import longest
from llmopt.frontend.trace import trace_module
from llmopt.ir.program import Facts, Program, Role

_LIMITS: Final = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_GIVE: Final = "pass it as file.py:factory, a function that returns it and its example inputs"
_INSTALL: Final = "pip install 'llmopt[transformers]', or pass the module itself as file.py:factory"


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model of transformers, its weights in it.

    Args:
        path: Its folder.
        module: It, in eval mode.
        config: Its config.json.
        generation: Its generation_config.json, empty where there is none.
        notes: What a user should know.
    """

    path: Path
    module: Any
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def open_generic(path: Path, config: Mapping[str, Any], options: SourceOptions) -> Source:
    """Return the source of a folder, by the module that transformers makes of it.

    Raises:
        RemoteCodeRefusedError: the module is code in the folder.
        UnsupportedModelError: transformers is not installed or does not know the family, or the
            module cannot be traced.
        SourceError: weights are missing.
    """
    loaded = load(path, config, trust_remote_code=options.trust_remote_code)
    inputs = _inputs(loaded.module, label=str(config.get("model_type")))
    if not _decodes(loaded.module):
        return _plain(loaded, inputs, options)
    caches = find_caches(loaded.module, {k: v for k, v in inputs.items() if k != "position_ids"})
    if isinstance(caches, Caches):
        try:
            return _cached(loaded, inputs, caches, options)
        except UnsupportedModelError as error:
            caches = "; ".join(error.problems)
    note = f"traced without a cache: {caches}"
    return _plain(dataclasses.replace(loaded, notes=(*loaded.notes, note)), inputs, options)


def load(path: Path, config: Mapping[str, Any], *, trust_remote_code: bool) -> Loaded:
    """Return the model of a folder.

    Raises:
        RemoteCodeRefusedError: it is code in the folder, and that is not trusted.
        UnsupportedModelError: transformers is not installed, or has no such model.
        SourceError: its weights are incomplete or do not fit.
    """
    kind = f"model type {config.get('model_type')!r}"
    if find_spec("transformers") is None:
        problem = "not an architecture llmopt defines, and transformers, which may, is not here"
        raise UnsupportedModelError(kind, [problem], _INSTALL)
    import transformers

    known = config.get("model_type") in transformers.CONFIG_MAPPING
    shipped = config.get("auto_map")
    if shipped and not known and not trust_remote_code:
        raise RemoteCodeRefusedError(path, sorted(_modules(shipped)))
    cls = _class(config, trusted=bool(shipped) and trust_remote_code)
    if cls is None:
        problem = f"neither llmopt nor transformers {transformers.__version__} has a model for it"
        raise UnsupportedModelError(kind, [problem], "pass the module itself as file.py:factory")
    with _silent():
        try:
            module, found = cls.from_pretrained(
                path,
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
                trust_remote_code=trust_remote_code or None,
            )
        except Exception as error:  # transformers and code from the folder raise anything
            problem = f"transformers cannot load it: {type(error).__name__}: {_line(error)}"
            raise SourceError(path, problem, "check config.json and the weights") from error
    _check_complete(path, found)
    notes = (
        ()
        if not (shipped and known and not trust_remote_code)
        else ("code in the folder is not used: transformers has this model itself",)
    )
    return Loaded(path, _prepared(module), config, _json(path / "generation_config.json"), notes)


def _modules(shipped: Mapping[str, Any]) -> set[str]:
    names = [n for each in shipped.values() for n in (each if isinstance(each, list) else [each])]
    return {f"{str(name).partition('.')[0]}.py" for name in names if name}


def _class(config: Mapping[str, Any], *, trusted: bool) -> Any:
    """Return the class that the config names, or None."""
    import transformers

    if trusted:
        autos = [name for name in config["auto_map"] if name.startswith("AutoModel")]
        return getattr(transformers, autos[0], None) if autos else None
    for name in config.get("architectures") or []:
        if (cls := getattr(transformers, str(name), None)) is not None:
            return cls
    known = config.get("model_type") in transformers.CONFIG_MAPPING
    return transformers.AutoModel if known and not config.get("architectures") else None


def _check_complete(path: Path, found: Mapping[str, Any]) -> None:
    for key, word in (("missing_keys", "lacks"), ("mismatched_keys", "has other shapes for")):
        names = sorted(str(name) for name in found.get(key) or ())
        if names:
            some = ", ".join(names[:3])
            problem = f"the checkpoint {word} {len(names)} tensors of the model: {some}"
            raise SourceError(path, problem, "take config.json and weights from the same place")


def _prepared(module: Any) -> Any:
    """Return the module in a form that can be traced: nothing of it depends on the data."""
    if getattr(module, "_can_set_experts_implementation", bool)():
        module.set_experts_implementation("batched_mm")
    return module.eval()


def _inputs(module: Any, label: str) -> dict[str, Tensor]:
    """Return what to call the module with: tokens [B, S] and pixels [B, C, height, width]."""
    takes, config = inspect.signature(module.forward).parameters, module.config
    if getattr(config, "is_encoder_decoder", False):
        problem = "an encoder and a decoder: not one component"
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
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None)
        if size is None:
            problem = "config.json names no image_size, and another size is another graph"
            raise UnsupportedModelError(label, [problem], _GIVE)
        height, width = (size, size) if isinstance(size, int) else size
        inputs["pixel_values"] = torch.zeros(SIZES[0], vision.num_channels, height, width)
    if not inputs:
        problem = f"its main input {module.main_input_name!r} is neither tokens nor pixels"
        raise UnsupportedModelError(label, [problem], _GIVE)
    return inputs


def _decodes(module: Any) -> bool:
    """Whether the module maps tokens to the logits of next ones."""
    name = type(module).__name__
    return name.endswith(("ForCausalLM", "LMHeadModel")) and module.main_input_name == "input_ids"


class _Plain(nn.Module):
    """A model of transformers that takes tensors in order and returns the tensors it has by name.

    Args:
        model: It.
        names: What it takes.
        options: More that it is called with.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...], options: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self._names = names
        self._options = options

    @override
    def forward(self, *tensors: Tensor) -> dict[str, Tensor]:
        """Return the tensors of what the model returns; what is nested in it is left out."""
        given = dict(zip(self._names, tensors, strict=True))
        found = self.model(**given, **self._options)
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _plain(loaded: Loaded, inputs: dict[str, Tensor], options: SourceOptions) -> Source:
    """Return the source of a model called without a cache."""
    takes = inspect.signature(loaded.module.forward).parameters
    more: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
    module = _Plain(loaded.module, tuple(inputs), more).eval()
    given = tuple(inputs.values())
    result: dict[str, Tensor] = {}
    with torch.no_grad():
        counted = census(loaded.module, lambda: result.update(module(*given)))
    traced = trace_module(module, given, (tuple(dynamic_shapes(inputs).values()),))
    for value, name in zip(traced.model.graph.inputs, inputs, strict=True):
        value.name = name
    names = list(inputs)
    found = Found(
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
    source = finish(found, dataclasses.replace(options, max_length=limit))
    model = dataclasses.replace(source.program.facts.model, **_special(loaded), **_heads(loaded))
    return _shipped(loaded, source.program, model, source)


def _cached(
    loaded: Loaded, inputs: dict[str, Tensor], caches: Caches, options: SourceOptions
) -> Source:
    """Return the source of a decoder with its cache."""
    if options.task not in (None, "generate"):
        raise UsageError(f"--task {options.task}: this checkpoint is for 'generate'")
    module, names = loaded.module, list(inputs)
    keeps = "logits_to_keep" in inspect.signature(module.forward).parameters
    traced, signature = trace_cached(module, names, caches, keeps=keeps)
    whole = FullPass(module).eval()
    with torch.no_grad():
        counted = census(module, lambda: whole(**inputs))
    record = SourceRecord(loaded.path.resolve().name, "huggingface", digest(loaded.path))
    key = caches.shapes[0]
    vocabulary = int(module.config.get_text_config().vocab_size)
    model = ModelFacts(
        family=str(loaded.config.get("model_type")),
        layers=len(caches.shapes) // 2,
        vocabulary=vocabulary,
        cache="concat",
        **{**_heads(loaded), "kv_heads": key[1], "head_width": key[3]},
        **_special(loaded),
    )
    expected = {**traced.expected, **counted}
    program = cached_program(traced, signature, Facts("generate", model, record, expected))
    limits = (_limit(loaded), longest(program, vocabulary), options.max_length)
    limit = min(filter(None, limits), default=UNBOUNDED)
    model = dataclasses.replace(model, max_length=limit)
    reference = ModuleReference(whole, names, ["logits"], positional=0)
    source = Source(record.name, program, reference, loaded.notes)
    return _shipped(loaded, program, model, source)


def _shipped(loaded: Loaded, program: Program, model: ModelFacts, source: Source) -> Source:
    """Return the source with the folder's tokenizer and settings in it."""
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
    """Return the sizes that the config names, in our words."""
    text = loaded.module.config.get_text_config()
    heads = int(getattr(text, "num_attention_heads", 0) or 0)
    hidden = int(getattr(text, "hidden_size", 0) or 0)
    width = int(getattr(text, "head_dim", 0) or (hidden // heads if heads else 0))
    kv_heads = int(getattr(text, "num_key_value_heads", 0) or heads)
    return {"heads": heads, "kv_heads": kv_heads, "head_width": width, "hidden": hidden}


def _special(loaded: Loaded) -> dict[str, Any]:
    """Return the tokens that begin, end and fill up a text."""
    told = {**loaded.config, **loaded.generation}
    end = told.get("eos_token_id")
    return {
        "bos": told.get("bos_token_id"),
        "eos": tuple(end) if isinstance(end, list) else () if end is None else (end,),
        "pad": loaded.config.get("pad_token_id"),
    }


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep transformers' progress bars and warnings off the screen."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _json(file: Path) -> dict[str, Any]:
    found = json.loads(file.read_bytes()) if file.is_file() else {}
    return found if isinstance(found, dict) else {}


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
