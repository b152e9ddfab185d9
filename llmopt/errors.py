"""Every error llmopt raises on purpose.

::

    LlmoptError                    exit 1   the base: catch it to catch all of them
    ├── UsageError                 exit 2   the request itself cannot be carried out
    │   ├── UnknownNameError                no such target, pass, scheme, option or task
    │   ├── SourceNotFoundError             nothing is at the path that was given
    │   ├── OutputExistsError               the output path is taken and --force was not given
    │   ├── PickleRefusedError              reading the file would execute code in it
    │   └── PluginError                     a file or module of passes cannot be used as it is
    ├── SourceError                exit 1   a file is damaged, incomplete or not what it claims
    ├── UnsupportedModelError      exit 1   the model holds something we cannot trace or lower
    ├── FusionError                exit 1   --require asked for a fusion that did not happen
    ├── NotIncrementalError        exit 1   a decoder cannot be given a cache
    ├── AccuracyError              exit 1   outputs moved past the tolerance or the quality bound
    ├── PassError                  exit 1   a pass left the Program invalid: our bug, or a plugin's
    │   └── PassFailedError                 a pass that is not ours raised an exception
    ├── ArtifactError              exit 1   an artifact is damaged, or from a newer llmopt
    │   └── BundleError                     a bundle is, or is not what it claims
    │       └── SignatureError              a bundle is not what was signed, or nothing was
    ├── StorageError               exit 1   the output could not be written
    └── BackendUnavailableError    exit 3   the library, device or feature is not here
        └── NoVariantError                  no variant of a bundle suits this machine

The command line prints ``str(error)`` on one line and exits with ``exit_code``. Each message
says what is wrong, where, and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, Final

from typing_extensions import override

_TRUST: Final = "pass --trust-pickle if you trust where it came from, or save it as safetensors"


class LlmoptError(Exception):
    """The base: catch it to catch everything llmopt raises on purpose."""

    exit_code: ClassVar[int] = 1


class UsageError(LlmoptError):
    """The request cannot be carried out as it was made."""

    exit_code: ClassVar[int] = 2


class UnknownNameError(UsageError):
    """A name is not one of those known.

    Args:
        kind: What was named: ``"target"``, ``"pass"``, ``"scheme"``.
        name: The name as given.
        known: The names that exist.
        hint: What to do next, where more than picking a name can help.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        super().__init__(kind, name)
        self.kind = kind
        self.name = name
        self.known = sorted(known)
        self.hint = hint

    @override
    def __str__(self) -> str:
        close = difflib.get_close_matches(self.name, self.known, n=1)
        tail = f"did you mean {close[0]!r}? " if close else ""
        tail += f"known: {', '.join(self.known)}" if self.known else "none is known"
        hint = f"; {self.hint}" if self.hint else ""
        return f"unknown {self.kind} {self.name!r}; {tail}{hint}"


class SourceNotFoundError(UsageError):
    """Nothing is at the path that was given.

    Args:
        path: The path.
        hint: What kinds of source there are, or what is missing beside the path.
    """

    def __init__(self, path: str | Path, hint: str) -> None:
        super().__init__(str(path), hint)
        self.path = Path(path)
        self.hint = hint

    @override
    def __str__(self) -> str:
        return f"{self.path}: not found; {self.hint}"


