"""Every kind of source, recognized by its path and opened by the module that reads it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmopt.errors import SourceError, SourceNotFoundError
from llmopt.frontend.base import KINDS, Source, SourceOptions

if TYPE_CHECKING:
    import torch


def open_source(source: str | Path | torch.nn.Module, options: SourceOptions) -> Source:
    """Return the Program and the reference of a source.

    Raises:
        SourceNotFoundError: The path does not exist.
        SourceError: The source is damaged or incomplete.
        PickleRefusedError: Reading it would execute code.
        UnsupportedModelError: The model cannot be traced.
    """
    if not isinstance(source, str | Path):
        from llmopt.frontend.torch.module import open_module

        return open_module(source, options)
    text = str(source)
    if ".py:" in text:
        from llmopt.frontend.torch.module import open_factory

        return open_factory(text, options)
    path = Path(source)
    if not path.exists():
        raise SourceNotFoundError(path, KINDS)
    if path.is_dir() or path.suffix == ".gguf":
        from llmopt.frontend.huggingface.folder import open_folder

        return open_folder(path, options)
    if path.suffix == ".onnx":
        from llmopt.frontend.onnx.model import open_onnx

        return open_onnx(path, options)
    if path.suffix in (".pt", ".pth", ".pt2", ".bin"):
        from llmopt.frontend.torch.files import open_torch_file

        return open_torch_file(path, options)
    if path.suffix == ".safetensors":
        hint = "compile the folder that has it and its config.json"
        raise SourceError(path, "weights alone do not describe a model", hint)
    raise SourceError(path, f"unknown kind of source ({path.suffix or 'no suffix'})", KINDS)
