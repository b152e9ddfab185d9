"""``bundle.json``, the first member of a bundle: its variants, what each needs, every digest.

As in an artifact's manifest, keys that are not known are ignored and a schema that is not known is
refused; the same manifest is the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final, Self

from llmopt.artifact.fields import Fields
from llmopt.artifact.manifest import MANIFEST, FileRecord, inside, parsed
from llmopt.bundle.archive import LONGEST_NAME
from llmopt.errors import ArtifactError, BundleError

SCHEMA: Final = 1
CONTENTS: Final = "bundle.json"
BOM: Final = "bundle.cdx.json"
LICENSES: Final = "licenses"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,60}")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Runtime:
    """The package that runs a variant.

    Args:
        package: Name of the package for pip; empty if unknown.
        at_least: The oldest version that may, inclusive.
        below: The first version that may not; empty where there is none.
    """

    package: str = ""
    at_least: str = ""
    below: str = ""

    @classmethod
    def read(cls, data: Fields) -> Self:
        """Return the runtime written as ``data``."""
        return cls(data.text("package", ""), data.text("at_least", ""), data.text("below", ""))

    def __str__(self) -> str:
        """Return it as pip takes it.

        >>> str(Runtime("apache-tvm", "0.27", "0.28"))
        'apache-tvm>=0.27,<0.28'
        """
        bounds = (f">={self.at_least}" * bool(self.at_least), f"<{self.below}" * bool(self.below))
        return self.package + ",".join(filter(None, bounds))


@dataclass(frozen=True)
class Needs:
    """What a machine must have to run a variant.

    Args:
        runtime: The package that runs it.
        plugins: Packages that the runtime needs beside it.
        machines: Processors it runs on, the one it was made for first; empty for any.
        cpu_features: CPU features that the variant uses, in Linux's names.
        device: ``"cuda"``, or empty.
        memory_bytes: Memory it takes at most, estimated: weights as often as the runtime may
            hold them, and what the runtime takes itself.
    """

    runtime: Runtime = Runtime()
    plugins: tuple[str, ...] = ()
    machines: tuple[str, ...] = ()
    cpu_features: tuple[str, ...] = ()
    device: str = ""
    memory_bytes: int = 0

    @classmethod
    def read(cls, data: Fields) -> Self:
        """Return the needs written as ``data``."""
        return cls(
            runtime=Runtime.read(data.child("runtime")),
            plugins=data.texts("plugins"),
            machines=data.texts("machines"),
            cpu_features=data.texts("cpu_features"),
            device=data.text("device", ""),
            memory_bytes=data.number("memory_bytes", 0),
        )


@dataclass(frozen=True)
class Variant:
    """One of the artifacts.

    Args:
        name: Name in the bundle, and of the folder it is unpacked to.
        target: Target, options included.
        task: Task of the artifact.
        needs: Requirements on the machine.
        files: The member that holds each of its files.
        recipe: Source and command that make it again.
    """

    name: str
    target: str
    task: str
    needs: Needs
    files: Mapping[str, str]
    recipe: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, data: Fields) -> Self:
        """Return the variant written as ``data``.

        Raises:
            ArtifactError: A name or a path is not one.
        """
        name = data.text("name")
        if _NAME.fullmatch(name) is None:
            raise data.bad("name", f"letters, digits and . _ + -, not {name!r}")
        files = data.child("files")
        paths = {path: files.text(path) for path in data.mapping("files")}
        for path in paths:
            _require_plain(data, path)
        _require_distinct(data, "files", paths)
        if MANIFEST not in paths:
            raise data.bad("files", f"the files of an artifact, with {MANIFEST}")
        needs = Needs.read(data.child("needs"))
        target, task = data.text("target"), data.text("task")
        return cls(name, target, task, needs, paths, data.mapping("recipe"))


@dataclass(frozen=True)
class Contents:
    """All that a bundle says of itself.

    Args:
        name: Name of the model.
        variants: Variants in the order of preference.
        members: Every member that follows, in the archive's order.
        licenses: Licences of the model, as SPDX names them.
        versions: Versions of llmopt and zstd that made it.
        schema: Version of this format.
    """

    name: str
    variants: tuple[Variant, ...]
    members: tuple[FileRecord, ...]
    licenses: tuple[str, ...] = ()
    versions: Mapping[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    @classmethod
    def from_json(cls, content: bytes, where: Path) -> Self:
        """Return what the bytes of a ``bundle.json`` say.

        Raises:
            BundleError: It cannot be read, names files that cannot be, or is of a later schema.
        """
        try:
            return cls._read(Fields(parsed(content.decode("utf-8"), where), where))
        except UnicodeDecodeError as error:
            raise BundleError(where, f"{CONTENTS} is not UTF-8 text") from error
        except ArtifactError as error:
            raise BundleError(where, f"{CONTENTS}: {error.problem}") from error

    @classmethod
    def _read(cls, data: Fields) -> Self:
        schema = data.number("schema")
        if schema != SCHEMA:
            raise data.bad("schema", f"{SCHEMA}, which this llmopt reads, not {schema}")
        members = tuple(map(FileRecord.read, data.items("members")))
        for record in members:
            _require_plain(data, record.path)
            if record.size_bytes < 0 or _DIGEST.fullmatch(record.sha256) is None:
                raise data.bad("members", f"sizes and digests; {record.path!r} has none")
        _require_distinct(data, "members", [record.path for record in members])
        variants = tuple(map(Variant.read, data.items("variants")))
        names = [variant.name for variant in variants]
        if not names or len(set(names)) != len(names):
            raise data.bad("variants", "one or more of different names")
        known = {record.path for record in members}
        if missing := {path for each in variants for path in each.files.values()} - known:
            raise data.bad("variants", f"made of members; {min(missing)!r} is none")
        return cls(
            name=data.text("name"),
            variants=variants,
            members=members,
            licenses=data.texts("licenses"),
            versions=data.mapping("versions"),
            schema=schema,
        )

    def to_json(self) -> bytes:
        """Return the bytes of ``bundle.json``."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True, indent=1, ensure_ascii=False)
        return f"{text}\n".encode()

    def variant(self, name: str) -> Variant | None:
        """Return the variant of this name, if there is one."""
        return next((each for each in self.variants if each.name == name), None)

    def size_bytes(self, variant: Variant) -> int:
        """Return the size of a variant once it is unpacked."""
        sizes = {record.path: record.size_bytes for record in self.members}
        return sum(sizes[member] for member in variant.files.values())

    @property
    def total_bytes(self) -> int:
        """All members together; what several variants share counts once."""
        return sum(record.size_bytes for record in self.members)


def too_long(path: str) -> bool:
    """Tell whether a path does not fit the header of a member."""
    return len(path.encode()) > LONGEST_NAME


def _require_plain(data: Fields, path: str) -> None:
    """Raise unless a path is written in the one way, inside, and short enough."""
    if inside(Fields({"path": path}, Path(), "files"), "path") != path or too_long(path):
        raise data.bad("files", f"short paths written plainly, not {path!r}")


def _require_distinct(data: Fields, key: str, paths: Any) -> None:
    """Raise if a path comes twice, or is a file and a folder."""
    names = list(paths)
    folders = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    if len(set(names)) != len(names) or folders & set(names):
        raise data.bad(key, "paths of which none comes twice")
