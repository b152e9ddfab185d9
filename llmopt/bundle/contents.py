"""``bundle.json``, the first member of a bundle: variants, their requirements, every digest.

As in an artifact's manifest, unknown keys are ignored and an unknown schema is refused; the same
manifest gives the same bytes.
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
        package: Name on PyPI; empty if unknown.
        at_least: Oldest version that runs it, inclusive.
        below: First version that does not; empty without a bound.
    """

    package: str = ""
    at_least: str = ""
    below: str = ""

    @classmethod
    def read(cls, data: Fields) -> Self:
        """Return the runtime written as ``data``."""
        return cls(data.text("package", ""), data.text("at_least", ""), data.text("below", ""))

    def __str__(self) -> str:
        """Return a requirement for pip.

        >>> str(Runtime("apache-tvm", "0.27", "0.28"))
        'apache-tvm>=0.27,<0.28'
        """
        bounds = (f">={self.at_least}" * bool(self.at_least), f"<{self.below}" * bool(self.below))
        return self.package + ",".join(filter(None, bounds))


@dataclass(frozen=True)
class Needs:
    """Requirements of a variant.

    Args:
        runtime: Package that runs the variant.
        plugins: Further packages that the runtime needs.
        machines: Architectures that it runs on, the target's first; empty for any.
        cpu_features: CPU features that it uses, by their Linux names.
        device: ``"cuda"``, or empty.
        memory_bytes: Estimated peak memory: each copy of the weights in the runtime, and the
            runtime itself.
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
    """One artifact of a bundle.

    Args:
        name: Name in the bundle, and of the folder it is unpacked to.
        target: Target with its options.
        task: Task of the model.
        needs: Requirements of the variant.
        files: Member with the content of each file.
        recipe: Source, command, pipeline and versions to build it again.
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
            ArtifactError: A name or a path is invalid.
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
    """The manifest of a bundle.

    Args:
        name: Name of the model.
        variants: Variants in order of preference.
        members: Every member that follows, in the archive's order.
        licenses: SPDX names of the model's licenses.
        versions: Versions of llmopt and zstd that wrote the bundle.
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
        """Return the contents of a ``bundle.json``.

        Raises:
            BundleError: The JSON is damaged, has invalid paths, or has a later schema.
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
            raise data.bad("schema", f"{SCHEMA}, the one this llmopt reads, not {schema}")
        members = tuple(map(FileRecord.read, data.items("members")))
        for record in members:
            _require_plain(data, record.path)
            if record.size_bytes < 0 or _DIGEST.fullmatch(record.sha256) is None:
                raise data.bad("members", f"sizes and digests; {record.path!r} has none")
        _require_distinct(data, "members", [record.path for record in members])
        variants = tuple(map(Variant.read, data.items("variants")))
        names = [variant.name for variant in variants]
        if not names or len(set(names)) != len(names):
            raise data.bad("variants", "one or more, with different names")
        known = {record.path for record in members}
        if missing := {path for each in variants for path in each.files.values()} - known:
            raise data.bad("variants", f"made of members; {min(missing)!r} is not a member")
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
        """Return the variant of this name, or None."""
        return next((each for each in self.variants if each.name == name), None)

    def size_bytes(self, variant: Variant) -> int:
        """Return the unpacked size of a variant."""
        sizes = {record.path: record.size_bytes for record in self.members}
        return sum(sizes[member] for member in variant.files.values())

    @property
    def total_bytes(self) -> int:
        """Size of all members; one that several variants share counts once."""
        return sum(record.size_bytes for record in self.members)


def too_long(path: str) -> bool:
    """Return whether a path does not fit a tar header."""
    return len(path.encode()) > LONGEST_NAME


def _require_plain(data: Fields, path: str) -> None:
    """Raise unless a path is relative, normalized and short enough."""
    if inside(Fields({"path": path}, Path(), "files"), "path") != path or too_long(path):
        raise data.bad("files", f"short, normalized, relative paths, not {path!r}")


def _require_distinct(data: Fields, key: str, paths: Any) -> None:
    """Raise if a path is duplicate, or both a file and a folder."""
    names = list(paths)
    folders = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    if len(set(names)) != len(names) or folders & set(names):
        raise data.bad(key, "paths without duplicates")
