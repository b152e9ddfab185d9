"""An artifact behind HTTP, in the shapes of OpenAI's API: completions, chat and embeddings."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Final

from llmopt.errors import BackendUnavailableError

_NEEDED: Final = ("starlette", "uvicorn")


def require_server() -> None:
    """Raise unless the library that serves is here.

    Raises:
        BackendUnavailableError: It is not installed.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        reason = f"{' and '.join(missing)} not installed; pip install 'llmopt[serve]'"
        raise BackendUnavailableError("serve", reason)
