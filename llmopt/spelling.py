"""One spelling of passes, targets and schemes as text: ``name{option=value,...}``.

Options are the fields of a frozen dataclass, read from text by their types; those that differ from
their defaults are written as text again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, TypeVar

from llmopt.errors import PluginError, UnknownNameError, UsageError
from llmopt.origin import defined_at

MISSING: Final[Any] = dataclasses.MISSING
_PLAIN: Final[Mapping[Any, str]] = {int: "int", float: "float", str: "str", bool: "true or false"}
_BOOLS: Final[Mapping[str, bool]] = {"true": True, "false": False, "1": True, "0": False}
_UNIONS: Final = (types.UnionType, typing.Union)
_TEXT: Final = re.compile(r"(?P<name>[A-Za-z0-9_][A-Za-z0-9_-]*)(?:\{(?P<options>[^{}]*)\})?\Z")
_COMMA: Final = re.compile(r",(?![^{}]*\})")


class Named(Protocol):
    """A frozen dataclass of options, a pass, a target or a scheme, under a name."""

    @property
    def name(self) -> str:
        """The name, without options."""


T = TypeVar("T")


@dataclass(frozen=True)
class Option:
    """One option.

    Args:
        name: The field's name.
        kind: The field's type.
        default: The value where none is given; ``MISSING`` where one has to be.
        text: The line of the docstring.
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
            ValueError: The text spells none.
        """
        for kind in _alternatives(self.kind):
            with contextlib.suppress(KeyError, ValueError):
                return _read(kind, text)
        raise ValueError(text)


def listed(text: str) -> list[str]:
    """Return the items of a list, whose commas stand outside of braces.

    >>> listed("default, -merge-qkv, my-pass{limit=3,deep=true}")
    ['default', '-merge-qkv', 'my-pass{limit=3,deep=true}']
    """
    return [item.strip() for item in _COMMA.split(text)] if text.strip() else []


def split(text: str, noun: str) -> tuple[str, str]:
    """Return the name, and the text of the options.

    >>> split("tvm-cpu{mcpu=znver4}", "target")
    ('tvm-cpu', 'mcpu=znver4')

    Args:
        text: ``name`` or ``name{option=value,...}``.
        noun: The kind: ``"pass"``, ``"target"``, ``"scheme"``.

    Raises:
        UsageError: The text is not of that form.
    """
    match = _TEXT.match(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not a {noun}: write name or name{{option=value,...}}")
    return match["name"], match["options"] or ""


def written(text: str) -> tuple[str, dict[str, str]]:
    """Return the name and the options, unread, of a text that a manifest holds.

    >>> written("onnxruntime-cuda{graph=true,dtype=bfloat16}")
    ('onnxruntime-cuda', {'graph': 'true', 'dtype': 'bfloat16'})
    >>> written("from a later version")
    ('from a later version', {})
    """
    name, _, options = text.partition("{")
    pairs = (pair.partition("=") for pair in options.rstrip("}").split(",") if pair)
    return name, {key.strip(): value.strip() for key, _, value in pairs}


def name_of(text: str) -> str:
    """Return the name of a text that a manifest holds.

    >>> name_of("w4{block=64}")
    'w4'
    """
    return written(text)[0]


def options_of(cls: type[Any], noun: str = "pass") -> tuple[Option, ...]:
    """Return the options of a class in order: its fields, with the text of its docstrings.

    Args:
        cls: A dataclass, or a class without fields.
        noun: The kind of the class, for messages: ``"pass"``.

    Raises:
        PluginError: A type is none that text can spell.
    """
    fields = _fields(cls)
    kinds, texts = (_kinds(cls, noun), _texts(cls)) if fields else ({}, {})
    options = []
    for field in fields:
        default = _default(field)
        option = Option(field.name, kinds[field.name], default, texts.get(field.name, ""))
        if not all(_is_spelled(kind) for kind in _alternatives(option.kind)):
            raise PluginError(
                _label(cls, noun),
                f"option {field.name} is of a type that text cannot spell, {field.type}",
                "use int, float, str, bool, Literal, or one of these | None",
            )
        options.append(option)
    return tuple(options)


def read(options: Iterable[Option], text: str, owner: str, hint: str = "") -> dict[str, Any]:
    """Return the values of ``option=value,...``.

    Args:
        options: All options of the owner.
        text: The text between the braces.
        owner: Kind and name of the owner: ``"pass clamp"``.
        hint: The next step where a value is of another type.

    Raises:
        UnknownNameError: There is no such option.
        UsageError: A value is not of the option's type, is missing or is given twice.
    """
    known = {option.name: option for option in options}
    values: dict[str, Any] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        key, sign, value = (part.strip() for part in pair.partition("="))
        if key not in known:
            raise UnknownNameError(f"option of {owner}", key, known)
        if not sign or key in values:
            what = "is given twice" if key in values else "has no value"
            raise UsageError(f"option {key} of {owner} {what}: write {key}=VALUE once")
        try:
            values[key] = known[key].read(value)
        except ValueError:
            problem = f"option {key}={value!r} of {owner}: expected {known[key].expected}"
            raise UsageError("; ".join(filter(None, [problem, hint]))) from None
    return values


def make(cls: type[T], text: str, owner: str, hint: str = "") -> T:
    """Return the instance with the options of ``option=value,...``; arguments as of ``read``.

    Raises:
        UnknownNameError: It has no such option.
        UsageError: A value is not of the option's type, or the class refuses it.
        PluginError: An option's type is none that text can spell.
    """
    noun, _, name = owner.partition(" ")
    options = options_of(cls, noun)
    values = read(options, text, owner, hint)
    for option in options:
        if option.default is MISSING and option.name not in values:
            needed = f"{name}{{{option.name}={option.expected}}}"
            raise UsageError(f"{owner} needs its option {option.name}: write {needed}")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        spelled = f"{owner}{{{text}}}" if text else owner
        problem = f"{spelled} cannot be made: {error}"
        raise UsageError("; ".join(filter(None, [problem, hint]))) from error


def spell(value: Named, named: Collection[str] = ()) -> str:
    """Return the text that is read as ``value``: only options that differ from the default.

    Args:
        value: A pass, a target or a scheme.
        named: Fields that the name stands for, which are no options.
    """
    changed = []
    for field in _fields(type(value)):
        option = getattr(value, field.name)
        if field.name not in named and option != _default(field):
            changed.append(f"{field.name}={spell_value(option)}")
    return value.name + (f"{{{','.join(changed)}}}" if changed else "")


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
    entries = re.findall(r"^ {4}(\w+): ((?:.|\n(?! {4}\w+: ))+)", section[1], re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _fields(cls: type[Any]) -> list[dataclasses.Field[Any]]:
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    return [field for field in fields if field.init]


def _default(field: dataclasses.Field[Any]) -> Any:
    factory: Any = field.default_factory
    return field.default if factory is MISSING else factory()


def _texts(cls: type[Any]) -> dict[str, str]:
    """Return what the docstrings of a class and of its bases say of each field."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        texts |= described(inspect.cleandoc(base.__doc__ or ""))
    return texts


def _kinds(cls: type[Any], noun: str) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except (NameError, TypeError, AttributeError, SyntaxError) as error:
        hint = "import the names of its annotations at the top of the file"
        problem = f"the types of its options are unknown: {error}"
        raise PluginError(_label(cls, noun), problem, hint) from error


def _label(cls: type[Any], noun: str) -> str:
    return f"{defined_at(cls)}: {noun} {cls.name!r}"


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
        KeyError: The text is none of the words of that type.
    """
    if typing.get_origin(kind) is Literal:
        return {spell_value(value): value for value in typing.get_args(kind)}[text]
    if kind is type(None):
        return {"none": None}[text]
    return _BOOLS[text.lower()] if kind is bool else kind(text)
