"""The arm64 machine that artifacts and kernels run on."""

from __future__ import annotations

import pytest
from edge.arm64 import Arm64, MissingError, machine


@pytest.fixture(scope="session")
def emulated() -> Arm64:
    """The arm64 machine, or a skip that says what it needs."""
    try:
        return machine()
    except MissingError as error:
        pytest.skip(f"needs an arm64 machine: {error}")
