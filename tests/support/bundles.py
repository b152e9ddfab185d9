"""Bundles for tests: small ones, and ones that somebody made to do harm."""

from __future__ import annotations

import hashlib
import io
import json
import random
import struct
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backports.zstd import ZstdCompressor

from llmopt.artifact.manifest import FileRecord, Manifest
from llmopt.bundle.contents import CONTENTS
from llmopt.bundle.creating import create

VERSION = "0.1.0"


def write_artifact(folder: Path, target: str = "onnxruntime-cpu", /, **files: bytes) -> Path:
    """Write an artifact of given files, none of which is a model, and return its folder."""
    folder.mkdir(parents=True)
    weights = random.Random(7).randbytes(1 << 16)  # noqa: S311 - nothing that compresses
    for name, content in ({"model": weights, "tokens": b"{}"} | files).items():
        (folder / f"{name}.bin").write_bytes(content)
    (folder / "build-report.json").write_text(str(folder))  # differs, and is no part of it
    manifest = Manifest(
        target=target, entry="model.bin", task="raw", versions={"onnxruntime": "1.31.0"}
    )
    manifest.with_files(folder).write(folder)
    return folder


def small_bundle(folder: Path) -> Path:
    """Write a bundle of one such artifact and return it."""
    artifact = write_artifact(folder / "artifact")
    create([artifact], folder / "small.llmopt", version=VERSION)
    return folder / "small.llmopt"


@dataclass(frozen=True)
class Member:
    """A member of a tar archive: anything at all."""

    name: str
    content: bytes = b""
    kind: bytes = tarfile.REGTYPE
    link: str = ""
    mode: int = 0o644
    claimed: int | None = None

    def to_tar(self) -> bytes:
        """Return its header and content."""
        info = tarfile.TarInfo(self.name)
        info.size = len(self.content) if self.claimed is None else self.claimed
        info.type, info.linkname, info.mode = self.kind, self.link, self.mode
        head = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
        return head + self.content + bytes(-len(self.content) % 512)


def forged(path: Path, members: Sequence[Member], end: bytes = bytes(1024)) -> Path:
    """Write members as a bundle with a seal that is right, and return it."""
    tar = b"".join(member.to_tar() for member in members) + end
    return sealed(path, ZstdCompressor().compress(tar, mode=ZstdCompressor.FLUSH_FRAME))


def sealed(path: Path, body: bytes) -> Path:
    """Write bytes with the seal of a bundle, and return the file."""
    digest = hashlib.sha256(body).digest()
    tail = struct.pack("<II16s32s", 0x184D2A5C, 48, b"llmopt bundle 1\n", digest)
    path.write_bytes(body + tail)
    return path


def members_of(bundle: Path) -> list[Member]:
    """Return the members of a bundle, as any reader of tar sees them."""
    from backports.zstd import decompress

    with tarfile.open(fileobj=io.BytesIO(decompress(bundle.read_bytes()))) as tar:
        found = []
        for info in tar:
            file = tar.extractfile(info)
            assert file is not None
            found.append(Member(info.name, file.read()))
        return found


def with_contents(members: Sequence[Member], /, **changes: Any) -> list[Member]:
    """Return members whose ``bundle.json`` has some keys changed."""
    data = json.loads(members[0].content) | changes
    return [replace(members[0], content=json.dumps(data).encode()), *members[1:]]


def recorded(members: Sequence[Member]) -> list[dict[str, Any]]:
    """Return the records that ``bundle.json`` has to have for members to be what it says."""
    return [
        vars(FileRecord(m.name, len(m.content), hashlib.sha256(m.content).hexdigest()))
        for m in members
        if m.name != CONTENTS
    ]
