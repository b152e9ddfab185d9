"""Open bundles: verified before anything in them is parsed, then listed or unpacked."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from llmopt.artifact.manifest import MANIFEST, Manifest
from llmopt.bundle.archive import Archive, Seal, digests
from llmopt.bundle.contents import CONTENTS, Contents, Variant
from llmopt.bundle.signing import Trust, require_signed
from llmopt.errors import ArtifactError, BundleError, StorageError

SUFFIX: Final = ".llmopt"
_MOST_CONTENTS: Final = 16 << 20
_MOST_FOLD: Final = 1000
"""No model compresses to a thousandth of its size; a larger claim is meant to fill a disk."""

_SMALL: Final = 64 << 20


@dataclass(frozen=True)
class Bundle:
    """An open bundle whose digest and, if required, signature have been verified.

    Args:
        path: Path of the file.
        stream: Open file.
        seal: Seal at the end of the file.
        contents: Contents of the bundle.
    """

    path: Path
    stream: BinaryIO
    seal: Seal
    contents: Contents

    def unpack(self, variants: dict[str, Path]) -> None:
        """Write variants into folders, which are created.

        Args:
            variants: Name of each variant to its folder.

        Raises:
            BundleError: A member does not match the manifest.
            StorageError: There is not enough space.
        """
        selected = [each for each in self.contents.variants if each.name in variants]
        for folder in variants.values():
            folder.mkdir(parents=True, exist_ok=True)
            _require_space(folder, sum(map(self.contents.size_bytes, selected)))
        paths: dict[str, list[Path]] = {}
        for variant in selected:
            for path, member in variant.files.items():
                paths.setdefault(member, []).append(variants[variant.name] / path)
        archive = self._members()
        for record in self.contents.members:
            _write(archive.chunks(record), paths.get(record.path, []))
        archive.finish()
        for variant in selected:
            self._check_manifest(variant, (variants[variant.name] / MANIFEST).read_bytes())

    def check(self) -> None:
        """Read every member and compare it with its digest.

        Raises:
            BundleError: A member does not match the manifest.
        """
        archive = self._members()
        manifests = {each.files[MANIFEST] for each in self.contents.variants}
        for record in self.contents.members:
            chunks = [chunk for chunk in archive.chunks(record) if record.path in manifests]
            for variant in self.contents.variants:
                if variant.files[MANIFEST] == record.path:
                    self._check_manifest(variant, b"".join(chunks))
        archive.finish()

    def member(self, name: str) -> bytes:
        """Return the content of one member.

        Raises:
            BundleError: The bundle is damaged, or lacks the member.
        """
        archive = self._members()
        for record in self.contents.members:
            chunks = [chunk for chunk in archive.chunks(record) if record.path == name]
            if record.path == name:
                return b"".join(chunks)
        raise BundleError(self.path, f"it has no member {name!r}")

    def _members(self) -> Archive:
        """Return the archive, positioned after its first member."""
        archive = Archive(self.stream, self.seal, self.path)
        archive.first(CONTENTS, _MOST_CONTENTS)
        return archive

    def _check_manifest(self, variant: Variant, content: bytes) -> None:
        """Raise unless the files of a variant match its artifact's manifest."""
        try:
            manifest = Manifest.from_json(content.decode("utf-8"), Path(variant.name) / MANIFEST)
        except (UnicodeDecodeError, ArtifactError) as error:
            raise BundleError(self.path, f"variant {variant.name}: {error}") from error
        records = {record.path: record for record in self.contents.members}
        files = {path: records[member] for path, member in variant.files.items()}
        for record in manifest.files:
            actual = files.get(record.path)
            if actual is None or actual.sha256 != record.sha256:
                problem = f"variant {variant.name}: {record.path!r} does not match its manifest"
                raise BundleError(self.path, problem)


@contextlib.contextmanager
def open_bundle(path: Path, trust: Trust | None = None) -> Iterator[Bundle]:
    """Yield a bundle, its digest and, if required, its signature verified.

    Args:
        path: Path of the file.
        trust: Required signer; None for none.

    Raises:
        BundleError: The file is damaged, or not a bundle.
        SignatureError: The file is not signed by the required signer.
        BackendUnavailableError: The library for signatures is not installed.
    """
    with _opened(path) as stream:
        seal = Seal.read(stream, path)
        body, entire = digests(stream, seal.body_bytes)
        if trust is not None:
            require_signed(path, entire, trust)
        if body != seal.sha256:
            raise BundleError(path, "damaged: its sha256 is not the one at its end")
        archive = Archive(stream, seal, path)
        contents = Contents.from_json(archive.first(CONTENTS, _MOST_CONTENTS), path)
        if contents.total_bytes > max(_SMALL, _MOST_FOLD * seal.body_bytes):
            raise BundleError(
                path,
                f"implausible: {seal.body_bytes} bytes claim to expand to {contents.total_bytes}",
            )
        yield Bundle(path, stream, seal, contents)


def read_seal(path: Path) -> Seal:
    """Return the seal of a bundle; nothing else is read.

    Raises:
        BundleError: The file is not a bundle.
    """
    with _opened(path) as stream:
        return Seal.read(stream, path)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        stream = path.open("rb")
    except OSError as error:
        raise BundleError(path, error.strerror or str(error)) from error
    with stream:
        yield stream


def _write(chunks: Iterator[bytes], paths: list[Path]) -> None:
    """Write a member to each of ``paths``, or skip it if there are none."""
    if not paths:
        for _ in chunks:
            pass
        return
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    first, *others = paths
    with first.open("xb") as file:
        file.writelines(chunks)
    for other in others:
        shutil.copyfile(first, other)


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(folder, f"not enough space: {needed} bytes needed, {free} free")
