"""Hugging Face folders loaded as modules of transformers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from llmopt.errors import RemoteCodeRefusedError, SourceError, UnsupportedModelError

GIVE: Final = "pass file.py:factory, a function that returns the module and example inputs"
_INSTALL: Final = "pip install 'llmopt[transformers]', or pass the module itself as file.py:factory"


@dataclass(frozen=True)
class Loaded:
    """A transformers model with its weights loaded.

    Args:
        path: Folder of the model.
        module: Model, in eval mode.
        config: Contents of config.json.
        generation: Contents of generation_config.json, empty if there is none.
        notes: Remarks for the user.
    """

    path: Path
    module: Any
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def load(path: Path, config: Mapping[str, Any], *, trust_remote_code: bool) -> Loaded:
    """Return the model of a folder.

    Raises:
        RemoteCodeRefusedError: The model is code in the folder, which is not trusted.
        UnsupportedModelError: transformers is not installed, or does not have the model.
        SourceError: The weights are incomplete or do not fit.
    """
    kind = f"model type {config.get('model_type')!r}"
    if find_spec("transformers") is None:
        problem = "llmopt has no definition of it, and transformers, which may, is not installed"
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
            module, info = cls.from_pretrained(
                path,
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
                trust_remote_code=trust_remote_code or None,
            )
        except Exception as error:  # transformers and code from the folder raise anything
            problem = f"transformers cannot load it: {type(error).__name__}: {one_line(error)}"
            raise SourceError(path, problem, "check config.json and the weights") from error
    _check_complete(path, info)
    notes = (
        ()
        if not (shipped and known and not trust_remote_code)
        else ("code in the folder is not used: transformers has this model built in",)
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


def _check_complete(path: Path, info: Mapping[str, Any]) -> None:
    for key, word in (("missing_keys", "lacks"), ("mismatched_keys", "has other shapes for")):
        names = sorted(str(name) for name in info.get(key) or ())
        if names:
            some = ", ".join(names[:3])
            problem = f"the checkpoint {word} {len(names)} tensors of the model: {some}"
            raise SourceError(path, problem, "take config.json and weights from one checkpoint")


def _prepared(module: Any) -> Any:
    """Return the module in a form that can be traced, without data-dependent branches."""
    if getattr(module, "_can_set_experts_implementation", bool)():
        module.set_experts_implementation("batched_mm")
    return module.eval()


def special_tokens(loaded: Loaded) -> dict[str, Any]:
    """Return the tokens that begin, end and pad a text."""
    config = {**loaded.config, **loaded.generation}
    end = config.get("eos_token_id")
    return {
        "bos": config.get("bos_token_id"),
        "eos": tuple(end) if isinstance(end, list) else () if end is None else (end,),
        "pad": loaded.config.get("pad_token_id"),
    }


def pixels(config: Any, label: str, count: int) -> Tensor:
    """Return black images [count, channels, height, width] of the size that a config names.

    Raises:
        UnsupportedModelError: The config names no size.
    """
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None)
    if size is None:
        problem = "config.json names no image_size, which fixes the shapes of the graph"
        raise UnsupportedModelError(label, [problem], GIVE)
    height, width = (size, size) if isinstance(size, int) else size
    return torch.zeros(count, vision.num_channels, height, width)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Silence transformers' progress bars and warnings."""
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
    content = json.loads(file.read_bytes()) if file.is_file() else {}
    return content if isinstance(content, dict) else {}


def one_line(error: BaseException) -> str:
    """Return the beginning of an error's message on one line."""
    return " ".join(str(error).split())[:200]
