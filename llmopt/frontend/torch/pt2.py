"""``.pt2`` files of ``torch.export.save``, read without executing anything in them.

torch's own loader trusts the file: it unpickles weights, constants and sample inputs where a safe
load fails, opens compiled libraries, evaluates the expressions of dimensions as Python, and looks
operators up by any name in the file. So every part of the archive is checked first, with the reader
that torch will use, and only what is known to be harmless is passed to torch.
"""

from __future__ import annotations

import ast
import io
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch.export import ExportedProgram
from torch.export.pt2_archive._package import PT2ArchiveReader, load_pt2

from llmopt.errors import PickleRefusedError, SourceError
from llmopt.frontend.torch.trace import quiet

_AGAIN: Final = "save it again with torch.export.save"
_OPERATORS: Final = re.compile(
    r"torch\.ops\.(aten|prims)\.(?!from_file\b)\w+(\.\w+)?"
    r"|torch\.ops\.higher_order\.(wrap_with_set_grad_enabled|wrap_with_autocast)"
    r"|torch\.(sym_\w+|_check|_check_is_size)"
    r"|_operator\.(add|sub|mul|truediv|floordiv|mod|pow|neg|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)"
    r"|math\.\w+"
)
_WORD: Final = re.compile(r"[\w.:+-]*\Z")
_FUNCTIONS: Final = frozenset(
    re.findall(
        r"\w+",
        """
        Symbol Integer Float Rational Add Mul Pow Max Min Mod Abs floor ceiling And Or Not Identity
        Equality Unequality StrictLessThan LessThan StrictGreaterThan GreaterThan
        Eq Ne Lt Le Gt Ge FloorDiv ModularIndexing Where PythonMod CleanDiv CeilToInt FloorToInt
        CeilDiv LShift RShift PowByNatural FloatPow FloatTrueDiv IntTrueDiv TruncToFloat TruncToInt
        RoundToInt ToFloat RoundDecimal IsNonOverlappingAndDenseIndicator
        """,
    )
)
_VALUES: Final = frozenset({"int_oo", "oo", "true", "false", "zoo", "nan"})
_TREES: Final = (
    None,
    "builtins.tuple",
    "builtins.list",
    "builtins.dict",
    "collections.OrderedDict",
)


def load_exported(path: Path, *, trust: bool) -> ExportedProgram:
    """Return the exported program in a file.

    Args:
        path: The file.
        trust: Whether the file may execute code.

    Raises:
        PickleRefusedError: Something in the file would be executed.
        SourceError: The file is damaged, or of an older format that is not supported.
    """
    try:
        if not trust:
            _inspect(path)
        with quiet():
            programs = load_pt2(str(path)).exported_programs
    except PickleRefusedError:
        raise
    except Exception as error:  # a damaged archive may raise anything
        problem = f"not a readable exported program ({_brief(error)})"
        raise SourceError(path, problem, _AGAIN) from error
    if len(programs) != 1:
        raise SourceError(path, f"it holds {len(programs)} programs", "save one program in a file")
    exported: ExportedProgram = next(iter(programs.values()))
    return exported


def _brief(error: BaseException) -> str:
    line = str(error).strip().partition("\n")[0][:160]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _inspect(path: Path) -> None:
    """Raise if anything in the archive could execute code.

    Raises:
        PickleRefusedError: A part could; the message names it.
    """
    with PT2ArchiveReader(str(path)) as archive:
        names = archive.get_file_names()
        for name in names:
            reason = _part(archive, name)
            if reason is not None:
                raise PickleRefusedError(path, reason)
        if len(set(names)) != len(names):
            raise PickleRefusedError(path, "two of its parts share a name")


def _part(archive: PT2ArchiveReader, name: str) -> str | None:
    """Return why a part of the archive could execute code, or None."""
    if name.startswith("data/aotinductor/"):
        return "it carries compiled libraries"
    if name.startswith("models/"):
        return next(_program(json.loads(archive.read_bytes(name))), None)
    if name.endswith("_config.json"):
        return _payloads(json.loads(archive.read_bytes(name)))
    pickled = name.startswith("data/sample_inputs/") or name.endswith(".pt")
    return _pickle(archive.read_bytes(name), name) if pickled or _is_zip(archive, name) else None


