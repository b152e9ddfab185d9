"""Which variant runs here, and what is said where none does."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmopt.bundle.contents import Contents, Needs, Runtime, Variant
from llmopt.errors import NoVariantError
from llmopt.runtime.variants import Machine, choose, obstacle, usable_memory

ORT = Runtime("onnxruntime", "1.31")
TVM = Runtime("apache-tvm", "0.27", "0.28")
X86 = Needs(ORT, machines=("x86_64", "aarch64"), memory_bytes=10**9)
ARM = Needs(ORT, machines=("aarch64", "x86_64"), memory_bytes=10**9)
TVM_X86 = Needs(TVM, machines=("x86_64",), cpu_features=("avx2", "avx512f"), memory_bytes=10**8)
PC = Machine("x86_64", frozenset({"avx2"}), 4 * 10**9, {"onnxruntime": "1.32.0"})


def bundle(**needs: Needs) -> Contents:
    variants = tuple(Variant(name, name, "generate", each, {}) for name, each in needs.items())
    return Contents("m", variants, ())


def chosen(machine: Machine, **needs: Needs) -> str:
    return choose(bundle(**needs), machine, Path("m.llmopt")).name


def test_what_was_made_for_the_processor_goes_first() -> None:
    both = {"arm": ARM, "x86": X86}
    assert chosen(PC, **both) == "x86"
    assert chosen(replace(PC, architecture="aarch64"), **both) == "arm"
    assert chosen(PC, arm=ARM) == "arm"  # better than nothing


def test_of_equals_the_first_is_taken() -> None:
    assert chosen(PC, one=X86, two=X86) == "one"
    everything = replace(
        PC,
        cpu_features=frozenset({"avx2", "avx512f"}),
        packages={"apache-tvm": "0.27.0", "onnxruntime": "2.0"},
    )
    assert chosen(everything, tvm=TVM_X86, ort=X86) == "tvm"
    assert chosen(everything, ort=X86, tvm=TVM_X86) == "ort"
    assert chosen(PC, tvm=TVM_X86, ort=X86) == "ort"


def test_what_may_not_fit_into_memory_goes_last_and_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    large = replace(X86, memory_bytes=8 * 10**9)
    with caplog.at_level(logging.WARNING, "llmopt"):
        assert chosen(PC, w8=large, w4=X86) == "w4"
        assert caplog.messages == []
        assert chosen(PC, w8=large) == "w8"
        assert caplog.messages == ["w8 may take 8000 MB of memory, and there are 4000"]
        assert chosen(replace(PC, memory_bytes=None), w8=large, w4=X86) == "w8"


@pytest.mark.parametrize(
    ("needs", "machine", "why"),
    [
        (TVM_X86, {"architecture": "aarch64"}, "made for x86_64, and this is aarch64"),
        (TVM_X86, {}, "this processor lacks avx512f"),
        (Needs(device="cuda"), {}, "there is no driver for NVIDIA's GPUs"),
        (X86, {"packages": {}}, "onnxruntime is not installed; pip install 'onnxruntime>=1.31'"),
        (
            X86,
            {"packages": {"onnxruntime": "1.9.1"}},
            "it needs onnxruntime>=1.31, and 1.9.1 is installed",
        ),
        (
            Needs(TVM),
            {"packages": {"apache-tvm": "0.28.0"}},
            "it needs apache-tvm>=0.27,<0.28, and 0.28.0 is installed",
        ),
        (Needs(ORT, plugins=("onnxruntime-ep-openvino",)), {}, "onnxruntime-ep-openvino is not"),
    ],
)
def test_what_is_missing_is_said(needs: Needs, machine: dict[str, Any], why: str) -> None:
    found = obstacle(needs, replace(PC, **machine))
    assert found is not None
    assert why in found


@pytest.mark.parametrize(
    ("needs", "machine"),
    [
        (Needs(), {}),
        (Needs(device="cuda"), {"cuda": True}),
        (X86, {"packages": {"onnxruntime": ""}}),  # built by hand: nobody knows its version
        (X86, {"packages": {"onnxruntime": "1.31.0rc1"}}),
        (Needs(TVM), {"packages": {"apache-tvm": "0.27.9.post1"}}),
    ],
)
def test_what_suits_has_no_obstacle(needs: Needs, machine: dict[str, Any]) -> None:
    assert obstacle(needs, replace(PC, **machine)) is None


def test_where_nothing_runs_every_reason_is_given() -> None:
    with pytest.raises(NoVariantError) as error:
        chosen(replace(PC, packages={}), tvm=TVM_X86, ort=X86)
    assert error.value.exit_code == 3
    assert "m.llmopt: no variant suits this machine: tvm: this processor lacks avx512f; ort: " in (
        str(error.value)
    )


def test_this_machine_has_what_the_tests_run_on() -> None:
    here = Machine.here()
    assert here.architecture in {"x86_64", "aarch64"}
    assert "onnxruntime" in here.packages
    assert here.memory_bytes is not None
    assert here.memory_bytes > 10**8


def test_memory_is_that_of_the_machine_within_the_group_s_limit(tmp_path: Path) -> None:
    assert usable_memory(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:  2000 kB\nMemFree: 1 kB\n")
    assert usable_memory(tmp_path) == 2000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    assert usable_memory(tmp_path) == 2000 * 1024
    (group / "memory.max").write_text("4096\n")
    assert usable_memory(tmp_path) == 4096
