"""PyTorch checkpoints are read without executing anything that they carry."""

import collections
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmopt.errors import PickleRefusedError, SourceError
from llmopt.frontend.huggingface import torch_bin
from llmopt.frontend.huggingface.checkpoint import open_checkpoint

OLD = {"_use_new_zipfile_serialization": False}


class Malicious:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        """Ask for a directory to be made."""
        return os.mkdir, (str(self.trace),)


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {
        "a": torch.randn(3, 4),
        "transposed": torch.randn(4, 6).T,
        "part": torch.randn(10)[2:5],
        "bf16": torch.randn(5).bfloat16(),
        "f8": torch.randn(5).to(torch.float8_e4m3fn),
        "f16": torch.randn(2, 2).half(),
        "ids": torch.arange(4),
        "scalar": torch.tensor(3.0),
    }


@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "old"])
def test_every_tensor_is_read_as_it_was_saved(tmp_path: Path, options: dict[str, bool]) -> None:
    expected = tensors()
    if options:
        del expected["f8"]  # torch itself cannot read this back in its old format
    torch.save(collections.OrderedDict(expected), tmp_path / "pytorch_model.bin", **options)
    opened = open_checkpoint(tmp_path)
    assert set(opened.names()) == set(expected)
    for name, tensor in expected.items():
        assert opened.shape(name) == tuple(tensor.shape)
        assert opened.dtype(name) == str(tensor.dtype).removeprefix("torch.")
        read = opened.read(name)
        assert read.flags.c_contiguous
        np.testing.assert_array_equal(read.astype(np.float64), tensor.double().numpy())


def test_reading_lets_the_mapping_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_bin, "_RELOAD_BYTES", 1000)
    torch.save({str(i): torch.full((200,), float(i)) for i in range(9)}, tmp_path / "m.bin")
    opened = open_checkpoint(tmp_path / "m.bin")
    assert isinstance(opened, torch_bin.TorchBinCheckpoint)
    still_open = []
    for name in opened.names():
        assert opened.read(name)[0] == float(name)
        still_open.append(opened._open is not None)
    assert still_open == [True, False] * 4 + [True]


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "1.bin")
    torch.save({"b": torch.zeros(3)}, tmp_path / "2.bin")
    index = {"weight_map": {"a": "1.bin", "b": "2.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    opened = open_checkpoint(tmp_path)
    assert opened.read("b").tolist() == [0, 0, 0]
    assert opened.read("a").tolist() == [1, 1]
    torch.save({"c": torch.ones(2)}, tmp_path / "1.bin")
    with pytest.raises(SourceError, match="index lists, first 'a'"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("nest", ["state_dict", "model_state_dict", "model"])
def test_a_training_checkpoint_gives_its_weights(tmp_path: Path, nest: str) -> None:
    torch.save({nest: {"a": torch.ones(2)}, "epoch": 3}, tmp_path / "m.pt")
    assert list(open_checkpoint(tmp_path / "m.pt").names()) == ["a"]


@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "old"])
def test_code_in_a_checkpoint_is_refused_and_not_run(
    tmp_path: Path, options: dict[str, bool]
) -> None:
    trace = tmp_path / "executed"
    torch.save({"a": torch.ones(2), "x": Malicious(trace)}, tmp_path / "m.bin", **options)
    with pytest.raises(PickleRefusedError, match=r"posix\.mkdir") as caught:
        open_checkpoint(tmp_path / "m.bin")
    assert "--trust-pickle" in str(caught.value)
    assert not trace.exists()
    open_checkpoint(tmp_path / "m.bin", trust_pickle=True)
    assert trace.exists()  # the payload works: the refusal above was not for lack of it


def test_a_bare_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    for protocol in (2, 4, 5):
        (tmp_path / "m.bin").write_bytes(pickle.dumps(Malicious(trace), protocol))
        with pytest.raises(PickleRefusedError):
            open_checkpoint(tmp_path / "m.bin")
    assert not trace.exists()


def test_a_pickled_module_gives_its_state_only_when_trusted(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 3), tmp_path / "m.pt")
    with pytest.raises(PickleRefusedError, match=r"torch.nn.modules.linear.Linear"):
        open_checkpoint(tmp_path / "m.pt")
    opened = open_checkpoint(tmp_path / "m.pt", trust_pickle=True)
    assert opened.shape("weight") == (3, 2)
    assert opened.read("bias").shape == (3,)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_program_is_told_apart(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 3)), tmp_path / "m.pt")
    with pytest.raises(SourceError, match="TorchScript program"):
        open_checkpoint(tmp_path / "m.pt")


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "old"])
def test_a_truncated_file_is_refused_in_one_line(
    tmp_path: Path, keep: float, options: dict[str, bool]
) -> None:
    torch.save({f"t{i}": torch.ones(50) for i in range(5)}, tmp_path / "m.bin", **options)
    data = (tmp_path / "m.bin").read_bytes()
    (tmp_path / "m.bin").write_bytes(data[: int(len(data) * keep)])
    with pytest.raises((SourceError, PickleRefusedError)) as caught:
        open_checkpoint(tmp_path / "m.bin")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"epoch": 3}, "holds a dict without named tensors"),
        ([torch.ones(2)], "holds a list without named tensors"),
        (torch.ones(2), "holds a Tensor without named tensors"),
        ({"state_dict": {"epoch": 1}}, "without named tensors"),
    ],
)
def test_a_file_without_named_tensors_is_refused(tmp_path: Path, value: Any, problem: str) -> None:
    torch.save(value, tmp_path / "m.bin")
    with pytest.raises(SourceError, match=problem):
        open_checkpoint(tmp_path / "m.bin")


def test_garbage_is_refused_with_and_without_trust(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(b"\x80\x02garbage that is no pickle")
    for trust in (False, True):
        with pytest.raises((SourceError, PickleRefusedError)):
            open_checkpoint(tmp_path / "m.bin", trust_pickle=trust)
    (tmp_path / "m.bin").write_bytes(b"plain words, not a checkpoint")
    with pytest.raises(SourceError, match=r"not a PyTorch checkpoint \(29 bytes"):
        open_checkpoint(tmp_path / "m.bin")


def test_a_file_changed_while_in_use_is_an_error(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "m.bin")
    opened = open_checkpoint(tmp_path / "m.bin")
    torch.save({"b": torch.ones(2)}, tmp_path / "m.bin")
    with pytest.raises(SourceError, match="no longer holds 'a'"):
        opened.read("a")


def test_a_tensor_without_plain_values_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2, device="meta"), "b": torch.ones(1)}, tmp_path / "m.bin")
    opened = open_checkpoint(tmp_path / "m.bin")
    assert opened.read("b").tolist() == [1]
    with pytest.raises(SourceError, match="no numpy equivalent"):
        opened.read("a")
