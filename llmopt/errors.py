"""Every error llmopt raises on purpose.

::

    LlmoptError                    exit 1   the base: catch it to catch all of them
    ├── UsageError                 exit 2   the request itself cannot be carried out
    │   ├── UnknownNameError                no such target, pass, scheme, option or task
    │   ├── SourceNotFoundError             nothing is at the path of the source
    │   ├── OutputExistsError               the output path is taken, and there was no --force
    │   ├── PickleRefusedError              reading the file would execute code in it
    │   ├── RemoteCodeRefusedError          the model is code in a folder, and not trusted
    │   └── PluginError                     a file or module of passes cannot be used as it is
    ├── SourceError                exit 1   a file is damaged, incomplete or not what it claims
    ├── UnsupportedModelError      exit 1   the model holds something we cannot trace or lower
    ├── FusionError                exit 1   --require asked for a fusion that did not happen
    ├── NotIncrementalError        exit 1   a decoder cannot be given a cache
    ├── AccuracyError              exit 1   outputs moved past the tolerance or the quality bound
    ├── PassError                  exit 1   a pass left the Program invalid: our bug, or a plugin's
    │   └── PassFailedError                 a pass that is not ours raised an exception
    ├── ArtifactError              exit 1   an artifact is damaged, or from a newer llmopt
    │   └── BundleError                     a bundle is damaged, or not what it claims
    │       └── SignatureError              a bundle is unsigned, or signed by another key
    ├── StorageError               exit 1   the output could not be written
    └── BackendUnavailableError    exit 3   the library, device or feature is not here
        ├── PackageMissingError             a package that an extra of llmopt installs
        └── NoVariantError                  no variant of a bundle suits this machine

The command line prints ``str(error)`` on one line and exits with ``exit_code``. Each message
says what is wrong, where, and what to do next; the fields that most of them are made of are

* ``path``, ``where``, ``node``, ``name`` or ``what``: the file, folder, node or thing at fault,
* ``problem``, ``problems`` or ``reason``: the fault, or every one of several,
* ``hint``: the next step.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from typing_extensions import override

_TRUST: Final = "pass --trust-pickle if you trust where it came from, or save it as safetensors"


class LlmoptError(Exception):
    """The base: catch it to catch everything llmopt raises on purpose."""

    exit_code: ClassVar[int] = 1
    message: ClassVar[str] = ""
    """The text, with the fields in braces; empty where the text is what the error was made of."""

    def __post_init__(self) -> None:
        """Keep the fields as ``args``, which is what pickling passes to the class."""
        self.args = tuple(vars(self).values())

    @override
    def __str__(self) -> str:
        return self.message.format_map(vars(self)) if self.message else super().__str__()


class UsageError(LlmoptError):
    """The request cannot be carried out as it was made."""

    exit_code: ClassVar[int] = 2


@dataclass(eq=False)
class UnknownNameError(UsageError):
    """A name is not one of those known.

    Args:
        kind: The kind of thing: ``"target"``, ``"pass"``, ``"scheme"``.
        known: The names that exist.
    """

    kind: str
    name: str
    known: Iterable[str]
    hint: str = ""

    @override
    def __post_init__(self) -> None:
        self.known = sorted(self.known)
        super().__post_init__()

    @override
    def __str__(self) -> str:
        known = list(self.known)
        close = difflib.get_close_matches(self.name, known, n=1)
        tail = f"did you mean {close[0]!r}? " if close else ""
        tail += f"known: {', '.join(known)}" if known else "none is known"
        hint = f"; {self.hint}" if self.hint else ""
        return f"unknown {self.kind} {self.name!r}; {tail}{hint}"


@dataclass(eq=False)
class SourceNotFoundError(UsageError):
    """Nothing is at the path of the source."""

    path: Path
    hint: str
    message = "{path}: not found; {hint}"


@dataclass(eq=False)
class OutputExistsError(UsageError):
    """The output path is taken."""

    path: Path
    message = "{path}: exists already; pass --force to replace it, or choose another with -o"


@dataclass(eq=False)
class PickleRefusedError(UsageError):
    """Reading the file would unpickle objects, which executes code found in it."""

    path: Path
    reason: str
    hint: str = _TRUST
    message = "{path}: refused, {reason}, and unpickling executes code in the file; {hint}"


@dataclass(eq=False)
class RemoteCodeRefusedError(UsageError):
    """The model of a folder is Python code that lies in it, which would be executed."""

    path: Path
    files: Sequence[str]

    @override
    def __str__(self) -> str:
        return (
            f"{self.path}: refused, its model is code in the folder ({', '.join(self.files)}), "
            "which would be executed; read it, then pass --trust-remote-code if you trust it"
        )


@dataclass(eq=False)
class PluginError(UsageError):
    """A file or module of passes, or one pass in it, cannot be used as it is."""

    where: str
    problem: str
    hint: str
    message = "plugin {where}: {problem}; {hint}"


@dataclass(eq=False)
class SourceError(LlmoptError):
    """A source file is damaged, incomplete or not what it claims to be."""

    path: Path
    problem: str
    hint: str
    message = "{path}: {problem}; {hint}"


@dataclass(eq=False)
class UnsupportedModelError(LlmoptError):
    """The model holds something that cannot be traced or lowered."""

    what: str
    problems: Sequence[str]
    hint: str

    @override
    def __str__(self) -> str:
        return f"{self.what}: unsupported: {'; '.join(self.problems)}; {self.hint}"


@dataclass(eq=False)
class FusionError(LlmoptError):
    """``--require`` asked for a fusion that did not happen everywhere.

    Args:
        expected: The number of them in the source.
        fused: The number that were fused.
        misses: ``node: reason`` for each that was not.
    """

    what: str
    expected: int
    fused: int
    misses: Sequence[str]

    @override
    def __str__(self) -> str:
        misses = "; ".join(self.misses) or "no node came close to the pattern"
        return (
            f"--require {self.what}=all: {self.fused} of {self.expected} fused; {misses}; "
            "drop the requirement, or run `llmopt inspect` on the artifact to see the rest"
        )


@dataclass(eq=False)
class NotIncrementalError(LlmoptError):
    """A decoder cannot be given a cache of keys and values: it could not be proven right."""

    node: str
    reason: str
    message = (
        "no cache can be added: {node!r}: {reason}; change the model there, or "
        "keep it as it is with --passes 'default,-add-kv-cache'"
    )


@dataclass(eq=False)
class AccuracyError(LlmoptError):
    """Outputs moved past the tolerance, or quality past its bound."""

    what: str
    measured: float
    allowed: float
    hint: str
    message = "{what}: {measured:.3g}, allowed {allowed:.3g}; {hint}"


@dataclass(eq=False)
class PassError(LlmoptError):
    """A pass left the Program invalid, or changed what it computes: our bug, or a plugin's."""

    name: str
    problem: str
    where: str = ""

    @override
    def __str__(self) -> str:
        remedy = "correct it there, or leave it out of --passes"
        if not self.where:
            remedy = f"compile without it (--passes 'default,-{self.name}') and report it"
        where = f" ({self.where})" if self.where else ""
        return f"pass {self.name!r}{where} left the program invalid: {self.problem}; {remedy}"


