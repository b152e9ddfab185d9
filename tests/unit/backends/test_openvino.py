"""The provider of onnxruntime-cpu: asked for or measured, and never another without a word."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import onnxruntime
import pytest
from support.programs import program
from support.tiny_artifacts import TinyEncoder, rewrite_manifest
from support.tiny_decoder import tiny_decoder

from llmopt.backends import find_backend
from llmopt.backends.base import Demand
from llmopt.backends.onnxruntime import OnnxRuntimeCpu, openvino
from llmopt.errors import BackendUnavailableError, UnknownNameError, UnsupportedModelError
from llmopt.ir.program import Program
from llmopt.runtime import load
from llmopt.runtime.engines import providers
from llmopt.runtime.engines.providers import (
    CUDA,
    OPENVINO,
    Provider,
    left_behind,
    provider_of,
    start,
)

ENCODER: Final = """main (float[B,S,8] x) => (float[B,S,8] y) <float[8] w = {1,2,3,4,5,6,7,8}>
{
   a = LayerNormalization (x, w)
   y = Add (x, a)
}"""


def encoder() -> Program:
    return program(ENCODER)


def written(backend: OnnxRuntimeCpu, folder: Path) -> Any:
    return backend.write(encoder(), folder, Demand())


def test_the_provider_is_one_of_three() -> None:
    assert find_backend("cpu{ep=cpu}") == find_backend("cpu")
    assert find_backend("cpu{ep=auto}").target == "onnxruntime-cpu{ep=auto}"
    with pytest.raises(UnknownNameError, match="did you mean 'openvino'"):
        find_backend("cpu{ep=openvin}")


def test_openvino_is_for_encoders() -> None:
    with pytest.raises(UnsupportedModelError, match="does not write a cache in place"):
        find_backend("cpu{ep=openvino}").resolved(tiny_decoder(), None)
    assert find_backend("cpu{ep=openvino}").resolved(encoder(), None)[1] == ()
    assert openvino._faster(Path(), tiny_decoder())[0] == "cpu"


def test_what_it_was_proven_with_is_required(tmp_path: Path) -> None:
    assert written(OnnxRuntimeCpu(ep="openvino"), tmp_path).requires == {"ep": "openvino"}
    assert written(OnnxRuntimeCpu(), tmp_path).requires == {}


def test_an_absent_plugin_is_an_error_with_the_line_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_ep_devices", list)
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_openvino", None)
    backend = OnnxRuntimeCpu(ep="openvino")
    lowered = written(backend, tmp_path)

    with pytest.raises(BackendUnavailableError, match=r"pip install 'llmopt\[openvino\]'"):
        backend.open(tmp_path / lowered.entry)


def test_auto_falls_to_the_processor_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_openvino", None)
    monkeypatch.setattr(onnxruntime, "get_ep_devices", list)
    backend = OnnxRuntimeCpu(ep="auto")

    lowered = written(backend, tmp_path)

    assert lowered.requires == {"ep": "cpu"}
    assert "ep=auto: cpu, because onnxruntime_ep_openvino cannot be loaded" in lowered.notes[0]
    x = np.ones((1, 2, 8), np.float32)
    assert backend.open(tmp_path / lowered.entry)({"x": x})["y"].shape == (1, 2, 8)


@pytest.mark.parametrize(("seconds", "ep"), [(0.5, "openvino"), (0.99, "cpu"), (2.0, "cpu")])
def test_auto_takes_the_faster_and_opens_that(
    seconds: float, ep: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Provider] = []

    def open_session(
        _: Path, *, provider: Provider, **__: object
    ) -> Callable[[Mapping[str, Any]], Any]:
        opened.append(provider)
        return lambda _: {"took": seconds if provider.provider == OPENVINO else 1.0}

    monkeypatch.setattr(openvino, "open_session", open_session)
    monkeypatch.setattr("llmopt.backends.onnxruntime.open_session", open_session)
    monkeypatch.setattr(openvino, "_seconds", lambda run, batch: run(batch)["took"])
    backend = OnnxRuntimeCpu(ep="auto")

    lowered = written(backend, tmp_path)
    backend.open(tmp_path / lowered.entry)

    assert lowered.requires == {"ep": ep}
    assert openvino.chosen(tmp_path / lowered.entry) == ep
    assert opened[-1].provider == (OPENVINO if ep == "openvino" else "CPUExecutionProvider")


def test_time_is_taken_of_a_run() -> None:
    assert openvino._seconds(dict, {}) >= 0


def test_an_artifact_says_where_it_runs() -> None:
    assert provider_of("onnxruntime-cpu", {}, 1) == Provider()
    assert provider_of("onnxruntime-cpu{ep=auto}", {"ep": "cpu"}, 1) == Provider()
    found = provider_of("onnxruntime-cpu{ep=auto}", {"ep": "openvino"}, 3)
    assert (found.provider, found.exclusive) == (OPENVINO, True)
    assert '"INFERENCE_NUM_THREADS": "3"' in found.settings["load_config"]
    gpu = provider_of("onnxruntime-cuda{graph=true,dtype=bfloat16}", {}, 1)
    assert (gpu.provider, gpu.device, gpu.captures) == (CUDA, "cuda", True)
    assert not provider_of("onnxruntime-cuda", {}, 1).captures


def test_an_artifact_of_a_provider_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    artifact = TinyEncoder().write(tmp_path / "a")
    rewrite_manifest(artifact, requires={"ep": "other"})

    with pytest.raises(BackendUnavailableError, match="provider 'other'") as caught:
        load(artifact)
    assert caught.value.exit_code == 3


class FakeRuntime:
    """An onnxruntime whose provider takes some of the nodes."""

    def __init__(self, ran: str, nodes: Mapping[str, list[str]], known: str = OPENVINO) -> None:
        self.ran, self.nodes, self.known = ran, nodes, known
        self.loaded: list[str] = []
        failure = type("Fail", (Exception,), {})
        self.capi = SimpleNamespace(onnxruntime_pybind11_state=SimpleNamespace(Fail=failure))

    def get_available_providers(self) -> list[str]:
        """Return those compiled in."""
        return ["CPUExecutionProvider"]

    def get_ep_devices(self) -> list[Any]:
        """Return the one device of the plugin."""
        return [SimpleNamespace(ep_name=self.known)]

    def preload_dlls(self) -> None:
        """Note that libraries were asked for."""
        self.loaded.append("cuda")

    def SessionOptions(self) -> Any:  # noqa: N802 - as onnxruntime spells it
        """Return options that take anything."""
        return SimpleNamespace(
            add_session_config_entry=lambda *_: None, add_provider_for_devices=lambda *_: None
        )

    def InferenceSession(self, *_: Any, **__: Any) -> Any:  # noqa: N802 - as above
        """Return a session whose nodes were divided."""
        parts = [
            SimpleNamespace(
                ep_name=name,
                get_nodes=lambda ops=ops: [SimpleNamespace(op_type=op) for op in ops],
            )
            for name, ops in self.nodes.items()
        ]
        return SimpleNamespace(
            get_providers=lambda: [self.ran], get_provider_graph_assignment_info=lambda: parts
        )


def test_nodes_left_to_the_processor_are_an_error() -> None:
    fake = FakeRuntime(OPENVINO, {OPENVINO: ["MatMul"], "CPUExecutionProvider": ["Erf", "Erf"]})
    session = fake.InferenceSession()
    assert left_behind(session, OPENVINO) == Counter({"Erf": 2})

    with pytest.raises(BackendUnavailableError, match="it left nodes to the processor: 2 Erf"):
        start(fake, b"", fake.SessionOptions(), providers.openvino(1))

    whole = FakeRuntime(OPENVINO, {OPENVINO: ["MatMul"]})
    assert start(whole, b"", whole.SessionOptions(), providers.openvino(1)) is not None


def test_a_provider_that_does_not_start_says_what_it_needs() -> None:
    fake = FakeRuntime("CPUExecutionProvider", {}, known=CUDA)

    with pytest.raises(BackendUnavailableError, match="did not start: pip uninstall onnxruntime"):
        start(fake, b"", fake.SessionOptions(), Provider(CUDA, "cuda"))
    assert fake.loaded == ["cuda"]


def test_openvino_computes_the_same_where_it_is(tmp_path: Path) -> None:
    backend = OnnxRuntimeCpu(ep="openvino")
    lowered = written(backend, tmp_path)
    try:
        run = backend.open(tmp_path / lowered.entry)
    except BackendUnavailableError as error:
        pytest.skip(f"needs OpenVINO's provider: {error.reason}")
    x = np.random.default_rng(0).standard_normal((3, 5, 8)).astype(np.float32)

    found = run({"x": x})["y"]

    wanted = OnnxRuntimeCpu().open(tmp_path / lowered.entry)({"x": x})["y"]
    assert np.abs(found - wanted).max() < 1e-5
