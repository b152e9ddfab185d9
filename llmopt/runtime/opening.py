"""From a path to an artifact: a folder is one; of a bundle, the variant that suits this machine.

Weights are mapped, so a variant is unpacked once, into the user's cache, under the digest of the
bundle. What lies there was compared with the bundle when it was unpacked; with a signature to be
verified, the bundle and what was unpacked are compared again at every opening.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from llmopt.artifact.manifest import Manifest, sha256
from llmopt.artifact.writer import staged_file, staged_folder
from llmopt.bundle.contents import CONTENTS, Contents, Variant
from llmopt.bundle.opened import SUFFIX, Bundle, open_bundle, read_seal
from llmopt.bundle.signing import Trust
from llmopt.errors import ArtifactError, OutputExistsError, StorageError, UsageError
from llmopt.runtime.variants import Machine, choose

VARIABLE: Final = "LLMOPT_CACHE"
_MAY_OWN: Final = frozenset({0})  # root could change anything anyway


def is_bundle(path: Path) -> bool:
    """Tell whether a path is that of a bundle, perhaps a damaged one: a file ``….llmopt``."""
    return path.suffix == SUFFIX and path.is_file()


def artifact_of(path: Path, trust: Trust | None = None) -> Path:
    """Return the folder of the artifact at a path.

    Args:
        path: An artifact, or a bundle.
        trust: Required signer of the bundle; None for any.

    Raises:
        BundleError: The bundle is damaged.
        SignatureError: It is not signed by whom it should be.
        NoVariantError: Nothing in it runs here.
        StorageError: It cannot be unpacked.
        UsageError: A signature is asked of an artifact that is no bundle.
    """
    if not is_bundle(path):
        if trust is not None:
            raise UsageError(f"{path}: not a bundle; only bundles are signed, so omit the key")
        return path
    if trust is None and (place := _known(path)) is not None:
        return place
    with open_bundle(path, trust) as bundle:
        variant = choose(bundle.contents, Machine.here(), path)
        place = cache_folder() / bundle.seal.sha256 / variant.name
        if not _holds(place, bundle, variant, every_byte=trust is not None):
            _unpack(bundle, variant, place)
    return place


def cache_folder() -> Path:
    """Return where bundles are unpacked: below ``$LLMOPT_CACHE``, else in the user's cache."""
    given, base = os.environ.get(VARIABLE), os.environ.get("XDG_CACHE_HOME")
    user = Path(base) if base else Path.home() / ".cache"
    return (Path(given) if given else user / "llmopt") / "bundles"


def _known(path: Path) -> Path | None:
    """Return where the variant that suits was unpacked before; None if it was not, or not whole."""
    known = cache_folder() / read_seal(path).sha256
    try:
        if not _is_ours(known):
            return None
        contents = Contents.from_json((known / CONTENTS).read_bytes(), known)
        place = known / choose(contents, Machine.here(), path).name
        Manifest.read(place).check_sizes(place)
    except (ArtifactError, OSError):
        return None
    return place


def _holds(folder: Path, bundle: Bundle, variant: Variant, *, every_byte: bool) -> bool:
    """Tell whether a folder has the files of a variant, by their sizes or by every byte."""
    records = {record.path: record for record in bundle.contents.members}
    for path, member in variant.files.items():
        file, record = folder / path, records[member]
        if file.is_symlink() or not file.is_file() or file.stat().st_size != record.size_bytes:
            return False
        if every_byte and sha256(file) != record.sha256:
            return False
    return True


def _unpack(bundle: Bundle, variant: Variant, folder: Path) -> None:
    """Put a variant into the cache, in one piece, and beside it what the bundle holds.

    Raises:
        BundleError: A member is not what the bundle says.
        StorageError: There is no room, or the cache is somebody else's.
    """
    known = folder.parent
    try:
        _make_private(known)
        with _unless_there(), staged_folder(folder, force=folder.exists()) as staging:
            bundle.unpack({variant.name: staging})
        with staged_file(known / CONTENTS, force=True) as staging:
            staging.write_bytes(bundle.contents.to_json())
    except (StorageError, FileExistsError, NotADirectoryError, PermissionError) as error:
        said = error.problem if isinstance(error, StorageError) else str(error.strerror)
        problem = f"{said}; {VARIABLE} names another place for bundles"
        raise StorageError(known, problem) from error
    finally:
        with contextlib.suppress(OSError):
            known.rmdir()  # if nothing came of it


@contextlib.contextmanager
def _unless_there() -> Iterator[None]:
    """Let another process be faster: what it put in the place is as good."""
    try:
        yield
    except OutputExistsError:
        return
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
            raise


def _make_private(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_ours(folder):
        raise StorageError(folder, "belongs to another user")


def _is_ours(folder: Path) -> bool:
    return folder.stat().st_uid in _MAY_OWN | {os.geteuid()}
