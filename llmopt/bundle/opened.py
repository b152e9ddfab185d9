"""A bundle that was opened: verified before anything in it is parsed, then listed or unpacked."""

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
"""No model becomes a thousandth of its size; what claims so would fill a disk."""

_SMALL: Final = 64 << 20


@dataclass(frozen=True)
class Bundle:
    """An open bundle whose bytes are what its end, and a signature if asked for, say.

    Args:
        path: The file.
        stream: Open file of the bundle.
        seal: Seal at the end of the bundle.
        contents: Contents of the bundle.
    """

    path: Path
    stream: BinaryIO
    seal: Seal
    contents: Contents

    def unpack(self, variants: dict[str, Path]) -> None:
        """Write variants into folders, which are made.

        Args:
            variants: Output folder of each variant, by name.

        Raises:
            BundleError: A member is not what the manifest says.
            StorageError: There is no room.
        """
        wanted = [each for each in self.contents.variants if each.name in variants]
        for place in variants.values():
            place.mkdir(parents=True, exist_ok=True)
            _require_room(place, sum(map(self.contents.size_bytes, wanted)))
        places: dict[str, list[Path]] = {}
        for variant in wanted:
            for path, member in variant.files.items():
                places.setdefault(member, []).append(variants[variant.name] / path)
        archive = self._members()
        for record in self.contents.members:
            _write(archive.chunks(record), places.get(record.path, []))
        archive.finish()
        for variant in wanted:
            self._check_manifest(variant, (variants[variant.name] / MANIFEST).read_bytes())

    def check(self) -> None:
        """Read every member and compare it with its digest.

        Raises:
            BundleError: One is not what the manifest says.
        """
        archive = self._members()
        wanted = {each.files[MANIFEST] for each in self.contents.variants}
        for record in self.contents.members:
            kept = [chunk for chunk in archive.chunks(record) if record.path in wanted]
            for variant in self.contents.variants:
                if variant.files[MANIFEST] == record.path:
                    self._check_manifest(variant, b"".join(kept))
        archive.finish()

    def member(self, name: str) -> bytes:
        """Return the content of one member, all of it in memory.

        Raises:
            BundleError: It is damaged.
        """
        archive = self._members()
        for record in self.contents.members:
            kept = [chunk for chunk in archive.chunks(record) if record.path == name]
            if record.path == name:
                return b"".join(kept)
        raise BundleError(self.path, f"it has no member {name!r}")

    def _members(self) -> Archive:
        """Return the archive, its first member read."""
        archive = Archive(self.stream, self.seal, self.path)
        archive.first(CONTENTS, _MOST_CONTENTS)
        return archive

    def _check_manifest(self, variant: Variant, content: bytes) -> None:
        """Raise unless an artifact's own manifest lists what the bundle holds of it."""
        try:
            manifest = Manifest.from_json(content.decode("utf-8"), Path(variant.name) / MANIFEST)
        except (UnicodeDecodeError, ArtifactError) as error:
            raise BundleError(self.path, f"variant {variant.name}: {error}") from error
        records = {record.path: record for record in self.contents.members}
        held = {path: records[member] for path, member in variant.files.items()}
        for record in manifest.files:
            found = held.get(record.path)
            if found is None or found.sha256 != record.sha256:
                problem = f"variant {variant.name}: {record.path!r} is not what its manifest says"
                raise BundleError(self.path, problem)


@contextlib.contextmanager
def open_bundle(path: Path, trust: Trust | None = None) -> Iterator[Bundle]:
    """Yield a bundle, after its signature, if one is asked for, and its digest were compared.

    Args:
        path: The file.
        trust: Required signer; None for any.

    Raises:
        BundleError: It is damaged, or no bundle.
        SignatureError: It is not signed by whom it should be.
        BackendUnavailableError: What verifies signatures is not installed.
    """
    with _opened(path) as stream:
        seal = Seal.read(stream, path)
        body, whole = digests(stream, seal.body_bytes)
        if trust is not None:
            require_signed(path, whole, trust)
        if body != seal.sha256:
            raise BundleError(path, "damaged: its sha256 is not the one at its end")
        archive = Archive(stream, seal, path)
        contents = Contents.from_json(archive.first(CONTENTS, _MOST_CONTENTS), path)
        if contents.total_bytes > max(_SMALL, _MOST_FOLD * seal.body_bytes):
            raise BundleError(path, f"{contents.total_bytes} bytes in so few are no model")
        yield Bundle(path, stream, seal, contents)


def read_seal(path: Path) -> Seal:
    """Return what the end of a bundle says; the rest is not read.

    Raises:
        BundleError: It is no bundle.
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
    """Write a member to each of its places, or read over it if it has none."""
    if not paths:
        for _ in chunks:
            pass
        return
    for place in paths:
        place.parent.mkdir(parents=True, exist_ok=True)
    first, *others = paths
    with first.open("xb") as file:
        file.writelines(chunks)
    for other in others:
        shutil.copyfile(first, other)


def _require_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(folder, f"{needed} bytes are to be written and {free} are free")
