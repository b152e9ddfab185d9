"""An engine of TensorRT runs through its session: here on a device of numpy arrays.

No GPU is needed: a fake driver keeps memory in numpy arrays, and a fake TensorRT runs the
artifact's typed network in onnxruntime, with exactly the memory, shapes and profiles that the
session sets.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from support.programs import bound

from llmopt.artifact.manifest import Manifest
from llmopt.backends import find_backend
from llmopt.backends.base import Demand
from llmopt.backends.tensorrt.legalize_attention import LegalizeAttention
from llmopt.errors import ArtifactError, BackendUnavailableError, LlmoptError
from llmopt.interface.facts import ModelFacts
from llmopt.interface.stepping import Sequences
from llmopt.ir.program import Program
from llmopt.runtime.engines import tensorrt, tensorrt_cache
from llmopt.runtime.engines.cuda_driver import LIBRARY, Driver
from llmopt.runtime.engines.tensorrt import TensorRtSession
from llmopt.runtime.engines.tensorrt_build import Built
from llmopt.runtime.engines.tensorrt_recipe import GOLDEN, NETWORK, RECIPE, EngineRecipe
from llmopt.runtime.session import open_session

VOCABULARY, HIDDEN, LENGTH = 11, 32, 24
DECODER = """main (int64[B,S] input_ids, int64[B,T] attention_mask, float[B,2,P,16] past_key,
 float[B,2,P,16] past_value, float[11,32] table, float[32,32] wq)
=> (float[B,S,11] logits, float[B,2,T,16] present_key, float[B,2,T,16] present_value)
<int64[2] i12 = {1,2}>
{ x = Gather (table, input_ids)
  real2 = Cast <to = 9> (attention_mask)
  [padding_mask] real = Unsqueeze (real2, i12)
  q = MatMul (x, wq)
  y, present_key, present_value = Attention
     <q_num_heads = 2, kv_num_heads = 2, is_causal = 1> (q, x, x, real, past_key, past_value)
  turned = Transpose <perm = [1, 0]> (table)
  logits = MatMul (y, turned) }"""


class FakeDriver(Driver):
    """Memory of numpy arrays, by address."""

    def __init__(self, backend: str, ordinal: int = 0) -> None:
        del backend, ordinal
        self.arrays: dict[int, Any] = {}
        self._stream = ctypes.c_void_p()

    @property
    def name(self) -> str:
        """A GPU of the imagination."""
        return "NumPy 4090"

    @property
    def version(self) -> int:
        """CUDA's."""
        return 13010

    @property
    def capability(self) -> str:
        """That of Ada."""
        return "8.9"

    @property
    def stream(self) -> int:
        """None."""
        return 0

    def _call(self, name: str, *arguments: Any) -> None:
        if name == "cuMemAlloc_v2":
            pointer, size = arguments[0]._obj, arguments[1].value
            array = np.full(size, 255, np.uint8)  # what nobody has written
            self.arrays[array.ctypes.data] = array
            pointer.value = array.ctypes.data
        elif name == "cuMemsetD8_v2":
            self.arrays[arguments[0].value][: arguments[2].value] = 0
        elif name == "cuMemFree_v2":
            del self.arrays[arguments[0].value]
        elif name == "cuMemcpyHtoD_v2":
            ctypes.memmove(arguments[0].value, arguments[1], arguments[2].value)
        elif name == "cuMemcpyDtoH_v2":
            ctypes.memmove(arguments[0], arguments[1].value, arguments[2].value)


