"""The archive of a bundle: a canonical tar in one zstd frame, followed by its digest.

The same members give the same bytes: they keep their order, and have one owner, one mode and one
time. The last zstd frame is one that decompressors skip, with the sha256 of everything before it;
``tar --zstd -x`` extracts the archive.

The first member, the manifest, determines every following byte of the tar except the contents of
files. A reader compares, and so needs no rules about links, devices, paths or duplicate names: any
of them differs from the expected header. Nothing is decompressed beyond the sizes in the manifest.
"""

from __future__ import annotations

import hashlib
import struct
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from llmopt.artifact.manifest import FileRecord
from llmopt.bundle.zstd import (
    CompressionParameter,
    DecompressionParameter,
    ZstdCompressor,
    ZstdDecompressor,
    ZstdError,
)
from llmopt.errors import BundleError

CHUNK: Final = 1 << 20
LONGEST_NAME: Final = 100
"""Longest name in a tar header, in bytes."""

_BLOCK: Final = 512
_MODE: Final = 0o644
_END: Final = bytes(2 * _BLOCK)
_LEVEL: Final = 3  # weights shrink by a tenth at any level
_WINDOW: Final = 22  # log2 of the bytes that decompression keeps
_TRAILER: Final = struct.Struct("<II16s32s")
_SKIPPABLE: Final = 0x184D2A5C  # RFC 8878, section 3.1.2
_TAG: Final = b"llmopt bundle 1\n"
_SIZE: Final = 48
_KINDS: Final = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.DIRTYPE: "a folder",
    tarfile.REGTYPE: "a file",
}


@dataclass(frozen=True)
class ArchiveMember:
    """A member to write.

    Args:
        record: Name, size and digest.
        source: File with the content, or the content itself.
    """

    record: FileRecord
    source: Path | bytes

    @classmethod
    def of(cls, name: str, content: bytes) -> ArchiveMember:
        """Return the member with this content."""
        digest = hashlib.sha256(content).hexdigest()
        return cls(FileRecord(name, len(content), digest), content)

    def chunks(self) -> Iterator[bytes]:
        """Yield the content.

        Raises:
            BundleError: The content no longer matches the record.
        """
        digest, size = hashlib.sha256(), 0
        for chunk in [self.source] if isinstance(self.source, bytes) else _read(self.source):
            digest.update(chunk)
            size += len(chunk)
            yield chunk
        if (size, digest.hexdigest()) != (self.record.size_bytes, self.record.sha256):
            raise BundleError(Path(str(self.source)), "changed while it was read")


def write_archive(stream: BinaryIO, entries: Iterable[ArchiveMember]) -> str:
    """Write an archive and return the digest in its trailer, in hex."""
    parameters = CompressionParameter
    options: dict[int, int] = {
        parameters.compression_level: _LEVEL,
        parameters.window_log: _WINDOW,
    }
    compressor, digest = ZstdCompressor(options=options), hashlib.sha256()

    def write(data: bytes) -> None:
        digest.update(data)
        stream.write(data)

    for entry in entries:
        write(compressor.compress(_header(entry.record.path, entry.record.size_bytes)))
        for chunk in entry.chunks():
            write(compressor.compress(chunk))
        write(compressor.compress(_padding(entry.record.size_bytes)))
    write(compressor.compress(_END, mode=ZstdCompressor.FLUSH_FRAME))
    stream.write(_TRAILER.pack(_SKIPPABLE, _SIZE, _TAG, digest.digest()))
    return digest.hexdigest()


@dataclass(frozen=True)
class Seal:
    """The trailer of an archive.

    Args:
        body_bytes: Number of bytes before the trailer.
        sha256: Digest of those bytes, in hex.
    """

    body_bytes: int
    sha256: str

    @classmethod
    def read(cls, stream: BinaryIO, path: Path) -> Seal:
        """Return the seal of an archive; nothing else is read.

        Raises:
            BundleError: The file is truncated, or not a bundle.
        """
        stream.seek(0, 2)
        body = stream.tell() - _TRAILER.size
        if body < 0:
            raise BundleError(path, "not a bundle: the file is too short")
        stream.seek(body)
        magic, size, tag, digest = _TRAILER.unpack(stream.read(_TRAILER.size))
        if (magic, size, tag) != (_SKIPPABLE, _SIZE, _TAG):
            raise BundleError(path, "not a bundle, or a damaged one: it has no seal at its end")
        return cls(body, digest.hex())


