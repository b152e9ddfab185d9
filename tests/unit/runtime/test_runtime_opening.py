"""Bundles on a device: unpacked once, whole or not at all, and what was signed is what runs."""

from __future__ import annotations

import concurrent.futures
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.bundles import forged, members_of
from support.signers import Signer, signer
from support.tiny_artifacts import TinyDecoder

import llmopt
from llmopt.bundle.creating import create
from llmopt.bundle.opened import Bundle
from llmopt.bundle.signing import Trust, sign, signature_of
from llmopt.errors import (
    BundleError,
    NoVariantError,
    SignatureError,
    StorageError,
    UsageError,
)
from llmopt.runtime import opening
from llmopt.runtime.opening import artifact_of, cache_folder
from llmopt.runtime.variants import Machine


@pytest.fixture(scope="module")
def alice(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return signer(tmp_path_factory.mktemp("keys"), "alice")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, alice: Signer) -> Path:
    """A signed bundle of a decoder."""
    root = tmp_path_factory.mktemp("bundle")
    artifact = TinyDecoder().write(root / "artifact")
    create([artifact], root / "tiny.llmopt", version="1")
    sign(root / "tiny.llmopt", signature_of(root / "tiny.llmopt"), alice.private)
    return root / "tiny.llmopt"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.delenv("LLMOPT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "llmopt" / "bundles"


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    for path in (made, signature_of(made)):
        shutil.copyfile(path, tmp_path / path.name)
    return tmp_path / made.name


def left(cache: Path) -> list[str]:
    """Return what lies in the cache."""
    return [str(path.relative_to(cache)) for path in cache.rglob("*")] if cache.exists() else []


def unpacking(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Path]]:
    """Return a list that grows with every bundle that is unpacked."""
    seen: list[dict[str, Path]] = []
    real = Bundle.unpack

    def unpack(self: Bundle, variants: dict[str, Path]) -> None:
        seen.append(variants)
        real(self, variants)

    monkeypatch.setattr(Bundle, "unpack", unpack)
    return seen


@pytest.mark.usefixtures("cache")
def test_a_bundle_is_loaded_like_the_artifact_in_it(bundle: Path, alice: Signer) -> None:
    wanted = llmopt.load(bundle.with_name("tiny.llmopt")).generate_ids([1, 2, 3], max_new_tokens=5)
    assert wanted == TinyDecoder().greedy([1, 2, 3], 5)
    signed = llmopt.load(bundle, key=alice.public)
    assert signed.generate_ids([1, 2, 3], max_new_tokens=5) == wanted


def test_it_is_unpacked_once(bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = unpacking(monkeypatch)
    first = artifact_of(bundle)
    assert first.is_relative_to(cache)
    assert artifact_of(bundle.rename(bundle.with_name("moved.llmopt"))) == first
    assert len(seen) == 1


def test_a_folder_is_an_artifact_as_it_is(made: Path, alice: Signer) -> None:
    folder = made.parent / "artifact"
    assert artifact_of(folder) == folder
    with pytest.raises(UsageError, match="only bundles are signed"):
        artifact_of(folder, Trust(alice.public))


@pytest.mark.parametrize("spoil", ["missing", "short", "contents"])
def test_what_is_no_longer_whole_is_unpacked_anew(bundle: Path, cache: Path, spoil: str) -> None:
    place = artifact_of(bundle)
    model = place / "model.onnx"
    content = model.read_bytes()
    if spoil == "missing":
        model.unlink()
    elif spoil == "short":
        model.write_bytes(b"x")
    else:
        (place.parent / "bundle.json").write_text("{")
    assert artifact_of(bundle) == place
    assert model.read_bytes() == content
    assert not [name for name in left(cache) if "partial" in name or ".old" in name]


@pytest.mark.usefixtures("cache")
def test_with_a_key_what_was_unpacked_is_compared_every_time(bundle: Path, alice: Signer) -> None:
    trust = Trust(alice.public)
    model = artifact_of(bundle, trust) / "model.onnx"
    content = model.read_bytes()
    model.write_bytes(bytes(len(content)))  # by somebody who may write to the cache
    assert (artifact_of(bundle) / "model.onnx").read_bytes() != content
    assert (artifact_of(bundle, trust) / "model.onnx").read_bytes() == content
    model.unlink()
    (model.parent / "elsewhere").write_bytes(content)
    model.symlink_to("elsewhere")
    assert not (artifact_of(bundle, trust) / "model.onnx").is_symlink()


def test_a_bundle_that_is_not_signed_is_not_unpacked(
    bundle: Path, cache: Path, alice: Signer
) -> None:
    signature_of(bundle).unlink()
    with pytest.raises(SignatureError):
        artifact_of(bundle, Trust(alice.public))
    assert left(cache) == []


def test_a_damaged_bundle_leaves_nothing(bundle: Path, cache: Path) -> None:
    members = members_of(bundle)
    forged(bundle, members[:-1])
    with pytest.raises(BundleError):
        artifact_of(bundle)
    assert left(cache) == []


@pytest.mark.parametrize("ending", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_ends_unpacking_leaves_nothing(
    bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, ending: BaseException
) -> None:
    def copy(*_: Any) -> None:
        raise ending

    monkeypatch.setattr("llmopt.bundle.opened._write", copy)
    expected = StorageError if isinstance(ending, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as raised:
        artifact_of(bundle)
    assert left(cache) == []
    if isinstance(raised.value, StorageError):
        assert "LLMOPT_CACHE names another place for bundles" in str(raised.value)


def test_a_cache_that_cannot_be_made_is_an_error(bundle: Path, cache: Path) -> None:
    cache.parent.parent.parent.joinpath("cache").write_text("a file")
    with pytest.raises(StorageError, match="Not a directory"):
        artifact_of(bundle)


def test_somebody_else_s_cache_is_not_used(
    bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    monkeypatch.setattr(opening, "_MAY_OWN", frozenset())
    with pytest.raises(StorageError, match="belongs to another user"):
        artifact_of(bundle)
    assert left(cache) == []


@pytest.mark.usefixtures("cache")
def test_several_at_once_unpack_it_into_one_place(bundle: Path) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        places = list(pool.map(artifact_of, [bundle] * 16))
    assert len(set(places)) == 1
    assert sorted(path.name for path in places[0].parent.iterdir()) == [
        "bundle.json",
        "onnxruntime-cpu",
    ]


@pytest.mark.usefixtures("cache")
def test_a_machine_that_nothing_suits_is_told_why(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls: cls("riscv64")))
    with pytest.raises(NoVariantError, match="made for x86_64, and this is riscv64"):
        artifact_of(bundle)


def test_the_cache_lies_where_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMOPT_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere/bundles")
    monkeypatch.delenv("LLMOPT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/llmopt/bundles")
