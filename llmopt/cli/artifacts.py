"""Artifact paths on the command line, and the options that verify a bundle's signature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from llmopt.errors import SourceNotFoundError, UsageError

if TYPE_CHECKING:
    from llmopt.bundle.signing import Trust

MANIFEST: Final = "manifest.json"
BUNDLE: Final = ".llmopt"
_HINT: Final = "give an artifact (a directory that `llmopt compile` wrote) or a bundle"
_TRUST: Final = ("key", "certificate_chain", "signature")
Command = TypeVar("Command", bound=Callable[..., Any])


def require_exists(*paths: Path) -> None:
    """Raise unless each path exists; its kind is checked when it is read.

    Raises:
        SourceNotFoundError: A path does not exist.
    """
    for path in paths:
        if not path.exists():
            raise SourceNotFoundError(path, _HINT)


def is_artifact(path: Path) -> bool:
    """Whether ``path`` is an artifact, perhaps a damaged one, rather than a source."""
    return (path / MANIFEST).is_file() or is_bundle(path)


def is_bundle(path: Path) -> bool:
    """Whether ``path`` is a bundle, perhaps a damaged one."""
    return path.suffix == BUNDLE and path.is_file()


def trust_options(command: Command) -> Command:
    """Add the options that select the signer a bundle is verified against."""
    path = click.Path(path_type=Path)
    for option in (
        click.option(
            "--signature",
            type=path,
            metavar="FILE",
            help="Signature of the bundle.  [default: BUNDLE.sig]",
        ),
        click.option(
            "--certificate-chain",
            type=path,
            multiple=True,
            metavar="FILE",
            help="Certificate chain of the signer, root included. Repeatable.",
        ),
        click.option(
            "--key",
            type=path,
            metavar="FILE",
            help="Public key; refuse a bundle that was not signed with its private key.",
        ),
    ):
        command = option(command)
    return command


def trust(options: dict[str, Any]) -> Trust | None:
    """Pop those options from ``options`` and return the signer that they select."""
    from llmopt.bundle.signing import trust_of

    return trust_of(*(options.pop(name) for name in _TRUST))


def artifact_folder(path: Path, options: dict[str, Any]) -> Path:
    """Return the folder of an artifact, or of the variant of a bundle that fits this machine.

    Raises:
        SourceNotFoundError: The path does not exist.
        LlmoptError: The artifact cannot be opened; see `llmopt.runtime.opening.artifact_of`.
    """
    [folder] = artifact_folders([path], options)
    return folder


def artifact_folders(paths: Sequence[Path], options: dict[str, Any]) -> list[Path]:
    """Return the folder of each artifact, as `artifact_folder` does for one.

    Raises:
        UsageError: One signature file is given for several bundles.
    """
    require_exists(*paths)
    signer = check_signer(trust(options), paths)
    from llmopt.runtime.opening import artifact_of

    return [artifact_of(path, signer) for path in paths]


def check_signer(signer: Trust | None, paths: Sequence[Path]) -> Trust | None:
    """Return ``signer``, unless it names one signature file for several bundles.

    Raises:
        UsageError: One signature file is given for several bundles.
    """
    if signer is not None and signer.signature is not None and len(paths) > 1:
        raise UsageError(
            f"--signature {signer.signature} applies to a single bundle; omit it and store each "
            "signature next to its bundle, as BUNDLE.sig"
        )
    return signer
