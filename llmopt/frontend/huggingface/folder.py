"""Hugging Face folders and GGUF files: the built-in definition or transformers' module."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmopt.errors import SourceError, UsageError
from llmopt.frontend.base import Checkpoint, Source, SourceOptions
from llmopt.frontend.huggingface.checkpoint import digest, open_checkpoint
from llmopt.interface.facts import SourceRecord
from llmopt.ir.program import Facts

if TYPE_CHECKING:
    from llmopt.models import Definition


def open_folder(path: Path, options: SourceOptions) -> Source:
    """Return the source of a Hugging Face folder or a GGUF file."""
    from llmopt.frontend.definitions.definition import read_parameters, trace_definition
    from llmopt.frontend.reference import StreamedReference
    from llmopt.models import FAMILIES, define

    config = _config(_weights(path))
    described = path.is_dir() and (path / "config.json").is_file()
    if described and config.get("model_type") not in (None, *FAMILIES):
        from llmopt.frontend.huggingface.transformers_model import open_generic

        return open_generic(path, config, options)
    checkpoint = open_checkpoint(path, trust_pickle=options.trust_pickle)
    definition = define(config, checkpoint.names(), equal=_equal(checkpoint))
    _check_shapes(path, definition, checkpoint)
    facts, notes = _facts(path, config, definition, options)
    read = read_parameters(definition, checkpoint)
    program = trace_definition(definition, read, facts)
    name = path.resolve().name if path.is_dir() else path.stem
    return Source(name, program, StreamedReference(definition, read), tuple(notes))


def _check_shapes(path: Path, definition: Definition, checkpoint: Checkpoint) -> None:
    """Raise unless every tensor has the shape that the config gives its parameter.

    Raises:
        SourceError: Tensors differ; the message names the first few.
    """
    expected = {name: tuple(p.shape) for name, p in definition.module().named_parameters()}
    wrong = [
        f"{recipe.sources[0]} is {list(actual)}, not {list(expected[name])}"
        for name, recipe in definition.recipes().items()
        if (actual := recipe.shape(checkpoint.shape)) != expected[name]
    ]
    if wrong:
        problem = f"{len(wrong)} tensors do not fit config.json: {'; '.join(wrong[:3])}"
        raise SourceError(path, problem, "take both from the same checkpoint")


def _weights(path: Path) -> Path:
    if path.is_dir() and not (path / "config.json").is_file() and not list(path.glob("*.gguf")):
        raise SourceError(
            path, "the folder has no config.json", "copy it from the source of the weights"
        )
    return path


def _config(path: Path) -> dict[str, Any]:
    """Return the config.json of a folder, or its equivalent from a GGUF file's metadata."""
    if path.is_dir() and (path / "config.json").is_file():
        file = path / "config.json"
        try:
            config = json.loads(file.read_bytes())
        except ValueError as error:
            raise SourceError(file, f"not JSON ({error})", "download it again") from error
        if not isinstance(config, dict):
            raise SourceError(file, "not a JSON object", "download it again")
        return config | _pooling(path)
    from llmopt.frontend.gguf.config import gguf_config, gguf_pooling
    from llmopt.frontend.gguf.file import read_gguf

    file = next(iter(sorted(path.glob("*.gguf")))) if path.is_dir() else path
    parsed = read_gguf(file)
    pooling = gguf_pooling(parsed)
    return gguf_config(parsed) | ({"pooling": pooling, "normalize": True} if pooling else {})


def _pooling(folder: Path) -> dict[str, Any]:
    """Return the pooling of sentence-transformers' modules.json, with the keys of ``define``.

    Raises:
        SourceError: A module is unknown; dropping it would change the result.
    """
    file = folder / "modules.json"
    if not file.is_file():
        return {}
    steps: dict[str, Any] = {}
    for module in json.loads(file.read_bytes()):
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind == "Pooling":
            settings = json.loads((folder / module["path"] / "config.json").read_bytes())
            steps["pooling"] = _pooling_mode(file, settings)
        elif kind == "Normalize":
            steps["normalize"] = True
        elif kind != "Transformer":
            hint = "remove it from modules.json if its effect is not needed"
            raise SourceError(file, f"unknown sentence-transformers module {kind!r}", hint)
    return steps


