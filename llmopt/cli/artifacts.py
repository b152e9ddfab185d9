"""Paths of artifacts on the command line."""

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
_HINT: Final = "give an artifact, a directory that `llmopt compile` wrote, or a bundle"
_TRUST: Final = ("key", "certificate_chain", "signature")
Command = TypeVar("Command", bound=Callable[..., Any])


def require_there(*paths: Path) -> None:
    """Raise unless something is at each path; what it is, is found out when it is read.

    Raises:
        SourceNotFoundError: Nothing is at one of them.
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
    """Give a command the options that say whose signature a bundle has to have."""
    path = click.Path(path_type=Path)
    for option in (
        click.option(
            "--signature",
            type=path,
            metavar="FILE",
            help="The bundle's signature.  [default: BUNDLE.sig]",
        ),
        click.option(
            "--certificate-chain",
            type=path,
            multiple=True,
            metavar="FILE",
            help="Certificates that the signer's leads to, the root's among them. Repeatable.",
        ),
        click.option(
            "--key",
            type=path,
            metavar="FILE",
            help="A public key: refuse a bundle that is not signed with its private one.",
        ),
    ):
        command = option(command)
    return command


def trust(options: dict[str, Any]) -> Trust | None:
    """Take those options out of the others and return what they say."""
    from llmopt.bundle.signing import trust_of

    return trust_of(*(options.pop(name) for name in _TRUST))


def opened(path: Path, options: dict[str, Any]) -> Path:
    """Return the folder of an artifact, or of the variant of a bundle that suits this machine.

    Raises:
        SourceNotFoundError: Nothing is there.
        LlmoptError: As `llmopt.runtime.opening.artifact_of` does.
    """
    [folder] = all_opened([path], options)
    return folder


def all_opened(paths: Sequence[Path], options: dict[str, Any]) -> list[Path]:
    """Return the folder of each, as `opened` does; of several bundles each has its own signature.

    Raises:
        UsageError: One signature is given for several.
    """
    require_there(*paths)
    asked = one_each(trust(options), paths)
    from llmopt.runtime.opening import artifact_of

    return [artifact_of(path, asked) for path in paths]


def one_each(asked: Trust | None, paths: Sequence[Path]) -> Trust | None:
    """Return whose signatures are asked for, if each bundle can have its own.

    Raises:
        UsageError: One signature is given for several.
    """
    if asked is not None and asked.signature is not None and len(paths) > 1:
        raise UsageError(
            f"--signature {asked.signature} is that of one bundle; leave it out and put the "
            "signature of each beside it, as BUNDLE.sig"
        )
    return asked