class PassFailedError(PassError):
    """A pass that is not ours raised an exception, or returned no Outcome: where, and which."""

    @override
    def __str__(self) -> str:
        remedy = "correct it there, or leave it out of --passes"
        return f"pass {self.name!r} failed at {self.where}: {self.problem}; {remedy}"


@dataclass(eq=False)
class ArtifactError(LlmoptError):
    """An artifact is damaged, incomplete, or written by a newer llmopt."""

    path: Path
    problem: str
    message = "{path}: {problem}; compile it again, or update llmopt if it is newer"


class BundleError(ArtifactError):
    """A bundle is damaged, or is not what it claims to be."""

    message = "{path}: {problem}; get it again from where it came from"


class SignatureError(BundleError):
    """A bundle has no signature, or not that of the expected key or certificate."""

    message = "{path}: {problem}; do not use it; ask whoever sent it"


@dataclass(eq=False)
class StorageError(LlmoptError):
    """The output could not be written."""

    path: Path
    problem: str
    message = "{path}: {problem}; free space or choose another place with -o"


@dataclass(eq=False)
class BackendUnavailableError(LlmoptError):
    """A backend cannot build or run on this machine."""

    exit_code: ClassVar[int] = 3

    what: str
    reason: str
    message = "backend {what!r} cannot run here: {reason}"


class PackageMissingError(BackendUnavailableError):
    """A package is not installed that one of llmopt's extras brings: which, and how to get it."""

    message = "this needs the package {what}, which is not installed; {reason}"


class NoVariantError(BackendUnavailableError):
    """No variant of a bundle suits this machine: the bundle, and the reason of each."""

    message = (
        "{what}: no variant suits this machine: {reason}; bundle one that does "
        "with `llmopt bundle create`"
    )
