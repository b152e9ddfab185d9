"""The options of a pass: its fields, read from text by their types and written as text again."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from llmopt.errors import PluginError, UnknownNameError, UsageError
from llmopt.origin import defined_at
from llmopt.passes.base import Pass

MISSING: Final[Any] = dataclasses.MISSING
_PLAIN: Final[Mapping[Any, str]] = {int: "int", float: "float", str: "str", bool: "true or false"}
_BOOLS: Final[Mapping[str, bool]] = {"true": True, "false": False, "1": True, "0": False}
_UNIONS: Final = (types.UnionType, typing.Union)


@dataclass(frozen=True)
class Option:
    """One option of a pass.

    Args:
        name: What it is called.
        kind: Its type.
        default: What it is where it is not given; ``MISSING`` where it has to be.
        text: What the docstring says of it.
    """

    name: str
    kind: Any
    default: Any
    text: str = ""

    @property
    def expected(self) -> str:
        """What may be written: ``"int"``, ``"true or false"``, ``"fast or exact"``."""
        return " or ".join(_spelled_kind(kind) for kind in _alternatives(self.kind))

    def read(self, text: str) -> Any:
        """Return the value that ``text`` spells.

        Raises:
            ValueError: it spells none.
        """
        for kind in _alternatives(self.kind):
            with contextlib.suppress(KeyError, ValueError):
                return _read(kind, text)
        raise ValueError(text)


def options_of(cls: type[Pass]) -> tuple[Option, ...]:
    """Return the options of a pass in order: its fields, with the text of its docstring.

    Raises:
        PluginError: A type is none that text can spell.
    """
    kinds, texts = _kinds(cls), described(inspect.getdoc(cls) or "")
    options = []
    for field in _fields(cls):
        default = _default(field)
        option = Option(field.name, kinds[field.name], default, texts.get(field.name, ""))
        if not all(_is_spelled(kind) for kind in _alternatives(option.kind)):
            raise PluginError(
                _label(cls),
                f"option {field.name} is of a type that text cannot spell, {field.type}",
                "use int, float, str, bool, Literal, or one of these | None",
            )
        options.append(option)
    return tuple(options)


def make(cls: type[Pass], text: str) -> Pass:
    """Return the pass with the options of ``option=value,...``.

    Raises:
        UnknownNameError: It has no such option.
        UsageError: A value is not of the option's type, or the pass refuses it.
        PluginError: An option's type is none that text can spell.
    """
    known = {option.name: option for option in options_of(cls)}
    given: dict[str, Any] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        key, sign, value = (part.strip() for part in pair.partition("="))
        if key not in known:
            raise UnknownNameError(f"option of pass {cls.name}", key, known)
        if not sign or key in given:
            what = "is given twice" if key in given else "has no value"
            raise UsageError(f"option {key} of pass {cls.name} {what}: write {key}=VALUE once")
        try:
            given[key] = known[key].read(value)
        except ValueError:
            expected = known[key].expected
            problem = f"option {key}={value!r} of pass {cls.name}: expected {expected}"
            raise UsageError(f"{problem}; `llmopt passes {cls.name}` shows them all") from None
    for option in known.values():
        if option.default is MISSING and option.name not in given:
            needed = f"{cls.name}{{{option.name}={option.expected}}}"
            raise UsageError(f"pass {cls.name} needs its option {option.name}: write {needed}")
    try:
        return cls(**given)
    except (TypeError, ValueError) as error:
        spelled = f"{cls.name}{{{text}}}" if text else cls.name
        raise UsageError(
            f"pass {spelled} cannot be made: {error}; `llmopt passes {cls.name}` shows its options"
        ) from error


def spell(item: Pass) -> str:
    """Return the text that makes this pass again: only options that differ from the default."""
    changed = []
    for field in _fields(type(item)):
        value = getattr(item, field.name)
        if value != _default(field):
            changed.append(f"{field.name}={spell_value(value)}")
    return item.name + (f"{{{','.join(changed)}}}" if changed else "")


def spell_value(value: Any) -> str:
    """Return the text that is read as ``value``."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def described(doc: str) -> dict[str, str]:
    r"""Return what the ``Args`` section of a docstring says of each name.

    >>> described("Clamp.\n\nArgs:\n    low: The least,\n        exactly.\n    high: Not less.")
    {'low': 'The least, exactly.', 'high': 'Not less.'}
    """
    section = re.search(r"^Args:\n((?:[ ]+[^\n]*\n?|\n)+)", doc, re.MULTILINE)
    if section is None:
        return {}
    found = re.findall(r"^ {4}(\w+): ((?:.|\n(?! {4}\w+: ))+)", section[1], re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def _fields(cls: type[Any]) -> list[dataclasses.Field[Any]]:
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    return [field for field in fields if field.init]


def _default(field: dataclasses.Field[Any]) -> Any:
    made: Any = field.default_factory
    return field.default if made is MISSING else made()


def _kinds(cls: type[Pass]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except (NameError, TypeError, AttributeError, SyntaxError) as error:
        hint = "import the names of its annotations at the top of the file"
        raise PluginError(
            _label(cls), f"the types of its options are unknown: {error}", hint
        ) from (error)


def _label(cls: type[Pass]) -> str:
    return f"{defined_at(cls)}: pass {cls.name!r}"


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """Return the types that a value may have."""
    return typing.get_args(kind) if typing.get_origin(kind) in _UNIONS else (kind,)


def _is_spelled(kind: Any) -> bool:
    return kind in _PLAIN or kind is type(None) or typing.get_origin(kind) is Literal


def _spelled_kind(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(spell_value(value) for value in typing.get_args(kind))
    return "none" if kind is type(None) else _PLAIN[kind]


def _read(kind: Any, text: str) -> Any:
    """Return the value of one type.

    Raises:
        ValueError: The text spells none.
        KeyError: Likewise.
    """
    if typing.get_origin(kind) is Literal:
        return {spell_value(value): value for value in typing.get_args(kind)}[text]
    if kind is type(None):
        return {"none": None}[text]
    return _BOOLS[text.lower()] if kind is bool else kind(text)
