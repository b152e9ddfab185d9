"""The tokenizer files that an artifact carries, from a Hugging Face folder or a GGUF file."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from llmopt.errors import SourceError

_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
# vocabularies that transformers can convert to tokenizer.json
_SLOW = ("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model")
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
_AGAIN = "download it again"


def tokenizer_files(path: Path) -> dict[str, bytes]:
    """Return file name -> contents of the tokenizer at ``path``, empty if there is none.

    Args:
        path: A GGUF file, or a Hugging Face folder (or a file in one).

    Raises:
        SourceError: The tokenizer is damaged, or needs transformers to be converted.
        UnsupportedModelError: A GGUF file's tokenizer is of an unknown kind.
    """
    folder = path if path.is_dir() else path.parent
    ggufs = [path] if path.is_file() else sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1 and _is_gguf(ggufs[0]) and not (folder / _COPIED[0]).is_file():
        from llmopt.frontend.gguf.file import read_gguf
        from llmopt.frontend.gguf.tokenizer import gguf_tokenizer

        return gguf_tokenizer(read_gguf(ggufs[0]))
    return folder_tokenizer(folder)


def folder_tokenizer(folder: Path) -> dict[str, bytes]:
    """Return the tokenizer files of a Hugging Face folder; empty where it has none.

    Raises:
        SourceError: tokenizer.json is damaged, or missing and transformers, which could convert
            the older files, is not installed.
    """
    files = {name: _read(folder / name) for name in _COPIED if (folder / name).is_file()}
    if "tokenizer.json" in files:
        _check(folder / "tokenizer.json", files["tokenizer.json"])
        return files
    slow = [name for name in _SLOW if (folder / name).is_file()]
    if not slow:
        return {}
    return {**files, "tokenizer.json": _convert(folder, slow)}


def tokenizer_config(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the contents of tokenizer_config.json, empty if there is none.

    Raises:
        SourceError: It is not a JSON object.
    """
    return _object("tokenizer_config.json", files.get("tokenizer_config.json", b"{}"))


def chat_template(files: Mapping[str, bytes]) -> str | None:
    """Return the default chat template of a set of tokenizer files, or None.

    Raises:
        SourceError: tokenizer_config.json is damaged.
    """
    if "chat_template.jinja" in files:  # where newer transformers writes it; it wins there, too
        return files["chat_template.jinja"].decode()
    template = tokenizer_config(files).get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {each.get("name"): each.get("template") for each in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def special_tokens(files: Mapping[str, bytes]) -> dict[str, str]:
    """Return ``"bos_token"``, ``"eos_token"`` and so on with the text of each that is set.

    Raises:
        SourceError: A file is damaged.
    """
    mapped = _object("special_tokens_map.json", files.get("special_tokens_map.json", b"{}"))
    merged = mapped | {key: value for key, value in tokenizer_config(files).items() if value}
    texts = {role: merged.get(role) for role in _ROLES}
    flat = {
        role: text.get("content") if isinstance(text, dict) else text
        for role, text in texts.items()
    }
    return {role: text for role, text in flat.items() if isinstance(text, str)}


def _is_gguf(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise SourceError(file, problem, "check the file's permissions") from error


def _object(name: str, raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise SourceError(Path(name), f"is not valid JSON ({error})", _AGAIN) from error
    if not isinstance(value, dict):
        raise SourceError(Path(name), "is not a JSON object", _AGAIN)
    return value


def _check(file: Path, raw: bytes) -> None:
    try:
        Tokenizer.from_str(raw.decode())
    except Exception as error:  # the library raises nothing narrower
        first = str(error).partition("\n")[0]
        raise SourceError(file, f"is not a tokenizer ({first})", _AGAIN) from error


def _convert(folder: Path, slow: list[str]) -> bytes:
    """Return tokenizer.json as transformers converts it from older vocabulary files."""
    slow_names = ", ".join(slow)
    if importlib.util.find_spec("transformers") is None:
        hint = "pip install 'llmopt[transformers]', or add tokenizer.json to the folder"
        raise SourceError(folder, f"has {slow_names} but no tokenizer.json", hint)
    from transformers import AutoTokenizer

    try:
        fast = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return str(fast.backend_tokenizer.to_str()).encode()
    except (OSError, ValueError, ImportError, AttributeError, KeyError, TypeError) as error:
        first = str(error).strip().partition("\n")[0]
        problem = f"{slow_names} could not be converted to tokenizer.json ({first})"
        raise SourceError(folder, problem, "add tokenizer.json to the folder") from error
