"""Typed fields of parsed JSON, with errors that name the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmopt.errors import ArtifactError

_MISSING = object()


class Fields:
    """A JSON object, read key by key; other keys are ignored.

    Args:
        data: Parsed value, which must be an object.
        where: File of the JSON, for messages.
        path: Keys from the top level to the object.
    """

    def __init__(self, data: object, where: Path, path: str = "") -> None:
        self._where = where
        self._path = path
        if not isinstance(data, dict):
            raise ArtifactError(where, f"{path or 'the top level'} is not a JSON object")
        self._data: dict[str, Any] = data

    def bad(self, key: str, expected: str) -> ArtifactError:
        """Return the error to raise when the value of ``key`` is not as expected."""
        return ArtifactError(self._where, f"{self._full(key)} should be {expected}")

    def text(self, key: str, default: str | None = None) -> str:
        """Return the string at ``key``, which is required without a ``default``."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self.bad(key, "a string")
        return value

    def number(self, key: str, default: int | None = None) -> int:
        """Return the integer at ``key``, which is required without a ``default``."""
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.bad(key, "an integer")
        return value

    def maybe_text(self, key: str) -> str | None:
        """Return the string at ``key``, or None if it is null or absent."""
        return None if self._data.get(key) is None else self.text(key)

    def maybe_number(self, key: str) -> int | None:
        """Return the integer at ``key``, or None if it is null or absent."""
        return None if self._data.get(key) is None else self.number(key)

    def numbers(self, key: str) -> tuple[int, ...]:
        """Return the integers at ``key``, none if it is absent."""
        values = self._list(key)
        if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
            raise self.bad(key, "a list of integers")
        return tuple(values)

    def texts(self, key: str) -> tuple[str, ...]:
        """Return the strings at ``key``, none if it is absent."""
        values = self._list(key)
        if not all(isinstance(value, str) for value in values):
            raise self.bad(key, "a list of strings")
        return tuple(values)

    def dimensions(self, key: str) -> tuple[str | int, ...]:
        """Return the shape at ``key``: integers and names."""
        values = self._list(key)
        if not all(isinstance(value, str | int) for value in values):
            raise self.bad(key, "a list of integers and names")
        return tuple(values)

    def mapping(self, key: str) -> dict[str, Any]:
        """Return the object at ``key`` as a dict, empty if it is absent."""
        value: object = self._data.get(key) or {}
        if not isinstance(value, dict):
            raise self.bad(key, "an object")
        return value

    def child(self, key: str) -> Fields:
        """Return the object at ``key``, empty if it is absent or null."""
        return Fields(self._data.get(key) or {}, self._where, self._full(key))

    def items(self, key: str) -> list[Fields]:
        """Return the objects in the list at ``key``, none if it is absent."""
        full = self._full(key)
        return [Fields(v, self._where, f"{full}[{i}]") for i, v in enumerate(self._list(key))]

    def _list(self, key: str) -> list[Any]:
        value = self._data.get(key, [])
        if not isinstance(value, list):
            raise self.bad(key, "a list")
        return value

    def _value(self, key: str, default: object) -> object:
        value = self._data.get(key, _MISSING)
        if value is not _MISSING:
            return value
        if default is None:
            raise ArtifactError(self._where, f"{self._full(key)} is missing")
        return default

    def _full(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key
