"""What every test shares: ``programs`` beside this file, and how Hypothesis runs."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from support.traced import Traced

settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("local", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write golden cases as they come out now"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--update-golden") and os.environ.get("CI"):
        raise pytest.UsageError("--update-golden is refused in CI: review golden cases by hand")


@pytest.fixture(scope="session")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    """The tiny Llama, traced once for all tests of this process."""
    from support.traced import Traced

    return Traced.llama(tmp_path_factory.mktemp("traced") / "llama")


@pytest.fixture(scope="session", autouse=True)
def _coverage_looks_away_from_torch() -> None:
    """Let torch trace and export unwatched: watching makes it twice as slow, and it is not ours.

    What of ours is called in there are definitions of models, which are called without it, too.
    """
    if sys.gettrace() is None:
        return
    import torch.export
    import torch.onnx

    for module in (torch.export, torch.onnx):
        module.export = _unwatched(module.export)  # type: ignore[attr-defined]


def _unwatched(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        watching = sys.gettrace()
        sys.settrace(None)
        try:
            return call(*args, **kwargs)
        finally:
            sys.settrace(watching)

    return run
