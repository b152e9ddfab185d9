"""A cache on a device: the same tokens as the cache on the host, captured or not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.tiny_decoder import VOCABULARY, tiny_decoder

from llmopt.artifact.manifest import Manifest
from llmopt.backends.onnxruntime.artifact import write_model
from llmopt.backends.onnxruntime.compact_rows import CompactRows
from llmopt.backends.onnxruntime.lower_attention import LowerAttention
from llmopt.interface.arrays import Array
from llmopt.interface.stepping import Sequences, Stepper
from llmopt.passes.pipeline import Pipeline
from llmopt.runtime import load
from llmopt.runtime.engines.onnxruntime import OnnxRuntimeSession, SharedCache
from llmopt.runtime.engines.onnxruntime_device import OnnxRuntimeCache
from llmopt.runtime.engines.providers import Provider

CAPTURED = Provider(settings={"enable_cuda_graph": "1"})  # of the processor, which ignores it


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder as CUDA gets it, in float32, so that the processor runs it."""
    folder = tmp_path_factory.mktemp("device") / "a"
    folder.mkdir()
    low = Pipeline((CompactRows(), LowerAttention(bias=False))).run(tiny_decoder(keep=True))
    lowered = write_model(low, folder)
    manifest = Manifest(
        target="onnxruntime-cpu",
        entry=lowered.entry,
        task="generate",
        signature=low.signature,
        model=replace(low.facts.model, cache="shared"),
    )
    manifest.with_files(folder).write(folder)
    return folder


def opened(artifact: Path) -> OnnxRuntimeSession:
    session = load(artifact, threads=1).session
    assert isinstance(session, OnnxRuntimeSession)
    return session


def decode(session: OnnxRuntimeSession, stepper: Stepper) -> list[Array]:
    """Prefill a batch padded on the left, then three steps of one token."""
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (3, 9))
    mask = np.ones((3, 6), np.int64)
    mask[1, :2] = mask[2, :4] = 0
    sequences = Sequences(session, 3, 12)
    sequences._stepper = stepper
    found = [sequences.extend(ids[:, :6], mask).copy()]
    found += [sequences.extend(ids[:, at : at + 1]).copy() for at in (6, 7, 8)]
    return found


@pytest.mark.parametrize("place", [Provider(), CAPTURED], ids=["plain", "captured"])
def test_the_steps_are_those_of_the_cache_on_the_host(artifact: Path, place: Provider) -> None:
    session = opened(artifact)
    wanted = decode(session, SharedCache(session, 3, 12))
    session.place = place

    found = decode(session, OnnxRuntimeCache(session, 3, 12))

    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.shape == theirs.shape
        assert np.abs(mine - theirs).max() < 1e-5 * np.abs(theirs).max()


def test_buffers_of_a_captured_step_stay_where_they_are(artifact: Path) -> None:
    session = opened(artifact)
    session.place = CAPTURED
    cache = OnnxRuntimeCache(session, 3, 12)

    decode(session, cache)

    fixed = cache._fixed
    assert fixed is not None
    assert set(fixed.inputs) == {"input_ids", "attention_mask", "position_ids"}
    assert fixed.inputs["attention_mask"].shape() == [3, 12]
    assert fixed.options.get_run_config_entry("gpu_graph_id") != "-1"
    assert session.run_options().get_run_config_entry("gpu_graph_id") == "-1"


def test_a_session_for_a_device_keeps_its_cache_there(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, asked = opened(artifact), list[str]()
    assert isinstance(session.stepper(1, 8), SharedCache)

    def buffer(shape: list[int], dtype: str) -> object:
        asked.append(session.place.device)
        return session.value(np.zeros(shape, dtype))

    session.place = replace(session.place, device="cuda")
    monkeypatch.setattr(session, "buffer", buffer)

    assert isinstance(session.stepper(1, 8), OnnxRuntimeCache)
    assert asked == ["cuda", "cuda"]


def test_a_captured_graph_is_released_with_its_buffers(artifact: Path) -> None:
    session = opened(artifact)
    session.place = CAPTURED
    released: list[int] = []
    inner = session._session
    session._session = SimpleNamespace(
        io_binding=inner.io_binding,
        run_with_iobinding=inner.run_with_iobinding,
        release_captured_graph=released.append,
    )
    cache = OnnxRuntimeCache(session, 3, 12)
    decode(session, cache)

    cache._fixed = None

    assert len(released) == 1
    session._session = inner
    session.release(released[0])


def test_bfloat16_which_numpy_lacks_has_buffers_too(artifact: Path) -> None:
    session = opened(artifact)

    assert session.buffer([2, 3], "bfloat16").element_type() == 16
    assert session.empty([2, 0, 3], "bfloat16").shape() == [2, 0, 3]
    assert session.empty([2, 0, 3], "float16").data_type() == "tensor(float16)"
