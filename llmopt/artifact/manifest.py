"""``manifest.json``: the facts of an artifact, its signature, and a digest of every file.

Readers ignore unknown keys and refuse an unknown schema. The same manifest gives the same bytes:
keys are sorted and nothing in it depends on the time or the machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final, Self

from llmopt.artifact.fields import Fields
from llmopt.artifact.signature import read_facts, read_signature, read_source
from llmopt.errors import ArtifactError
from llmopt.interface.facts import ModelFacts, SourceRecord
from llmopt.interface.signature import Signature

SCHEMA: Final = 1
MANIFEST: Final = "manifest.json"
REPORT: Final = "build-report.json"
"""Build times and machine: the one file without a digest."""


@dataclass(frozen=True)
class Component:
    """A further model of an artifact, which runs before the main one.

    Args:
        name: ``"encoder"``; ``"vision"`` or ``"embedding"``.
        entry: Model file.
        signature: Inputs and outputs.
    """

    name: str
    entry: str
    signature: Signature

    @classmethod
    def read(cls, data: Fields) -> Self:
        """Return the component written as ``data``."""
        return cls(
            data.text("name"), inside(data, "entry"), read_signature(data.child("signature"))
        )


@dataclass(frozen=True)
class FileRecord:
    """The record of one file of an artifact.

    Args:
        path: Path relative to the artifact, with forward slashes.
        size_bytes: Size of the file.
        sha256: Digest of the file, in hex.
    """

    path: str
    size_bytes: int
    sha256: str

    @classmethod
    def read(cls, data: Fields) -> Self:
        """Return the record written as ``data``; a path outside the artifact is refused."""
        return cls(inside(data, "path"), data.number("size_bytes"), data.text("sha256"))


def inside(data: Fields, key: str) -> str:
    """Return the path at ``key``.

    Raises:
        ArtifactError: The path leaves its folder, or is not valid.
    """
    path = PurePosixPath(data.text(key))
    leaves = path.is_absolute() or ".." in path.parts or "\\" in str(path)
    if leaves or not path.parts or any(ord(letter) < ord(" ") for letter in str(path)):
        raise data.bad(key, f"a path inside the artifact, not {str(path)!r}")
    return str(path)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The manifest of an artifact.

    Args:
        target: Target with its options.
        entry: Model file that a runner opens.
        task: ``"generate"``, ``"text-to-text"``, ``"speech-to-text"``, ``"embed"``, ``"encode"``
            or ``"raw"``.
        versions: Versions of llmopt, the backend and the opset.
        source: Source that it was compiled from.
        pipeline: Passes, as text.
        recipe: Command that builds it again, without paths; empty if unknown.
        precision: Precision plan.
        signature: Inputs and outputs of the model.
        components: Further models in the order in which they run, before the main one.
        model: Facts that a runner needs.
        files: Every file except the manifest and the build report.
        verification: Checks and their errors.
        quality: Measured loss of quantization.
        requires: Requirements on the machine, and bounds that it was built for.
        work: Work of a run: operators by module, multiply-adds, bytes of weights.
        compiled: Report of each pass, and fusion counts.
        schema: Version of this format.
    """

    target: str
    entry: str
    task: str
    versions: Mapping[str, str | int] = field(default_factory=dict)
    source: SourceRecord = field(default_factory=SourceRecord)
    pipeline: str = ""
    recipe: str = ""
    precision: Mapping[str, Any] = field(default_factory=dict)
    signature: Signature = field(default_factory=Signature)
    components: tuple[Component, ...] = ()
    model: ModelFacts = field(default_factory=ModelFacts)
    files: tuple[FileRecord, ...] = ()
    verification: Mapping[str, Any] = field(default_factory=dict)
    quality: Mapping[str, Any] = field(default_factory=dict)
    requires: Mapping[str, Any] = field(default_factory=dict)
    work: Mapping[str, Any] = field(default_factory=dict)
    compiled: Mapping[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    @classmethod
    def from_json(cls, text: str, where: Path) -> Self:
        """Return the manifest in ``text``.

        Args:
            text: Contents of a ``manifest.json``.
            where: Path of the file, for messages.

        Raises:
            ArtifactError: The text is not JSON, lacks a key, or has an unknown schema.
        """
        data = Fields(parsed(text, where), where)
        schema = data.number("schema")
        if schema != SCHEMA:
            raise ArtifactError(where, f"schema {schema} is unknown; this llmopt reads {SCHEMA}")
        return cls(
            target=data.text("target"),
            entry=inside(data, "entry"),
            task=data.text("task"),
            versions=data.mapping("versions"),
            source=read_source(data.child("source")),
            pipeline=data.text("pipeline", ""),
            recipe=data.text("recipe", ""),
            precision=data.mapping("precision"),
            signature=read_signature(data.child("signature")),
            components=tuple(map(Component.read, data.items("components"))),
            model=read_facts(data.child("model")),
            files=tuple(map(FileRecord.read, data.items("files"))),
            verification=data.mapping("verification"),
            quality=data.mapping("quality"),
            requires=data.mapping("requires"),
            work=data.mapping("work"),
            compiled=data.mapping("compiled"),
            schema=schema,
        )

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return the manifest of the artifact ``folder``.

        Raises:
            ArtifactError: The manifest is missing or cannot be read.
        """
        path = folder / MANIFEST
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ArtifactError(folder, _why_not_an_artifact(folder)) from error
        except UnicodeDecodeError as error:
            raise ArtifactError(path, "not UTF-8 text") from error
        except OSError as error:
            raise ArtifactError(path, error.strerror or str(error)) from error
        return cls.from_json(text, path)

    def to_json(self) -> str:
        """Return the text of ``manifest.json``: sorted keys, two spaces, a final newline."""
        data = dataclasses.asdict(self)
        return json.dumps(data, sort_keys=True, indent=2, ensure_ascii=False) + "\n"

    def write(self, folder: Path) -> None:
        """Write ``manifest.json`` into ``folder``."""
        (folder / MANIFEST).write_text(self.to_json(), encoding="utf-8")

    def component(self, name: str) -> Self | None:
        """Return the manifest of one component alone; None if there is none of this name."""
        part = next((each for each in self.components if each.name == name), None)
        if part is None:
            return None
        model = dataclasses.replace(self.model, cache="none")
        return dataclasses.replace(
            self, entry=part.entry, signature=part.signature, components=(), model=model
        )

    def with_files(self, folder: Path) -> Self:
        """Return this manifest with records of the files in ``folder``."""
        return dataclasses.replace(self, files=record_files(folder))

    def check_sizes(self, folder: Path) -> None:
        """Raise unless every listed file exists and has its size; no file is read.

        Raises:
            ArtifactError: A file is missing or has another size.
        """
        _raise_first(folder, (_size_problem(folder, record) for record in self.files))

    def verify_files(self, folder: Path) -> None:
        """Raise unless every listed file exists and matches its digest.

        Raises:
            ArtifactError: A file is missing, or has another size or digest.
        """
        _raise_first(folder, (_problem(folder, record) for record in self.files))


def parsed(text: str, where: Path) -> Any:
    """Return the value of JSON text.

    Raises:
        ArtifactError: The text is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(where, f"not JSON ({error})") from error


def record_files(folder: Path) -> tuple[FileRecord, ...]:
    """Return records of the files below ``folder``, without ``MANIFEST`` and ``REPORT``."""
    paths = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return tuple(
        FileRecord(path, (folder / path).stat().st_size, sha256(folder / path))
        for path in paths
        if path not in {MANIFEST, REPORT}
    )


def sha256(path: Path) -> str:
    """Return the sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _problem(folder: Path, record: FileRecord) -> str | None:
    if problem := _size_problem(folder, record):
        return problem
    actual = sha256(folder / record.path)
    if actual == record.sha256:
        return None
    return f"{record.path} has sha256 {actual[:12]}…, not {record.sha256[:12]}… as in the manifest"


def _size_problem(folder: Path, record: FileRecord) -> str | None:
    path = folder / record.path
    if not path.is_file():
        return f"{record.path} is missing"
    size = path.stat().st_size
    if size == record.size_bytes:
        return None
    return f"{record.path} has {size} bytes, not {record.size_bytes} as in the manifest"


def _raise_first(folder: Path, problems: Iterable[str | None]) -> None:
    for problem in problems:
        if problem is not None:
            raise ArtifactError(folder, problem)


def _why_not_an_artifact(folder: Path) -> str:
    if not folder.exists():
        return "not found"
    if folder.is_dir():
        return f"not an artifact: it has no {MANIFEST}"
    return "neither an artifact, a directory from `llmopt compile`, nor a bundle, a .llmopt file"
