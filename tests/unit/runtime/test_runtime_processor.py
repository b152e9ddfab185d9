"""What a processor can do is read from where Linux says it."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmopt.runtime import cpu_features as processor


def test_x86_lists_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor : 0\nflags\t\t: fpu avx2 avx512_vnni\n\nflags : other\n")
    monkeypatch.setattr(processor, "CPUINFO", file)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")

    assert processor.processor_features() == {"fpu", "avx2", "avx512_vnni"}
    file.unlink()
    assert processor.processor_features() == frozenset()


@pytest.mark.parametrize(("answer", "left"), [(0, {"avx2", "amx_tile"}), (-1, {"avx2"})])
def test_amx_counts_only_where_linux_allows_its_tiles(
    answer: int, left: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def syscall(*numbers: int) -> int:
        asked.append(numbers)
        return answer

    file = tmp_path / "cpuinfo"
    file.write_text("flags : avx2 amx_tile\n")
    library: Any = SimpleNamespace(syscall=syscall)
    monkeypatch.setattr(processor, "CPUINFO", file)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)

    assert processor.processor_features() == left
    assert asked == [(158, 0x1023, 18)]


def test_only_x86_has_tiles_to_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert not processor.tiles_allowed()


def test_arm64_tells_by_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    words = {16: 1 << 1 | 1 << 20, 26: 1 << 13}
    library: Any = SimpleNamespace(getauxval=lambda vector: words[vector])
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)

    assert processor.processor_features() == {"asimd", "asimddp", "i8mm"}


def test_every_feature_that_llvm_may_use_has_a_name_in_linux() -> None:
    assert {"avx2", "fma", "avx512vnni", "amx-int8"} <= processor.LINUX_NAMES["x86_64"].keys()
    assert set(processor._BITS) == set(processor.LINUX_NAMES["aarch64"].values())