def digests(stream: BinaryIO, body_bytes: int) -> tuple[str, str]:
    """Return the sha256 of the first ``body_bytes`` of a file and of the entire file, in hex."""
    stream.seek(0)
    digest = hashlib.sha256()
    for chunk in _limited(stream, body_bytes):
        digest.update(chunk)
    body = digest.copy()
    digest.update(stream.read())
    return body.hexdigest(), digest.hexdigest()


class Archive:
    """A reader of an archive, from its first member to its last.

    Args:
        stream: Open file.
        seal: Seal of the file.
        path: Path of the file, for messages.
    """

    def __init__(self, stream: BinaryIO, seal: Seal, path: Path) -> None:
        self.path = path
        self._seal = seal
        self._compressed = _limited(stream, seal.body_bytes)
        self._digest = hashlib.sha256()
        limit: dict[int, int] = {DecompressionParameter.window_log_max: _WINDOW}
        self._zstd = ZstdDecompressor(options=limit)
        stream.seek(0)

    def first(self, name: str, most: int) -> bytes:
        """Return the content of the first member, checked for its name and size.

        Raises:
            BundleError: The member is another one, too large or damaged.
        """
        block = self._exactly(_BLOCK)
        size = _parsed(block, self.path).size
        if size > most:
            raise BundleError(
                self.path, f"its first member has {size} bytes; at most {most} allowed"
            )
        self._expect(block, name, size)
        content = self._exactly(size)
        self._pad(name, size)
        return content

    def chunks(self, record: FileRecord) -> Iterator[bytes]:
        """Yield the content of the next member, which must match the record.

        Raises:
            BundleError: The member is another one, or damaged; discard the content then.
        """
        self._expect(self._exactly(_BLOCK), record.path, record.size_bytes)
        digest, left = hashlib.sha256(), record.size_bytes
        while left:
            chunk = self._some(min(left, CHUNK))
            left -= len(chunk)
            digest.update(chunk)
            yield chunk
        self._pad(record.path, record.size_bytes)
        if digest.hexdigest() != record.sha256:
            raise BundleError(self.path, f"{record.path!r} does not match its digest")

    def finish(self) -> None:
        """Read the end of the archive.

        Raises:
            BundleError: More data follows, or the digest does not match the seal.
        """
        ended = self._exactly(len(_END)) == _END and not self._more(1)
        if not ended or self._zstd.unused_data or next(self._compressed, b""):
            raise BundleError(self.path, "data follows its last member")
        if self._digest.hexdigest() != self._seal.sha256:
            raise BundleError(self.path, "its sha256 is not the one at its end")

    def _expect(self, block: bytes, name: str, size: int) -> None:
        if block == _header(name, size):
            return
        actual = _parsed(block, self.path)
        kind = _KINDS.get(actual.type, "a member of another kind")
        if actual.name != name or actual.type != tarfile.REGTYPE:
            problem = f"expected {name!r}, not {kind} {actual.name!r}"
        elif actual.size != size:
            problem = f"{name!r} has {actual.size} bytes, not {size} as in the manifest"
        else:
            problem = f"the header of {name!r} has an unexpected owner, mode or time"
        raise BundleError(self.path, problem)

    def _pad(self, name: str, size: int) -> None:
        """Read the padding after a member."""
        padding = _padding(size)
        if self._exactly(len(padding)) != padding:
            raise BundleError(self.path, f"unexpected data in the padding after {name!r}")

    def _exactly(self, count: int) -> bytes:
        pieces = []
        while count:
            pieces.append(self._some(count))
            count -= len(pieces[-1])
        return b"".join(pieces)

    def _some(self, most: int) -> bytes:
        data = self._more(most)
        if not data:
            raise BundleError(self.path, "truncated: the archive ends early")
        return data

    def _more(self, most: int) -> bytes:
        """Return up to ``most`` decompressed bytes, empty at the end."""
        try:
            while not self._zstd.eof:
                compressed = b""
                if self._zstd.needs_input and not (compressed := next(self._compressed, b"")):
                    break
                self._digest.update(compressed)
                if data := self._zstd.decompress(compressed, most):
                    return data
        except ZstdError as error:
            raise BundleError(self.path, f"cannot be decompressed ({error})") from error
        return b""


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, _MODE
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")


def _padding(size: int) -> bytes:
    return bytes(-size % _BLOCK)


def _parsed(block: bytes, path: Path) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except tarfile.HeaderError as error:
        raise BundleError(path, f"damaged: a header is not a tar header ({error})") from error


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _limited(stream: BinaryIO, count: int) -> Iterator[bytes]:
    while count and (chunk := stream.read(min(count, CHUNK))):
        count -= len(chunk)
        yield chunk
