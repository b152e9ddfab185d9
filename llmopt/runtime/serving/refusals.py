"""Errors as OpenAI's clients expect them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmopt.errors import LlmoptError


@dataclass(eq=False)
class RefusedError(LlmoptError):
    """A request is not answered; the client alone sees why.

    Args:
        status: The status code of HTTP.
        problem: The fault, and what to do next.
        parameter: The key of the request that is at fault; None for none.
        code: The code that OpenAI has for it; None where it has none.
    """

    status: int
    problem: str
    parameter: str | None = None
    code: str | None = None
    message = "{problem}"

    def body(self) -> dict[str, Any]:
        """Return the JSON object that says so."""
        return {
            "error": {
                "message": self.problem,
                "type": _type(self.status),
                "param": self.parameter,
                "code": self.code,
            }
        }


def _type(status: int) -> str:
    """Return OpenAI's word for a kind of error.

    >>> _type(404), _type(429), _type(500)
    ('invalid_request_error', 'rate_limit_error', 'server_error')
    """
    if status >= 500:
        return "server_error"
    return "rate_limit_error" if status == 429 else "invalid_request_error"
