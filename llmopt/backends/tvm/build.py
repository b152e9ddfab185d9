"""A module of Relax becomes a shared library, linked without a compiler on the machine.

TVM's LLVM writes object files; LLVM's linker, which PyPI has in ziglang, joins them.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from llmopt.backends.tvm import api
from llmopt.backends.tvm.features import Processor
from llmopt.errors import BackendUnavailableError, LlmoptError

LINKER: Final = "pip install 'llmopt[cpu]' (ziglang, which links the library)"


def build(module: Any, processor: Processor, library: Path) -> None:
    """Compile ``module`` for a processor into the shared library ``library``.

    Raises:
        BackendUnavailableError: ziglang is not installed.
        LlmoptError: the linker failed.
    """
    if find_spec("ziglang") is None:
        raise BackendUnavailableError("tvm", LINKER)
    executable = api.compiled(module, processor.target)

    executable.export_library(str(library), fcompile=link)


def link(output: str, objects: Sequence[str], **_: Any) -> None:
    """Join object files into a shared library for their machine, with no debug symbols.

    What they call of the C library is found when the library is opened: no library of the target
    is needed here.
    """
    command = [sys.executable, "-m", "ziglang", "ld.lld", "-shared", "-s", "-o", output]
    command += objects
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own command
    if done.returncode:
        raise LlmoptError(f"ziglang could not link {output}: {done.stderr.strip()[-500:]}")
