"""Passes of others: from files and modules, as classes, and from installed packages.

What is wrong with one is reported in a line that says where: it is never our bug. A pass that the
user asked for is an error then; an installed package that nobody asked for is a warning.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import logging
import os
import re
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoints, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from llmopt.errors import LlmoptError, PassError, PassFailedError, PluginError
from llmopt.ir.program import Program
from llmopt.origin import PACKAGE, defined_at, is_ours, one_line, raised_at, source_of
from llmopt.passes.base import Outcome, Pass
from llmopt.spelling import options_of

Plugin = str | type[Pass]
logger = logging.getLogger("llmopt")
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*\Z")


def passes_with(plugins: Iterable[Plugin]) -> dict[str, type[Pass]]:
    """Return every known pass by name: ours, those installed, and those of ``plugins``.

    Args:
        plugins: Python files, names of modules, or classes.

    Raises:
        PluginError: One cannot be used, or a name is taken.
    """
    from llmopt.passes import PASSES, known_passes

    known = known_passes()
    for plugin in plugins:
        for name, cls in load_plugin(plugin).items():
            other = known.get(name, cls)
            if other is not cls:
                whose = "llmopt's own" if name in PASSES else f"that of {defined_at(other)}"
                raise PluginError(
                    defined_at(cls), f"its pass {name!r} has the name of {whose}", "rename it"
                )
            known[name] = cls
    return known


def load_plugin(plugin: Plugin) -> dict[str, type[Pass]]:
    """Return the passes that a Python file or module defines, or a class by its name.

    Raises:
        PluginError: It cannot be imported, defines no pass, or one that cannot be used.
    """
    if not isinstance(plugin, str | os.PathLike):
        cls = checked(plugin)
        return {cls.name: cls}
    module = _imported(os.fspath(plugin))
    top = module.__name__.partition(".")[0]
    classes = [
        value
        for value in dict.fromkeys(v for v in vars(module).values() if isinstance(v, type))
        if issubclass(value, Pass) and value.__module__.partition(".")[0] in {top, _others(value)}
    ]
    named = [cls for cls in classes if hasattr(cls, "name") and not _is_base(cls, classes)]
    if not named:
        at = "".join(f"; {cls.__name__} ({defined_at(cls)}) has no name" for cls in classes[:1])
        problem = f"it defines no subclass of llmopt.Pass with a name{at}"
        raise PluginError(os.fspath(plugin), problem, "docs/custom-passes.md shows one")
    found: dict[str, type[Pass]] = {}
    for cls in named:
        if found.setdefault(checked(cls).name, cls) is not cls:
            where = defined_at(found[cls.name])
            raise PluginError(
                defined_at(cls),
                f"its pass {cls.name!r} has the name of that of {where}",
                "rename it",
            )
    return found


def checked(cls: Any) -> type[Pass]:
    """Return a pass that pipelines can name and make.

    Raises:
        PluginError: It has no name that text can spell, no ``run``, or an option of another type.
    """
    if not (isinstance(cls, type) and issubclass(cls, Pass)):
        raise PluginError(
            repr(cls), "it is not a subclass of llmopt.Pass", "derive it from llmopt.Pass"
        )
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not _NAME.match(name) or name == "default":
        problem = f"{cls.__name__} has the name {name!r}"
        raise PluginError(defined_at(cls), problem, "name it in letters, digits and hyphens")
    if inspect.isabstract(cls):
        problem = f"{cls.__name__} has no method run(self, program)"
        raise PluginError(defined_at(cls), problem, "define it, and return an llmopt.Outcome")
    options_of(cls)
    return cls


def installed(group: str, ours: Mapping[str, str], base: type[Any]) -> dict[str, type[Any]]:
    """Return the entry points of other packages in a group; broken ones are reported.

    Args:
        group: ``"llmopt.passes"`` or ``"llmopt.backends"``.
        ours: Our own, whose names are taken.
        base: Base class that each has to be a subclass of.
    """
    found: dict[str, type[Any]] = {}
    for entry in _entries(group, tuple(sys.path)):
        package = entry.dist.name if entry.dist is not None else entry.value
        try:
            cls = entry.load()
            problem = _unusable(cls, entry.name, base, {*ours, *found})
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a stranger's module does
            problem = f"cannot be imported: {one_line(error)} ({raised_at(error)})"
        if problem:
            told = "package %s: its %r of %s is left out, it %s; update or uninstall the package"
            logger.warning(told, package, entry.name, group, problem)
        else:
            found[entry.name] = cls
    return found


@functools.cache
def _entries(group: str, path: tuple[str, ...]) -> EntryPoints:  # noqa: ARG001 - what is searched: the key
    """Return a group of entry points; looking through all packages is slow, and done once."""
    return entry_points(group=group)


def _unusable(cls: Any, name: str, base: type[Any], taken: set[str]) -> str:
    if not (isinstance(cls, type) and issubclass(cls, base)):
        return f"is not a subclass of llmopt's {base.__name__}"
    if getattr(cls, "name", None) != name:
        return f"calls itself {getattr(cls, 'name', None)!r}"
    if name in taken:
        return "has a name that is taken"
    if issubclass(cls, Pass):
        try:
            checked(cls)
        except PluginError as error:
            return f"cannot be used: {error.problem} ({error.where})"
    return ""


def run_guarded(item: Pass, program: Program) -> Outcome:
    """Run a pass; an exception in one that is not ours is reported as its own.

    Raises:
        PassFailedError: It raised an exception, or returned no Outcome.
    """
    if is_ours(type(item)):
        return item.run(program)
    try:
        outcome: Any = item.run(program)
    except LlmoptError:
        raise
    except Exception as error:
        where = raised_at(error, source_of(type(item)))
        raise PassFailedError(item.name, one_line(error), where) from error
    if not isinstance(outcome, Outcome):
        problem = f"run returned {type(outcome).__name__}, not llmopt.Outcome"
        raise PassFailedError(item.name, problem, defined_at(type(item)))
    return outcome


def invalid(item: Pass, problem: str) -> PassError:
    """Return the error of a pass that left the Program invalid, saying where it is not ours."""
    cls = type(item)
    return PassError(item.name, problem, "" if is_ours(cls) else defined_at(cls))


def _imported(plugin: str) -> ModuleType:
    hint = "correct it there"
    try:
        if plugin.endswith(".py"):
            return _from_file(plugin)
        return importlib.import_module(plugin)
    except PluginError:
        raise
    except ModuleNotFoundError as error:
        if error.name and plugin.partition(".")[0] == error.name.partition(".")[0]:
            hint = "give a .py file, or a module that Python finds"
        else:
            hint = "install it into the environment of llmopt"
        where = raised_at(error, str(Path(plugin).resolve())) or plugin
        raise PluginError(where, one_line(error), hint) from error
    except (Exception, SystemExit) as error:
        where = raised_at(error, str(Path(plugin).resolve())) or plugin
        raise PluginError(where, f"cannot be imported: {one_line(error)}", hint) from error


def _from_file(plugin: str) -> ModuleType:
    """Return the module of a file, under a name that no other file has."""
    path = Path(plugin).resolve()
    if not path.is_file():
        raise PluginError(plugin, "no such file", "give a .py file, or a module that Python finds")
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    name = f"plugin_{path.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _others(cls: type[Any]) -> str:
    """Return the package of a class that is not ours: what it re-exports is meant."""
    package = cls.__module__.partition(".")[0]
    return package if package != PACKAGE else ""


def _is_base(cls: type[Any], classes: Iterable[type[Any]]) -> bool:
    """Whether a class only is what others derive from."""
    derived = any(issubclass(other, cls) and other is not cls for other in classes)
    return inspect.isabstract(cls) and derived
