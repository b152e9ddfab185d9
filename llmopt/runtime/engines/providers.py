"""Where ONNX Runtime runs a model, and making sure that it does.

ONNX Runtime leaves to the processor what a provider does not take, and prints a warning at most.
Here a provider that is asked for and does not start is an error, and so is a node that it leaves.
"""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from llmopt import spelling
from llmopt.errors import BackendUnavailableError

CPU: Final = "CPUExecutionProvider"
CUDA: Final = "CUDAExecutionProvider"
OPENVINO: Final = "OpenVINOExecutionProvider"
_RECORD: Final = "session.record_ep_graph_assignment_info"
_INSTALL: Final[Mapping[str, str]] = {
    CUDA: "pip uninstall onnxruntime; pip install onnxruntime-gpu, on a machine with an NVIDIA "
    "driver, CUDA and cuDNN",
    OPENVINO: "it needs an Intel processor and: pip install 'llmopt[openvino]'",
}


@dataclass(frozen=True)
class Provider:
    """An execution provider and its options.

    Args:
        provider: ONNX Runtime's name of it.
        device: Device of its memory: ``"cpu"`` or ``"cuda"``.
        settings: Options of the provider.
        plugin: The package that brings it, where it is not part of onnxruntime.
        exclusive: Whether it has to take every node.
    """

    provider: str = CPU
    device: str = "cpu"
    settings: Mapping[str, str] = field(default_factory=dict)
    plugin: str = ""
    exclusive: bool = False

    @property
    def captures(self) -> bool:
        """Whether steps of one token are recorded once and played back."""
        return self.settings.get("enable_cuda_graph") == "1"


def provider_of(target: str, requires: Mapping[str, Any], threads: int) -> Provider:
    """Return where an artifact runs.

    Args:
        target: Target as text, options included.
        requires: Requirements in the manifest: ``ep``, the provider that verified the artifact.
        threads: Threads inside one operator.

    Raises:
        BackendUnavailableError: nothing here knows the provider.
    """
    name, options = spelling.written(target)
    if name == "onnxruntime-cuda":
        graph = "1" if options.get("graph") == "true" else "0"
        return Provider(CUDA, "cuda", {"enable_cuda_graph": graph})
    match requires.get("ep", "cpu"):
        case "cpu":
            return Provider()
        case "openvino":
            return openvino(threads)
        case other:
            raise BackendUnavailableError(name, f"it needs the provider {other!r}; update llmopt")


def openvino(threads: int, precision: str = "f32") -> Provider:
    """Return OpenVINO's processor.

    Args:
        threads: Threads inside one operator.
        precision: Precision of its arithmetic: ``"f32"`` or ``"bf16"``.
    """
    told = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": str(threads),
        "NUM_STREAMS": "1",
    }
    settings = {"load_config": json.dumps({"CPU": told})}
    return Provider(OPENVINO, "cpu", settings, "onnxruntime_ep_openvino", exclusive=True)


def start(ort: Any, model: str | Path | bytes, options: Any, provider: Provider) -> Any:
    """Return a session of ``model`` that runs at ``provider``.

    Args:
        ort: The package ``onnxruntime``.
        model: A file, or the model itself.
        options: Options of the session; the provider is added to them.
        provider: Provider to run on.

    Raises:
        BackendUnavailableError: the provider is not here, does not start, or leaves nodes.
    """
    if provider.device == "cuda" and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # finds CUDA in Python packages, and says nothing where there is none
    providers = _register(ort, options, provider)
    if provider.exclusive:
        options.add_session_config_entry(_RECORD, "1")
    source = model if isinstance(model, bytes) else str(model)
    session = ort.InferenceSession(source, options, providers=providers, enable_fallback=0)
    if session.get_providers()[0] != provider.provider:  # it falls back without a word
        reason = f"{provider.provider} did not start"
        if provider.provider in _INSTALL:
            reason += f": {_INSTALL[provider.provider]}"
        raise BackendUnavailableError("onnxruntime", reason)
    if provider.exclusive and (left := left_behind(session, provider.provider)):
        words = ", ".join(f"{count} {name}" for name, count in left.most_common(4))
        raise BackendUnavailableError(provider.provider, f"it left nodes to the processor: {words}")
    return session


def left_behind(session: Any, provider: str) -> Counter[str]:
    """Return how many nodes of which operator run elsewhere than at ``provider``."""
    return Counter(
        node.op_type
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != provider
        for node in part.get_nodes()
    )


def _register(ort: Any, options: Any, provider: Provider) -> list[Any] | None:
    """Make the provider known, and return the list of providers, None where options hold it."""
    if provider.plugin:
        _load_plugin(ort, provider)
    elif provider.provider in ort.get_available_providers():
        return (
            [(provider.provider, dict(provider.settings)), CPU]
            if provider.settings
            else [provider.provider]
        )
    devices = [d for d in ort.get_ep_devices() if d.ep_name == provider.provider]
    if not devices:
        have = ", ".join(ort.get_available_providers())
        problem = f"onnxruntime has no {provider.provider}, only {have}"
        install = _INSTALL.get(provider.provider, "pip install 'llmopt[runtime]'")
        raise BackendUnavailableError("onnxruntime", f"{problem}; {install}")
    options.add_provider_for_devices(devices[:1], dict(provider.settings))
    return None


def _load_plugin(ort: Any, provider: Provider) -> None:
    if any(device.ep_name == provider.provider for device in ort.get_ep_devices()):
        return
    failure: type[Exception] = ort.capi.onnxruntime_pybind11_state.Fail
    try:
        package = importlib.import_module(provider.plugin)
        ort.register_execution_provider_library(provider.plugin, package.get_library_path())
    except (ImportError, OSError, failure) as error:
        if "already registered" in str(error):
            return  # it is known, and found no device
        reason = f"{provider.plugin} cannot be loaded ({error}); {_INSTALL[provider.provider]}"
        raise BackendUnavailableError(provider.provider, reason) from error
