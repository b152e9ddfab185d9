"""The files of an artifact for ONNX Runtime: the model, its weights, onnxruntime-genai's config."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import onnx_ir as ir

from llmopt.backends.base import Lowered
from llmopt.backends.onnxruntime.genai import FILE as GENAI
from llmopt.backends.onnxruntime.genai import genai_config
from llmopt.interface.signature import Role
from llmopt.ir.dialect import OPSET
from llmopt.ir.program import Program
from llmopt.ir.saving import save_all

ENTRY: Final = "model.onnx"
DATA: Final = "model.onnx.data"
MICROSOFT: Final = "com.microsoft"
_ALIGNMENT: Final = 4096  # a page: ONNX Runtime maps external data
_CPU: Final[Mapping[str, Mapping[str, str]]] = {}


def write_model(
    program: Program, folder: Path, providers: Mapping[str, Mapping[str, str]] = _CPU
) -> Lowered:
    """Write a lowered Program into ``folder``.

    Args:
        program: Lowered Program.
        folder: Directory of the artifact.
        providers: Execution providers for onnxruntime-genai, each with its options; the CPU if
            none.
    """
    for part in program.parts():
        finish(part.model)
        _declare_last_token(part)
    files = component_files(program)
    models = {files[name]: model for name, model in program.components.items()}
    save_all(models, folder, DATA, alignment=_ALIGNMENT)
    if (config := genai_config(program, files[program.main], providers)) is not None:
        (folder / GENAI).write_bytes(config)
    entry = files.pop(program.main)
    versions: dict[str, str | int] = {"onnxruntime": installed("onnxruntime"), "opset": OPSET}
    return Lowered(entry, program, versions, others=files)


def component_files(program: Program) -> dict[str, str]:
    """Return the file of each component: ``model.onnx``, or one named after each."""
    return {name: f"{name}.onnx" for name in program.components}


def _declare_last_token(program: Program) -> None:
    """Declare logits of one token, the default of ``logits_to_keep``.

    onnxruntime-genai sizes its buffer by the declared shape. Where a caller sets ``logits_to_keep``
    the actual shape differs, which ONNX Runtime allows with a warning.
    """
    logits, keep = program.output(Role.LOGITS), program.signature.find(Role.LOGITS_TO_KEEP)
    if logits is not None and keep is not None and logits.shape is not None:
        batch, _, vocabulary = logits.shape
        logits.shape = ir.Shape([batch, 1, vocabulary])


def finish(model: ir.Model) -> None:
    """Give every node and value a unique name, and import the domains that are used."""
    from onnx_ir.passes.common import NameFixPass

    for node in model.graph:
        for output in node.outputs:
            if node.domain == MICROSOFT and _unread(output):
                output.name = ""
    NameFixPass()(model)
    if any(node.domain == MICROSOFT for node in model.graph):
        model.graph.opset_imports[MICROSOFT] = 1


def _unread(value: ir.Value) -> bool:
    node = value.producer()
    optional = node is not None and value.index() not in (0, None)
    return optional and not value.uses() and not value.is_graph_output()


def installed(package: str) -> str:
    """Return the version of an installed package, or ``"absent"``."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