def _is_zip(archive: PT2ArchiveReader, name: str) -> bool:
    """Return whether a weight or constant is stored by torch.save, not as plain bytes."""
    if not name.startswith(("data/weights/", "data/constants/")):
        return False
    content = archive.read_bytes(name)
    return content.startswith((b"PK\x03\x04", b"\x80\x02"))


def _pickle(content: bytes, name: str) -> str | None:
    if not content:
        return None
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, LookupError) as error:
        match = re.search(r"GLOBAL ([\w.]+)", str(error))
        return f"its part {name} needs {match[1] if match else 'objects'} to be unpickled"
    return None


def _payloads(config: Any) -> str | None:
    """Return a reason if a constant is an object, or a weight needs the full unpickler."""
    for name, entry in config.get("config", {}).items():
        file = str(entry.get("path_name", ""))
        if entry.get("use_pickle") or not file.startswith(("weight_", "tensor_")):
            return f"{name!r} in it is pickled"
    return None


def _program(node: Any, key: str = "") -> Iterator[str]:
    """Yield a reason for each string of the program that torch could execute."""
    if isinstance(node, dict):
        for name, part in node.items():
            if not _WORD.match(name) and key not in _TEXT:
                yield f"its program has a field {name[:60]!r}"
            yield from _program(part, name) if name not in _TEXT else ()
    elif isinstance(node, list):
        for part in node:
            yield from _program(part, key)
    elif isinstance(node, str):
        yield from _string(node, key)


_TEXT: Final = frozenset({"metadata", "guards_code"})
"""Fields that nothing looks up: provenance of nodes; guards are never compiled."""


def _string(text: str, key: str) -> Iterator[str]:
    if key in ("in_spec", "out_spec"):
        yield from _tree(json.loads(text)[1])
    elif key == "expr_str":
        if not harmless(text):
            yield f"its program evaluates {text[:60]!r}"
    elif key == "target" and text.startswith(_LOOKED_UP):
        if not _OPERATORS.fullmatch(text):
            yield f"its program calls {text[:60]}"
    elif key != "as_string" and not _WORD.match(text):
        yield f"its program has {text[:60]!r} for a {key}"


_LOOKED_UP: Final = ("torch", "_operator", "math")
"""Prefixes of names that torch looks up, part by part: ``torchx.os`` is torch's os."""


def _tree(spec: Any) -> Iterator[str]:
    """Yield a reason for each tree of another type: torch imports modules that some name."""
    if spec["type"] not in _TREES or "__enum__" in str(spec["context"]):
        yield f"its arguments are a {spec['type']}"
    for child in spec["children_spec"]:
        yield from _tree(child)


def harmless(expression: str) -> bool:
    """Return whether an expression only calls functions on numbers and symbols.

    >>> harmless("Mul(Integer(8), Symbol('s75', positive=True))")
    True
    >>> harmless("__import__('os').system('x')")
    False
    """
    try:
        tree = ast.parse(expression, mode="eval")
    except SyntaxError:
        return False
    return all(_plain(node) for node in ast.walk(tree))


_SYNTAX: Final = (
    ast.Expression, ast.keyword, ast.Load, ast.UnaryOp, ast.BinOp, ast.operator, ast.unaryop,
)  # fmt: skip


def _plain(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
    if isinstance(node, ast.Name):
        return node.id in _FUNCTIONS | _VALUES or bool(re.fullmatch(r"[a-z]+\d+", node.id))
    if isinstance(node, ast.Constant):
        numeric = isinstance(node.value, int | float)
        return numeric or (
            isinstance(node.value, str) and bool(re.fullmatch(r"[\w.+-]*", node.value))
        )
    return isinstance(node, _SYNTAX)
