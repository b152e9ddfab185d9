"""Building an engine from a typed network and its recipe, with TensorRT or TensorRT-RTX.

Both packages have one API. TensorRT-RTX builds for the GPUs in its options, on a machine without
one; TensorRT builds for the GPU of the machine.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from llmopt.errors import ArtifactError, BackendUnavailableError, LlmoptError
from llmopt.runtime.engines.tensorrt_recipe import EngineRecipe, Profile

MODULES: Final[dict[str, tuple[str, ...]]] = {
    "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
    "tensorrt": ("tensorrt",),
}
INSTALL: Final = {
    "tensorrt_rtx": "pip install 'llmopt[tensorrt-rtx]'",
    "tensorrt": "pip install tensorrt, on a machine with the GPU",
}
CAPABILITIES: Final = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""What TensorRT-RTX builds for ahead of time."""


@dataclass(frozen=True)
class Built:
    """An engine, fresh from the builder.

    Args:
        engine: Serialized engine.
        layers: Description of each layer by the engine's inspector, one a line.
    """

    engine: bytes
    layers: tuple[str, ...]


def import_tensorrt(package: str, backend: str) -> Any:
    """Return the Python module of TensorRT.

    Raises:
        BackendUnavailableError: It is not installed, or its libraries cannot be loaded.
    """
    for name in MODULES[package]:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        except (ImportError, OSError, RuntimeError) as error:
            raise BackendUnavailableError(backend, f"{name} cannot be loaded: {error}") from error
    raise BackendUnavailableError(backend, f"{package} is not installed; {INSTALL[package]}")


def build_engine(trt: Any, network: Path, recipe: EngineRecipe, capability: str | None) -> Built:
    """Return the engine of a typed network.

    Args:
        trt: TensorRT's module.
        network: The ONNX file; its weights are beside it.
        recipe: Profiles.
        capability: ``"8.9"`` to build ahead of time; None for the GPU of this machine.

    Raises:
        ArtifactError: The parser does not take the network.
        LlmoptError: The builder fails.
    """
    heard: list[tuple[int, str]] = []
    logger = _logger(trt, heard)
    builder = _builder(trt, logger)
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    definition = builder.create_network(typed)
    parse(trt, definition, logger, network)
    _allow_decomposition(trt, definition)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if capability is not None:
        config.num_compute_capabilities = 1
        chosen = getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}")
        config.set_compute_capability(chosen, 0)
    for profile in recipe.profiles:
        config.add_optimization_profile(_profile(builder, definition, profile))
    built = builder.build_serialized_network(definition, config)
    if built is None:
        raise LlmoptError(f"TensorRT could not build the engine: {_complaints(heard)}")
    return Built(bytes(built), tuple(_layers(message for _, message in heard)))


def parse(trt: Any, definition: Any, logger: Any, network: Path) -> None:
    """Read an ONNX file into a network definition.

    Raises:
        ArtifactError: The parser refuses it; the message names every node.
    """
    parser = trt.OnnxParser(definition, logger)
    if parser.parse_from_file(str(network)):
        return
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    lines = [f"{e.node_name() or 'the network'}: {_first_line(e.desc())}" for e in errors]
    told = dict.fromkeys(lines)
    raise ArtifactError(network, f"TensorRT's parser does not take it: {'; '.join(told)}")


def _allow_decomposition(trt: Any, definition: Any) -> None:
    """Let an attention that has no kernel of its own be several layers, not an error."""
    for index in range(definition.num_layers):
        layer = definition.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings give the base class
            layer.attention.decomposable = True


def _builder(trt: Any, logger: Any) -> Any:
    try:
        return trt.Builder(logger)
    except (RuntimeError, TypeError) as error:  # TensorRT without a GPU
        problem = f"it cannot start a builder on this machine: {_first_line(str(error))}"
        raise BackendUnavailableError("tensorrt", problem) from error


def _profile(builder: Any, definition: Any, profile: Profile) -> Any:
    made = builder.create_optimization_profile()
    for index in range(definition.num_inputs):
        name = definition.get_input(index).name
        if (bounds := profile.shapes.get(name)) is not None:
            made.set_shape(name, bounds.least, bounds.best, bounds.most)
        if (values := profile.values.get(name)) is not None:
            made.set_shape_input(name, values.least, values.best, values.most)
    return made


def _logger(trt: Any, heard: list[tuple[int, str]]) -> Any:
    """Return a logger that keeps what it hears; the most talkative, which tells the layers."""

    class Listener(trt.ILogger):  # type: ignore[misc]  # known when it is imported
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            heard.append((int(severity), message))

    return Listener()


def _layers(messages: Any) -> list[str]:
    """Return the lines of the layer table that the builder tells at its most talkative."""
    for message in messages:
        head, found, rest = message.partition("Layers:\n")
        if found and not head.strip():
            lines: list[str] = rest.partition("\n\n")[0].splitlines()
            return [line for line in lines if line.startswith("Name: ")]
    return []


_ERROR: Final = 1


def _complaints(heard: Sequence[tuple[int, str]]) -> str:
    worst = [_first_line(message) for severity, message in heard if severity <= _ERROR]
    return "; ".join(dict.fromkeys(worst)) or "it gave no reason"


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
