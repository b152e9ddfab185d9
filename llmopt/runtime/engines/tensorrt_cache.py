"""Engines that were built on this machine, kept for the next time."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path
from typing import Any, Final

from llmopt.artifact.manifest import Manifest
from llmopt.errors import LlmoptError
from llmopt.runtime.engines.cuda_driver import Driver
from llmopt.runtime.engines.tensorrt_build import build_engine
from llmopt.runtime.engines.tensorrt_recipe import EngineRecipe

VARIABLE: Final = "LLMOPT_CACHE"


def cached_engine(
    folder: Path, manifest: Manifest, recipe: EngineRecipe, trt: Any, driver: Driver
) -> tuple[bytes, bool]:
    """Return the engine of an artifact for this GPU, and whether it was built just now.

    Raises:
        ArtifactError: The parser does not take the network.
        LlmoptError: The builder fails.
    """
    path = cache_folder() / f"{key(manifest, recipe, str(trt.__version__), driver)}.engine"
    if path.is_file():
        return path.read_bytes(), False
    engine = build_engine(trt, folder / recipe.network, recipe, None).engine
    _keep(path, engine)
    return engine, True


def cache_folder() -> Path:
    """Return where engines are kept: ``$LLMOPT_CACHE``, else the user's cache."""
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "llmopt" / "engines"


def key(manifest: Manifest, recipe: EngineRecipe, version: str, driver: Driver) -> str:
    """Return what an engine depends on, digested: network, sizes, GPU, driver and TensorRT."""
    files = sorted((file.path, file.sha256) for file in manifest.files)
    facts = (driver.name, driver.capability, driver.version, version, recipe.to_json(), files)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def _keep(path: Path, engine: bytes) -> None:
    """Write an engine in one piece, so that a reader never sees half of one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        partial.write_bytes(engine)
        partial.replace(path)
    except OSError as error:
        problem = error.strerror or str(error)
        raise LlmoptError(
            f"{path.parent}: the engine cannot be kept there ({problem}); set {VARIABLE} to a "
            "folder with room"
        ) from error
