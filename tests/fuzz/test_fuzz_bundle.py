"""Bundles with flipped bits and missing ends: every one is refused, in one line, with no traces.

``LLMOPT_FUZZ=2000 pytest tests/fuzz`` looks longer; ``LLMOPT_FUZZ_SEED=7`` begins elsewhere.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from support.bundles import Member, forged, members_of, sealed, small_bundle

from llmopt.bundle.opened import open_bundle
from llmopt.errors import BundleError
from llmopt.runtime.opening import artifact_of

COUNT: Final = max(200, int(os.environ.get("LLMOPT_FUZZ", "0")))
SEED: Final = int(os.environ.get("LLMOPT_FUZZ_SEED", "0"))


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return small_bundle(tmp_path_factory.mktemp("bundle")).read_bytes()


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[Member]:
    return members_of(small_bundle(tmp_path_factory.mktemp("bundle")))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refused(path: Path, cache: Path, what: object) -> None:
    """Fail unless a bundle is refused by what checks it and by what unpacks it."""
    for attempt in (_check, artifact_of):
        try:
            attempt(path)
        except BundleError as error:
            assert "\n" not in str(error), what  # noqa: PT017 - a loop, and any message
        else:
            pytest.fail(f"{what} was accepted")
    assert not [found for found in cache.rglob("*") if found.is_file()], what


def _check(path: Path) -> None:
    with open_bundle(path) as opening:
        opening.check()


def test_every_flipped_bit_is_found(content: bytes, tmp_path: Path, cache: Path) -> None:
    rng = np.random.default_rng(SEED)
    path = tmp_path / "x.llmopt"
    for place in rng.integers(0, 8 * len(content), COUNT):
        spoiled = bytearray(content)
        spoiled[place // 8] ^= 1 << (place % 8)
        path.write_bytes(spoiled)
        refused(path, cache, f"bit {place}")


def test_every_missing_end_is_found(content: bytes, tmp_path: Path, cache: Path) -> None:
    rng = np.random.default_rng([SEED, 1])
    path = tmp_path / "x.llmopt"
    for length in {0, 1, 55, 56, len(content) - 1, *rng.integers(0, len(content), COUNT // 4)}:
        path.write_bytes(content[:length])
        refused(path, cache, f"the first {length} bytes")


def test_a_flipped_bit_is_found_though_the_seal_was_made_to_fit(
    content: bytes, tmp_path: Path, cache: Path
) -> None:
    rng = np.random.default_rng([SEED, 2])
    members = members_of(sealed(tmp_path / "x.llmopt", content[:-56]))[1:]
    body = content[:-56]
    for place in rng.integers(0, 8 * len(body), COUNT):
        spoiled = bytearray(body)
        spoiled[place // 8] ^= 1 << (place % 8)
        path = sealed(tmp_path / "x.llmopt", bytes(spoiled))
        try:
            _check(path)
        except BundleError:
            refused(path, cache, f"bit {place}")
        else:  # in a word of bundle.json that nothing else repeats; only a signature covers that
            assert members_of(path)[1:] == members


def test_a_bit_flipped_before_it_was_compressed_is_found(
    members: list[Member], tmp_path: Path, cache: Path
) -> None:
    """Whoever makes bundles by hand makes digests that fit; names and sizes have to as well."""
    rng = np.random.default_rng([SEED, 3])
    tar = b"".join(member.to_tar() for member in members[1:])
    for place in rng.integers(0, len(tar), COUNT):
        spoiled = bytearray(tar)
        spoiled[place] ^= 1 << int(rng.integers(8))
        path = forged(tmp_path / "x.llmopt", members[:1], bytes(spoiled) + bytes(1024))
        refused(path, cache, f"byte {place}")
