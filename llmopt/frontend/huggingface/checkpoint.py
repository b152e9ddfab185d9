"""Checkpoints, recognized by content and read one tensor at a time.

A checkpoint is opened without reading its weights: only headers are parsed, and the sizes they
declare are compared with the size of the file. `Checkpoint.read` then copies one tensor out.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from llmopt.errors import SourceError, SourceNotFoundError
from llmopt.frontend.base import Checkpoint, unreadable

SOURCES = "give a .safetensors, .gguf or .bin file, its index .json, or a folder that contains them"
_LFS = b"version https://git-lfs"
_SAFETENSORS = ("model.safetensors.index.json", "model.safetensors")
_BIN = ("pytorch_model.bin.index.json", "pytorch_model.bin")


def open_checkpoint(path: Path, *, trust_pickle: bool = False) -> Checkpoint:
    """Return the checkpoint at ``path``; its kind is recognized by content, not by suffix.

    Args:
        path: A file, an index of shards, or a folder that holds one of them.
        trust_pickle: Whether a ``.bin`` file may execute code that it carries.

    Raises:
        SourceNotFoundError: Nothing is there, or the folder holds no weights.
        SourceError: The file is damaged or of an unknown kind.
        PickleRefusedError: Reading it would execute code and ``trust_pickle`` is false.
    """
    weights = _weights_in(path) if path.is_dir() else [path]
    main = weights[0]
    if not main.is_file():
        raise SourceNotFoundError(path, SOURCES)
    match _kind(main):
        case "gguf":
            from llmopt.frontend.gguf.checkpoint import GgufCheckpoint

            return GgufCheckpoint(main)
        case "torch":
            from llmopt.frontend.huggingface.torch_bin import TorchBinCheckpoint

            return TorchBinCheckpoint(path, shards(main), trust_pickle=trust_pickle)
        case "safetensors":
            from llmopt.frontend.huggingface.safetensors import SafetensorsCheckpoint

            return SafetensorsCheckpoint(path, shards(main))
    raise SourceError(main, "unknown kind of weights file", SOURCES)


def digest(path: Path) -> str:
    """Return the sha256 (hex) of the weights and config of a file or folder, read in pieces.

    For a single file it is the file's own sha256; for a folder or an index it covers the names and
    contents of config.json, the index and every shard.

    Raises:
        SourceNotFoundError: Nothing is there, or the folder holds no weights.
    """
    files = _digested(path)
    if files == [path]:
        return _file_digest(path).hex()
    combined = hashlib.sha256()
    for file in files:
        combined.update(file.name.encode() + b"\0" + _file_digest(file))
    return combined.hexdigest()


def shards(main: Path) -> dict[Path, frozenset[str] | None]:
    """Return the files of the weights and, if there is an index, the names listed for each.

    Raises:
        SourceError: The index is damaged, or names a shard that is missing.
    """
    if main.suffix != ".json":
        return {main: None}
    weight_map = _weight_map(main)
    listed: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        listed.setdefault(main.parent / file, set()).add(name)
    missing = sorted(file.name for file in listed if not file.is_file())
    if missing:
        some = ", ".join(missing[:5])
        problem = f"{len(missing)} of {len(listed)} shards are missing: {some}"
        raise SourceError(main, problem, "finish the download")
    return {file: frozenset(listed[file]) for file in sorted(listed)}


def _weight_map(index: Path) -> dict[str, str]:
    """Return tensor name -> file name, checked to stay inside the folder of the index."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        files = set(weight_map.values())
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(index, f"not an index of shards ({error!r})", "download it again") from (
            error
        )
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            problem = f"names a shard outside its folder: {file!r}"
            raise SourceError(index, problem, "list shards by plain file names")
    if not files:
        raise SourceError(index, "lists no tensors", "download it again")
    return dict(weight_map)


def _weights_in(folder: Path) -> list[Path]:
    """Return the weight files of a folder, the preferred first; safetensors before pickles."""
    for name in (*_SAFETENSORS, *_BIN):
        if (folder / name).is_file():
            return [folder / name]
    for pattern in ("*.safetensors", "*.gguf"):
        matches = sorted(folder.glob(pattern))
        if len(matches) == 1:
            return matches
        if matches:
            problem = f"holds {len(matches)} {pattern[1:]} files and no index"
            raise SourceError(folder, problem, "name one of them, or add the missing index .json")
    raise SourceNotFoundError(folder / _SAFETENSORS[-1], f"the folder has no weights; {SOURCES}")


def _digested(path: Path) -> list[Path]:
    if not path.exists():
        raise SourceNotFoundError(path, SOURCES)
    main = _weights_in(path)[0] if path.is_dir() else path
    files = {main, *_indexed(main)}
    if path.is_dir() and (path / "config.json").is_file():
        files.add(path / "config.json")
    return sorted(files)


def _indexed(main: Path) -> list[Path]:
    return list(shards(main)) if main.name.endswith(".index.json") else []


def _file_digest(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    except OSError as error:
        raise unreadable(file, error) from error


def _kind(file: Path) -> str:
    """Return ``"gguf"``, ``"torch"``, ``"safetensors"`` or ``"unknown"`` from the first bytes."""
    if file.name.endswith(".index.json"):
        return _kind(next(iter(shards(file))))
    try:
        with file.open("rb") as stream:
            start = stream.read(len(_LFS))
    except OSError as error:
        raise unreadable(file, error) from error
    if not start:
        raise SourceError(file, "is empty (0 bytes)", "download it again")
    if start == _LFS:
        problem = "is a Git LFS pointer, not the weights"
        raise SourceError(file, problem, "run `git lfs pull` where it came from")
    return _kind_of(start, file.suffix)


def _kind_of(start: bytes, suffix: str) -> str:
    if start.startswith(b"GGUF"):
        return "gguf"
    if start.startswith((b"PK\x03\x04", b"\x80")) and start[8:9] != b"{":
        return "torch"
    if start[8:9] == b"{" or suffix == ".safetensors":
        return "safetensors"
    # a damaged file is reported as the kind that its suffix names
    return {".gguf": "gguf", ".bin": "torch", ".pt": "torch", ".pth": "torch"}.get(
        suffix, "unknown"
    )