class OutputExistsError(UsageError):
    """The output path is taken.

    Args:
        path: The path.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path

    @override
    def __str__(self) -> str:
        return f"{self.path}: exists already; pass --force to replace it, or choose another with -o"


class PickleRefusedError(UsageError):
    """Reading the file would unpickle objects, which executes code found in it.

    Args:
        path: The file.
        reason: What in it needs unpickling.
        hint: What to do next.
    """

    def __init__(self, path: Path, reason: str, hint: str = _TRUST) -> None:
        super().__init__(str(path), reason, hint)
        self.path = path
        self.reason = reason
        self.hint = hint

    @override
    def __str__(self) -> str:
        return (
            f"{self.path}: refused, {self.reason}, and unpickling executes code in the file; "
            f"{self.hint}"
        )


class RemoteCodeRefusedError(UsageError):
    """The model of a folder is Python code that lies in it, which would be executed.

    Args:
        path: The folder.
        files: The files with the code.
    """

    def __init__(self, path: Path, files: Iterable[str]) -> None:
        self.path = path
        self.files = list(files)
        super().__init__(str(path), self.files)

    @override
    def __str__(self) -> str:
        return (
            f"{self.path}: refused, its model is code in the folder ({', '.join(self.files)}), "
            "which would be executed; read it, then pass --trust-remote-code if you trust it"
        )


class PluginError(UsageError):
    """A file or module of passes, or one pass in it, cannot be used as it is.

    Args:
        where: The plugin as it was given, or the file and line: ``"mine.py:12"``.
        problem: What is wrong there.
        hint: What to do next.
    """

    def __init__(self, where: str, problem: str, hint: str) -> None:
        super().__init__(where, problem, hint)
        self.where = where
        self.problem = problem
        self.hint = hint

    @override
    def __str__(self) -> str:
        return f"plugin {self.where}: {self.problem}; {self.hint}"


class SourceError(LlmoptError):
    """A source file is damaged, incomplete or not what it claims to be.

    Args:
        path: The file or folder.
        problem: What is wrong with it.
        hint: What to do next.
    """

    def __init__(self, path: str | Path, problem: str, hint: str) -> None:
        super().__init__(str(path), problem, hint)
        self.path = Path(path)
        self.problem = problem
        self.hint = hint

    @override
    def __str__(self) -> str:
        return f"{self.path}: {self.problem}; {self.hint}"


class UnsupportedModelError(LlmoptError):
    """The model holds something that cannot be traced or lowered.

    Args:
        what: The model, as the user named it.
        problems: Every obstacle found, not only the first.
        hint: What to do next.
    """

    def __init__(self, what: str, problems: Iterable[str], hint: str) -> None:
        self.what = what
        self.problems = list(problems)
        self.hint = hint
        super().__init__(what, self.problems, hint)

    @override
    def __str__(self) -> str:
        return f"{self.what}: unsupported: {'; '.join(self.problems)}; {self.hint}"


class FusionError(LlmoptError):
    """``--require`` asked for a fusion that did not happen everywhere.

    Args:
        what: The kind of fusion: ``"attention"``, ``"norm"``, ``"rotary"``.
        expected: How many the source has.
        fused: How many were fused.
        misses: ``node: reason`` for each that was not.
    """

    def __init__(self, what: str, expected: int, fused: int, misses: Iterable[str]) -> None:
        self.what = what
        self.expected = expected
        self.fused = fused
        self.misses = list(misses)
        super().__init__(what, expected, fused, self.misses)

    @override
    def __str__(self) -> str:
        found = "; ".join(self.misses) or "no node came close to the pattern"
        return (
            f"--require {self.what}=all: {self.fused} of {self.expected} fused; {found}; "
            "drop the requirement, or run `llmopt inspect` on the artifact to see the rest"
        )


class NotIncrementalError(LlmoptError):
    """A decoder cannot be given a cache of keys and values: it could not be proven right.

    Args:
        node: The node that stands in the way.
        reason: Why.
    """

    def __init__(self, node: str, reason: str) -> None:
        super().__init__(node, reason)
        self.node = node
        self.reason = reason

    @override
    def __str__(self) -> str:
        return (
            f"no cache can be added: {self.node!r}: {self.reason}; change the model there, or "
            "keep it as it is with --passes 'default,-add-kv-cache'"
        )


class AccuracyError(LlmoptError):
    """Outputs moved past the tolerance, or quality past its bound.

    Args:
        what: The case or metric that failed.
        measured: The value found.
        allowed: The bound it had to keep.
        hint: What to do next.
    """

    def __init__(self, what: str, measured: float, allowed: float, hint: str) -> None:
        super().__init__(what, measured, allowed, hint)
        self.what = what
        self.measured = measured
        self.allowed = allowed
        self.hint = hint

    @override
    def __str__(self) -> str:
        return f"{self.what}: {self.measured:.3g}, allowed {self.allowed:.3g}; {self.hint}"


class PassError(LlmoptError):
    """A pass left the Program invalid, or changed what it computes: our bug, or a plugin's.

    Args:
        name: The pass.
        problem: What is wrong after it.
        where: File and line of a pass that is not ours; empty for ours.
    """

    def __init__(self, name: str, problem: str, where: str = "") -> None:
        super().__init__(name, problem, where)
        self.name = name
        self.problem = problem
        self.where = where

    @override
    def __str__(self) -> str:
        if self.where:
            return (
                f"pass {self.name!r} ({self.where}) left the program invalid: {self.problem}; "
                "correct it there, or leave it out of --passes"
            )
        return (
            f"pass {self.name!r} left the program invalid: {self.problem}; "
            f"compile without it (--passes 'default,-{self.name}') and report it"
        )


class PassFailedError(PassError):
    """A pass that is not ours raised an exception, or returned no Outcome.

    Args:
        name: The pass.
        problem: The exception.
        where: File and line where it was raised.
    """

    @override
    def __str__(self) -> str:
        return (
            f"pass {self.name!r} failed at {self.where}: {self.problem}; "
            "correct it there, or leave it out of --passes"
        )


class ArtifactError(LlmoptError):
    """An artifact is damaged, incomplete, or written by a newer llmopt.

    Args:
        path: The artifact or the file in it.
        problem: What is wrong with it.
    """

    def __init__(self, path: str | Path, problem: str) -> None:
        super().__init__(str(path), problem)
        self.path = Path(path)
        self.problem = problem

    @override
    def __str__(self) -> str:
        return f"{self.path}: {self.problem}; compile it again, or update llmopt if it is newer"


class BundleError(ArtifactError):
    """A bundle is damaged, or is not what it claims to be."""

    @override
    def __str__(self) -> str:
        return f"{self.path}: {self.problem}; get it again from where it came from"


class SignatureError(BundleError):
    """A bundle has no signature, or not that of the key or certificate that was given."""

    @override
    def __str__(self) -> str:
        return f"{self.path}: {self.problem}; do not use it before its sender has explained that"


class StorageError(LlmoptError):
    """The output could not be written.

    Args:
        path: Where it was to go.
        problem: What the system said.
    """

    def __init__(self, path: str | Path, problem: str) -> None:
        super().__init__(str(path), problem)
        self.path = Path(path)
        self.problem = problem

    @override
    def __str__(self) -> str:
        return f"{self.path}: {self.problem}; free space or choose another place with -o"


class BackendUnavailableError(LlmoptError):
    """A backend cannot build or run on this machine.

    Args:
        backend: The backend's name.
        reason: What is absent, in words a user can act on.
    """

    exit_code: ClassVar[int] = 3

    def __init__(self, backend: str, reason: str) -> None:
        super().__init__(backend, reason)
        self.backend = backend
        self.reason = reason

    @override
    def __str__(self) -> str:
        return f"backend {self.backend!r} cannot run here: {self.reason}"


class NoVariantError(BackendUnavailableError):
    """No variant of a bundle suits this machine.

    Args:
        path: The bundle.
        reasons: ``variant: reason`` for each.
    """

    def __init__(self, path: str | Path, reasons: Iterable[str]) -> None:
        self.reasons = list(reasons)
        super().__init__(str(path), "; ".join(self.reasons))
        self.path = Path(path)

    @override
    def __str__(self) -> str:
        return (
            f"{self.path}: no variant suits this machine: {self.reason}; bundle one that does "
            "with `llmopt bundle create`"
        )