class FakeContext:
    """Runs the network on whatever the addresses point to."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.profile = -1

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        """Note it."""
        self.profile = index
        return stream == 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """Check it against the profile."""
        bounds = self.engine.recipe.profiles[self.profile].shapes[name]
        assert bounds.holds(tuple(shape)), (name, shape, self.profile)
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        """Note it."""
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """Work it out."""
        batch, tokens = self.shapes["input_ids"]
        sizes = {"B": batch, "S": tokens, "K": tokens}
        return tuple(d if isinstance(d, int) else sizes[d] for d in self.engine.outputs[name])

    def execute_async_v3(self, stream: int) -> bool:
        """Copy in, run, copy out."""
        session = self.engine.session
        feeds = {}
        for value in session.get_inputs():
            dtype = np.int64 if "int64" in value.type else np.float32
            size = int(np.prod(self.shapes[value.name])) * np.dtype(dtype).itemsize
            raw = ctypes.string_at(self.addresses[value.name], size)
            feeds[value.name] = np.frombuffer(raw, dtype).reshape(self.shapes[value.name])
        names = [output.name for output in session.get_outputs()]
        for name, array in zip(names, session.run(names, feeds), strict=True):
            held = np.ascontiguousarray(array)
            ctypes.memmove(self.addresses[name], held.ctypes.data, held.nbytes)
        return stream == 0


class FakeEngine:
    """A typed network that calls itself an engine."""

    def __init__(self, folder: Path) -> None:
        self.recipe = EngineRecipe.load(folder / RECIPE)
        self.session = ort.InferenceSession(folder / NETWORK)
        proto = onnx.load(folder / NETWORK)
        self.inputs = [value.name for value in proto.graph.input]
        self.outputs = {
            value.name: [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim]
            for value in proto.graph.output
        }
        self.num_io_tensors = len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, index: int) -> str:
        """Inputs first."""
        return str([*self.inputs, *self.outputs][index])

    def get_tensor_mode(self, name: str) -> str:
        """Which it is."""
        return "input" if name in self.inputs else "output"

    def get_tensor_location(self, name: str) -> str:
        """All are on the device."""
        return "device" if name else "host"

    def create_execution_context(self) -> FakeContext:
        """A fresh one."""
        return FakeContext(self)


class FakeLogger:
    """Says nothing."""

    ERROR = 1

    def __init__(self, level: int) -> None:
        assert level == self.ERROR


def fake_tensorrt(folder: Path) -> Any:
    engine = FakeEngine(folder)
    runtime = SimpleNamespace(
        deserialize_cuda_engine=lambda content: engine if content == b"engine" else None
    )
    return SimpleNamespace(
        __version__="1.7.1.116",
        Logger=FakeLogger,
        Runtime=lambda _: runtime,
        TensorLocation=SimpleNamespace(HOST="host"),
        TensorIOMode=SimpleNamespace(INPUT="input"),
    )


def decoder() -> Program:
    rng = np.random.default_rng(0)
    arrays = {"table": rng.normal(size=(11, 32)), "wq": rng.normal(size=(32, 32))}
    made = bound(DECODER, {n: a.astype(np.float32) for n, a in arrays.items()})
    made.learn(
        model=ModelFacts(max_length=LENGTH, vocabulary=VOCABULARY, cache="shared"), task="generate"
    )
    return made


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny decoder with an engine for compute capability 8.9, which is none."""
    folder = tmp_path_factory.mktemp("artifact")
    made = decoder()
    LegalizeAttention().run(made)
    backend = find_backend("tensorrt{chunk=4}")
    lowered = backend.write(made, folder, Demand(3, defer_engine=True))
    recipe = dataclasses.replace(EngineRecipe.load(folder / RECIPE), capabilities=("8.9",))
    (folder / RECIPE).write_text(recipe.to_json())
    (folder / "model.sm89.engine").write_bytes(b"engine")
    manifest = Manifest(
        target="tensorrt-rtx{sm=89}",
        entry=lowered.entry,
        task="generate",
        signature=made.signature,
        model=made.facts.model,
        requires={**lowered.requires, "tensorrt": "1.7.1.116"},
    )
    manifest.with_files(folder).write(folder)
    return folder


