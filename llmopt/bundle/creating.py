"""Creation of bundles from artifacts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from llmopt.artifact.manifest import MANIFEST, FileRecord, Manifest, sha256
from llmopt.artifact.writer import check_destination, staged_file
from llmopt.bundle.archive import ArchiveMember, write_archive
from llmopt.bundle.bom import bill_of_materials
from llmopt.bundle.contents import BOM, CONTENTS, LICENSES, Contents, Variant, too_long
from llmopt.bundle.needs import needs_of
from llmopt.bundle.zstd import zstd_version
from llmopt.errors import UsageError
from llmopt.spelling import name_of

_SPDX: Final = re.compile(r"[A-Za-z0-9.+() -]+")
_UNFIT: Final = re.compile(r"[^A-Za-z0-9.+]+")
_VARIANT: Final = 40


@dataclass(frozen=True)
class Licensing:
    """Licenses of a model.

    Args:
        names: SPDX names or expressions: ``"Apache-2.0"``.
        files: License texts, and notices.
    """

    names: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        """Check that names are valid, and that files exist and have different names."""
        for name in self.names:
            if _SPDX.fullmatch(name) is None:
                raise UsageError(f"license {name!r}: give an SPDX name such as Apache-2.0")
        for path in self.files:
            if not path.is_file():
                raise UsageError(f"{path}: file not found; give the text of a license")
        if len({path.name for path in self.files}) != len(self.files):
            raise UsageError("two license texts have the same file name; rename one")


def create(
    artifacts: Sequence[Path],
    output: Path,
    licensing: Licensing | None = None,
    *,
    version: str,
    force: bool = False,
) -> Contents:
    """Write a bundle of artifacts and return its contents.

    The same artifacts in the same order give the same bytes, with the same zstd. Files that several
    artifacts share are stored once. Files that an artifact's manifest does not list are omitted.

    Args:
        artifacts: Folders in order of preference, for a machine that several suit.
        output: Path of the bundle.
        licensing: Licenses of the model.
        version: Version of llmopt.
        force: Whether to replace an existing file.

    Raises:
        ArtifactError: A folder is not an artifact, or is damaged.
        OutputExistsError: ``output`` exists, and ``force`` is off.
        StorageError: The bundle cannot be written.
        UsageError: There is no artifact, or a path is too long.
    """
    if not artifacts:
        raise UsageError("no artifact to bundle; name at least one")
    check_destination(output, force=force)
    licensing = licensing or Licensing()
    manifests = [Manifest.read(folder) for folder in artifacts]
    for folder, manifest in zip(artifacts, manifests, strict=True):
        manifest.verify_files(folder)
    entries, variants = _variants(artifacts, manifests)
    texts = [
        ArchiveMember.of(f"{LICENSES}/{path.name}", path.read_bytes()) for path in licensing.files
    ]
    name = manifests[0].source.name or variants[0].name
    parts = list(zip(variants, manifests, strict=True))
    bom = ArchiveMember.of(BOM, bill_of_materials(name, parts, licensing.names, version))
    entries = [bom, *sorted(texts, key=_path), *sorted(entries, key=_path)]
    contents = Contents(
        name=name,
        variants=variants,
        members=tuple(entry.record for entry in entries),
        licenses=licensing.names,
        versions={"llmopt": version, "zstd": zstd_version},
    )
    first = ArchiveMember.of(CONTENTS, contents.to_json())
    with staged_file(output, force=force) as staging, staging.open("xb") as file:
        write_archive(file, [first, *entries])
    return contents


def _variants(
    artifacts: Sequence[Path], manifests: Sequence[Manifest]
) -> tuple[list[ArchiveMember], tuple[Variant, ...]]:
    """Return every distinct file once, and the variants that consist of them."""
    stored: dict[str, ArchiveMember] = {}
    variants: list[Variant] = []
    for folder, manifest in zip(artifacts, manifests, strict=True):
        name = _name(manifest, [each.name for each in variants])
        files = {}
        for record in (_own_record(folder), *manifest.files):
            member = FileRecord(f"{name}/{record.path}", record.size_bytes, record.sha256)
            if too_long(member.path):
                raise UsageError(f"{folder}: {member.path!r} is too long a path for a bundle")
            entry = stored.setdefault(record.sha256, ArchiveMember(member, folder / record.path))
            files[record.path] = entry.record.path
        needs, recipe = needs_of(manifest), _recipe(manifest)
        variants.append(Variant(name, manifest.target, manifest.task, needs, files, recipe))
    return list(stored.values()), tuple(variants)


def _own_record(folder: Path) -> FileRecord:
    """Return the record of an artifact's manifest, which does not list itself."""
    path = folder / MANIFEST
    return FileRecord(MANIFEST, path.stat().st_size, sha256(path))


def _name(manifest: Manifest, taken: Sequence[str]) -> str:
    """Return a name for a variant: its target and scheme, as a folder name.

    >>> _name(Manifest(target="tvm-cpu{mcpu=znver4}", entry="", task=""), [])
    'tvm-cpu-mcpu-znver4'
    >>> rounded = {"weights": "w4{block=32}"}
    >>> _name(Manifest(target="cpu", entry="", task="", precision=rounded), ["cpu-w4"])
    'cpu-w4-2'
    """
    scheme = name_of(str(manifest.precision.get("weights", "")))
    words = f"{manifest.target} {scheme}"
    name = _UNFIT.sub("-", words).strip("-.")[:_VARIANT].strip("-.")
    same = [name, *(f"{name}-{number}" for number in range(2, len(taken) + 2))]
    return next(each for each in same if each not in taken)


def _recipe(manifest: Manifest) -> Mapping[str, Any]:
    """Return the command, source, pipeline and versions of an artifact."""
    source = manifest.source
    return {
        "command": manifest.recipe,
        "source": {"name": source.name, "kind": source.kind, "sha256": source.digest},
        "pipeline": manifest.pipeline,
        "versions": dict(manifest.versions),
    }


def _path(entry: ArchiveMember) -> str:
    return entry.record.path
