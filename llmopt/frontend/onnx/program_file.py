"""Programs in files, as ONNX or as its text, read without conversion.

The text is ONNX's own. A weight whose values are omitted has ``["location": "elided"]``; passes may
move such a weight, and get an error when they read it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final, NoReturn

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from llmopt.errors import SourceError, SourceNotFoundError
from llmopt.interface.arrays import Array
from llmopt.interface.facts import ModelFacts, SourceRecord
from llmopt.interface.signature import Port, Role, Signature
from llmopt.ir import dialect
from llmopt.ir import graph as g
from llmopt.ir.program import Facts, Program
from llmopt.ir.weights import Leaf

TEXT: Final = (".ir", ".onnxtxt", ".onnxtext")
"""Suffixes of text."""
ELIDED: Final = "elided"
"""Location of weights whose values a text omits."""
LIMIT: Final = 512  # tokens: a file has no limit
_HEAD: Final = f'<ir_version: {dialect.IR_VERSION}, opset_import: ["" : {dialect.OPSET}]> '
_HINT: Final = "`llmopt opt` and `llmopt diff` take ONNX files and their text"
_CACHE: Final = re.compile(r"(past|present)(?:_key_values)?\.(\d+)\.(key|value)")
_UNREADABLE: Final = (
    onnx.parser.ParseError,
    onnx.checker.ValidationError,
    onnx.shape_inference.InferenceError,
)
ROLES: Final = {
    "input_ids": Role.TOKENS,
    "attention_mask": Role.MASK,
    "position_ids": Role.POSITIONS,
    "token_type_ids": Role.TOKEN_TYPES,
    "logits_to_keep": Role.LOGITS_TO_KEEP,
    "pixel_values": Role.PIXELS,
    "image_features": Role.IMAGE_FEATURES,
    "inputs_embeds": Role.EMBEDS,
    "logits": Role.LOGITS,
    "last_hidden_state": Role.HIDDEN,
    "sentence_embedding": Role.EMBEDDING,
}
"""Roles of inputs and outputs by their usual names; caches excepted."""


def open_program(path: Path) -> Program:
    """Return the Program in a file; roles follow from the names of the dialect.

    Raises:
        SourceNotFoundError: The file does not exist.
        SourceError: The file is damaged, of another opset, or has vendor operators.
    """
    model = read_model(path)
    if problems := dialect.verify(model):
        hint = "`llmopt compile` and `llmopt opt` convert ONNX files that take no KV cache"
        raise SourceError(path, f"not in the dialect: {'; '.join(problems[:3])}", hint)
    inputs = tuple(port(value) for value in model.graph.inputs)
    outputs = tuple(port(value) for value in model.graph.outputs)
    facts = Facts(
        model=ModelFacts(family=path.stem, max_length=LIMIT), source=SourceRecord(path.stem, "onnx")
    )
    return Program(model, Signature(inputs, outputs), facts)


def read_model(path: Path) -> ir.Model:
    """Return the model in an ONNX file or its text, weights unread.

    Raises:
        SourceNotFoundError: The file does not exist.
        SourceError: The file is damaged.
    """
    if not path.is_file():
        raise SourceNotFoundError(path, _HINT)
    model = _parsed(path) if path.suffix in TEXT else _loaded(path)
    _check_data(path, model)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain == "ai.onnx":
            node.domain = ""
    for index, node in enumerate(model.graph):
        node.name = node.name or f"{node.op_type}_{index}"
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            read = _refusal(path, name) if tensor.location == ELIDED else tensor.numpy
            value.const_value = Leaf(name, read, tensor.dtype, tensor.shape.numpy())
    return model


def port(value: ir.Value) -> Port:
    """Return an input or output with the role that its name implies."""
    name = str(value.name)
    role, layer = ROLES.get(name, Role.OTHER), None
    if match := _CACHE.fullmatch(name):
        role, layer = Role(f"{match[1]}_{match[3]}"), int(match[2])
    dtype = "" if value.dtype is None else str(value.dtype.numpy().name)
    dims = ("?" if str(d).startswith("?") else d for d in g.shape(value) or ())
    return Port(name, role, dtype, tuple(dims), layer)


def _parsed(path: Path) -> ir.Model:
    """Return the model of a text; its header may be omitted."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(path, "not text", "give ONNX files the suffix .onnx") from error
    try:
        proto = onnx.parser.parse_model(text if text.lstrip().startswith("<") else _HEAD + text)
        onnx.checker.check_model(_without_data(proto))
        proto = onnx.shape_inference.infer_shapes(proto, data_prop=True, strict_mode=True)
    except _UNREADABLE as error:
        message = error.args[0].decode() if isinstance(error.args[0], bytes) else str(error)
        problem = " ".join(message.replace("b'", "").split())[:300]
        raise SourceError(path, f"not the text of a model ({problem})", "correct the text") from (
            error
        )
    model = ir.from_proto(proto)
    ir.external_data.set_base_dir(model.graph, path.parent)
    return model


def _without_data(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model with external weights as inputs: the checker would open their files."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for tensor in list(copy.graph.initializer):
        if tensor.external_data:
            known = {value.name for value in copy.graph.input}
            if tensor.name not in known:
                info = onnx.helper.make_tensor_value_info(
                    tensor.name, tensor.data_type, list(tensor.dims)
                )
                copy.graph.input.append(info)
            copy.graph.initializer.remove(tensor)
    return copy


def _loaded(path: Path) -> ir.Model:
    try:
        model = ir.load(path)
    except (DecodeError, ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        line = str(error).partition("\n")[0][:160]
        raise SourceError(path, f"not an ONNX model ({line})", "export or copy it again") from error
    if len(model.graph) == 0 or not model.graph.outputs:
        raise SourceError(path, "an ONNX model without nodes or outputs", "export or copy it again")
    return model


def _check_data(path: Path, model: ir.Model) -> None:
    """Check that every file of weights exists and is long enough.

    Raises:
        SourceError: A file is missing or truncated.
    """
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and tensor.location != ELIDED:
            file = path.parent / tensor.location
            size = file.stat().st_size if file.is_file() else 0
            if (tensor.offset or 0) + tensor.nbytes > size:
                problem = f"the data of weight {name!r} is missing from {tensor.location}"
                raise SourceError(path, problem, "copy both files again")


def _refusal(path: Path, name: str) -> Callable[[], Array]:
    def read() -> NoReturn:
        problem = f"this text omits the values of {name!r}"
        raise SourceError(path, problem, "run on the .onnx file, or on text written with -o")

    return read