@pytest.fixture
def session(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> TensorRtSession:
    return opened(artifact, monkeypatch)


def opened(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> TensorRtSession:
    trt = fake_tensorrt(artifact)
    monkeypatch.setattr(tensorrt, "Driver", FakeDriver)
    monkeypatch.setattr(tensorrt, "import_tensorrt", lambda *_: trt)
    return TensorRtSession(artifact, Manifest.read(artifact))


def logits(tokens: Any, mask: Any) -> Any:
    """Return what the decoder computes, in numpy."""
    rng = np.random.default_rng(0)
    table, wq = (rng.normal(size=s).astype(np.float32) for s in ((11, 32), (32, 32)))
    x = table[tokens]
    q, k = ((a.reshape(*a.shape[:2], 2, 16).swapaxes(1, 2)) for a in (x @ wq, x))
    scores = q @ k.swapaxes(-1, -2) / 4.0
    length = tokens.shape[1]
    seen = np.tril(np.ones((length, length), bool))[None, None] & (mask == 1)[:, None, None]
    scores = np.where(seen, scores, -1e9)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = weights / weights.sum(-1, keepdims=True) @ k
    return mixed.swapaxes(1, 2).reshape(*tokens.shape, 32) @ table.T


def test_prompts_in_chunks_and_steps_equal_one_full_pass(session: TensorRtSession) -> None:
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (2, 12))
    mask = np.ones_like(tokens)
    mask[1, :3] = 0
    sequences = Sequences(session, 2, 12)

    parts = [sequences.extend(tokens[:, :9], mask[:, :9], every=True).copy()]
    parts += [sequences.extend(tokens[:, i : i + 1], every=True).copy() for i in range(9, 12)]

    got, want = np.concatenate(parts, 1), logits(tokens, mask)
    assert np.max(np.abs(got - want)[mask == 1]) < 1e-4 * np.max(np.abs(want))


def test_two_decoders_do_not_share_a_cache(session: TensorRtSession) -> None:
    tokens = np.random.default_rng(2).integers(0, VOCABULARY, (1, 6))
    first, second = Sequences(session, 1, 6), Sequences(session, 1, 6)

    first.extend(tokens[:, :4])
    second.extend(tokens[:, ::-1][:, :4])
    got = first.extend(tokens[:, 4:])

    want = logits(tokens, np.ones_like(tokens))[:, -1:]
    assert np.max(np.abs(got - want)) < 1e-4 * np.max(np.abs(want))


@pytest.mark.parametrize(("batch", "capacity"), [(4, 8), (1, LENGTH + 1)])
def test_more_than_the_engine_was_built_for_is_refused(
    session: TensorRtSession, batch: int, capacity: int
) -> None:
    with pytest.raises(LlmoptError, match="larger --batch or --max-length"):
        session.stepper(batch, capacity)


def test_inputs_beyond_every_profile_are_refused_before_the_call(session: TensorRtSession) -> None:
    feeds = {"input_ids": np.zeros((1, 5), np.int64)}

    with pytest.raises(LlmoptError, match=r"'input_ids' of \[1, 5\] exceeds the engine's \[3, 4\]"):
        session.run(feeds)


def changed(artifact: Path, folder: Path, **changes: Any) -> Path:
    """Return a copy of the artifact with a changed recipe or manifest."""
    for path in artifact.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for name, keys in (("manifest.json", ("requires",)), (RECIPE, ("capabilities", "tolerance"))):
        data = json.loads((folder / name).read_text())
        data |= {key: changes[key] for key in keys if key in changes}
        (folder / name).write_text(json.dumps(data))
    return folder


def test_an_engine_for_another_gpu_is_refused(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = changed(artifact, tmp_path, capabilities=["12.0"])

    with pytest.raises(BackendUnavailableError, match=r"12\.0.*NumPy 4090.*8\.9.*sm=89") as caught:
        opened(folder, monkeypatch)
    assert caught.value.exit_code == 3


def test_an_engine_of_another_version_is_refused(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = changed(artifact, tmp_path, requires={"tensorrt": "1.6.0"})

    with pytest.raises(BackendUnavailableError, match=r"1\.6\.0, this is 1\.7\.1\.116"):
        opened(folder, monkeypatch)


def test_a_damaged_engine_is_refused(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = changed(artifact, tmp_path)
    (folder / "model.sm89.engine").write_bytes(b"no engine")
    with pytest.raises(ArtifactError, match="cannot read the engine"):
        opened(folder, monkeypatch)
    (folder / "model.sm89.engine").unlink()
    with pytest.raises(ArtifactError, match="No such file"):
        opened(folder, monkeypatch)


def test_a_deferred_engine_is_built_checked_and_kept(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = changed(artifact, tmp_path, capabilities=[])
    builds: list[Path] = []

    def build(_trt: Any, network: Path, _recipe: EngineRecipe, capability: str | None) -> Built:
        assert capability is None
        builds.append(network)
        return Built(b"engine", ())

    monkeypatch.setattr(tensorrt_cache, "build_engine", build)
    monkeypatch.setenv(tensorrt_cache.VARIABLE, str(tmp_path / "cache"))

    opened(folder, monkeypatch)
    opened(folder, monkeypatch)

    assert builds == [folder / NETWORK]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_an_engine_that_computes_something_else_is_refused(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = changed(artifact, tmp_path, capabilities=[])
    with np.load(folder / GOLDEN) as stored:
        arrays = {name: stored[name] for name in stored.files}
    arrays["out.logits"] = arrays["out.logits"] + 1
    np.savez(folder / GOLDEN, allow_pickle=False, **arrays)
    monkeypatch.setattr(tensorrt_cache, "build_engine", lambda *_: Built(b"engine", ()))
    monkeypatch.setenv(tensorrt_cache.VARIABLE, str(tmp_path / "cache"))

    with pytest.raises(LlmoptError, match="built here is wrong"):
        opened(folder, monkeypatch)


def test_a_cache_that_cannot_be_written_is_told(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = changed(artifact, tmp_path, capabilities=[])
    monkeypatch.setattr(tensorrt_cache, "build_engine", lambda *_: Built(b"engine", ()))
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setenv(tensorrt_cache.VARIABLE, str(tmp_path / "taken" / "cache"))

    with pytest.raises(LlmoptError, match=tensorrt_cache.VARIABLE):
        opened(folder, monkeypatch)


def test_engines_are_kept_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tensorrt_cache.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert tensorrt_cache.cache_folder() == Path("/somewhere/llmopt/engines")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tensorrt_cache.cache_folder() == Path.home() / ".cache/llmopt/engines"


def test_no_driver_is_an_error_that_says_what_to_do(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        pass
    else:
        pytest.skip("there is an NVIDIA driver here")
    folder = changed(artifact, tmp_path, requires={})
    monkeypatch.setattr(tensorrt, "import_tensorrt", lambda *_: fake_tensorrt(artifact))

    with pytest.raises(BackendUnavailableError, match="no NVIDIA driver") as caught:
        open_session(folder, Manifest.read(folder))
    assert caught.value.exit_code == 3


def test_a_driver_without_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        """A driver whose every call fails."""

        def __getattr__(self, name: str) -> Any:
            return lambda *_: 100

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library())

    with pytest.raises(BackendUnavailableError, match="gives no GPU"):
        Driver("tensorrt")


def test_the_driver_tells_what_gpu_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        """A driver of one GPU."""

        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: self.call(name, *arguments)

        def call(self, name: str, *arguments: Any) -> int:
            if name == "cuDeviceGetName":
                arguments[0].value = b"RTX"
            elif name == "cuDriverGetVersion":
                arguments[0]._obj.value = 13000
            elif name == "cuDeviceGetAttribute":
                arguments[0]._obj.value = {75: 12, 76: 1}[arguments[1]]
            elif name == "cuMemAlloc_v2":
                arguments[0]._obj.value = 4096
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library())
    driver = Driver("tensorrt")

    assert (driver.name, driver.version, driver.capability) == ("RTX", 13000, "12.1")
    assert driver.allocate((2, 3), 4).size_bytes == 24
    assert driver.stream == 0