def _pooling_mode(file: Path, settings: Mapping[str, Any]) -> str:
    names = {
        "pooling_mode_cls_token": "cls",
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_max_tokens": "max",
        "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    }
    if isinstance(mode := settings.get("pooling_mode"), str):
        return mode
    chosen = [k for k, v in settings.items() if k.startswith("pooling_mode_") and v is True]
    if len(chosen) != 1 or chosen[0] not in names:
        known = ", ".join(names.values())
        raise SourceError(file, f"pooling modes {chosen}", f"set exactly one of {known}")
    return names[chosen[0]]


def _equal(checkpoint: Checkpoint) -> Any:
    import numpy as np

    return lambda a, b: bool(np.array_equal(checkpoint.read(a), checkpoint.read(b)))


def _facts(
    path: Path, config: Mapping[str, Any], definition: Any, options: SourceOptions
) -> tuple[Facts, list[str]]:
    from llmopt.frontend.definitions.definition import (
        decoder_facts,
        encoder_decoder_facts,
        encoder_facts,
    )
    from llmopt.frontend.huggingface.files import legacy_settings, shipped_files
    from llmopt.models.config import DecoderConfig, EncoderDecoderConfig
    from llmopt.runtime.logits_processors import unheeded

    generation = _generation(path)
    end = generation.get("eos_token_id", config.get("eos_token_id"))
    special = {
        "bos": generation.get("bos_token_id", config.get("bos_token_id")),
        "eos": tuple(end) if isinstance(end, list) else () if end is None else (end,),
        "pad": config.get("pad_token_id"),
    }
    limit = _limit(path, definition)
    special["max_length"] = min(limit or options.max_length or 0, options.max_length or limit)
    match definition.config:
        case DecoderConfig() as ours:
            model, task = decoder_facts(definition, ours, **special), "generate"
        case EncoderDecoderConfig() as ours:
            start = generation.get("decoder_start_token_id", config.get("decoder_start_token_id"))
            model = encoder_decoder_facts(definition, ours, start=start, **special)
            task = "speech-to-text" if ours.bands else "text-to-text"
        case ours:
            model = encoder_facts(definition, ours, **special)
            task = "embed" if ours.pooling is not None else "encode"
    if model.start is not None:
        generation = generation or legacy_settings(config)
    files, notes = shipped_files(path, generation, model)
    if model.start is not None and (ignored := unheeded(generation)):
        notes.append(f"generation_config.json: {', '.join(ignored)} ignored (not implemented)")
    kind = "huggingface" if (path / "config.json").is_file() else "gguf"
    facts = Facts(
        task=options.task or task,
        model=model,
        source=SourceRecord(path.resolve().name, kind, digest(path)),
        expected=definition.expected(),
        files=files,
    )
    if facts.task != task:
        raise UsageError(f"--task {facts.task}: this checkpoint is for {task!r}; omit --task")
    return facts, notes


def _limit(path: Path, definition: Any) -> int:
    """Return the longest sequence; sentence-transformers may truncate texts earlier."""
    limit = int(definition.config.max_length)
    file = path / "sentence_bert_config.json"
    if path.is_dir() and file.is_file():
        configured = json.loads(file.read_bytes()).get("max_seq_length")
        limit = min(limit, int(configured or limit))
    return limit


def _generation(path: Path) -> dict[str, Any]:
    file = path / "generation_config.json"
    if not path.is_dir() or not file.is_file():
        return {}
    settings = json.loads(file.read_bytes())
    return settings if isinstance(settings, dict) else {}
