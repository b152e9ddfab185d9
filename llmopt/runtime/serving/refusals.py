"""Errors as OpenAI's clients expect them."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from llmopt.errors import LlmoptError


class RefusedError(LlmoptError):
    """A request is not answered; the client is told, and nobody else.

    Args:
        status: Of HTTP.
        problem: What is wrong, and what to do next.
        parameter: The key of the request that it is about; None for none.
        code: OpenAI's name for it; None where it has none.
    """

    def __init__(
        self, status: int, problem: str, parameter: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(status, problem, parameter, code)
        self.status = status
        self.problem = problem
        self.parameter = parameter
        self.code = code

    @override
    def __str__(self) -> str:
        return self.problem

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
