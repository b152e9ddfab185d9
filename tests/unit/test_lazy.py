"""What is imported late, and what is said where a package of an extra is absent."""

from __future__ import annotations

import doctest
import re
import tomllib
from pathlib import Path

import pytest
from support.bare_device import ONNXRUNTIME, bare_python

import llmopt
from llmopt import lazy
from llmopt.errors import BackendUnavailableError, PackageMissingError

ROOT = Path(__file__).parents[2]
SAYS = "this needs the package onnx_ir, which is not installed; pip install 'llmopt[cpu]'"
DISTRIBUTIONS = {
    "ml_dtypes": "ml-dtypes",
    "onnx_ir": "onnx-ir",
    "tvm": "apache-tvm",
    "model_signing": "model-signing",
    "onnxruntime_genai": "onnxruntime-genai",
}
"""Packages that are imported by another name than they are installed by."""


@pytest.mark.parametrize(
    "line",
    [
        "targets",
        "passes",
        "compile model --target cpu",
        "opt model.onnx --passes default",
        "diff before.onnx after.onnx",
        "bisect model.onnx --passes default",
    ],
)
def test_a_command_without_the_compiler_says_what_to_install(line: str, tmp_path: Path) -> None:
    for name in ("model.onnx", "before.onnx", "after.onnx"):
        (tmp_path / name).touch()
    words = [str(tmp_path / w) if w.endswith(".onnx") else w for w in line.split()]

    done = bare_python((*ONNXRUNTIME, "click"), "-m", "llmopt", *words)

    assert done.stderr.splitlines()[-1] == f"Error: {SAYS}"
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert done.returncode == 3


@pytest.mark.parametrize(
    "code",
    [
        "llmopt.compile('model')",
        "llmopt.trace(None)",
        "llmopt.diff('a.onnx', 'b.onnx')",
        "llmopt.Pass",
        "llmopt.Pipeline",
        "llmopt.Program",
    ],
)
def test_python_without_the_compiler_gets_an_error_of_llmopt(code: str) -> None:
    script = f"import llmopt\ntry:\n    {code}\nexcept llmopt.LlmoptError as error:\n    "
    done = bare_python((), "-c", script + "print(type(error).__name__, error.exit_code, error)")

    assert done.stderr == ""
    assert done.stdout == f"PackageMissingError 3 {SAYS}\n"


@pytest.mark.parametrize("name", ["mine", "onnx_ir.mine", "llmopt.mine", ""])
def test_any_other_absent_module_is_left_to_the_importer(name: str) -> None:
    with pytest.raises(ModuleNotFoundError), lazy.extras_needed():
        raise ModuleNotFoundError(name=name)


def test_what_is_absent_is_the_cause() -> None:
    absent = ModuleNotFoundError(name="torch")
    with pytest.raises(PackageMissingError) as caught, lazy.extras_needed():
        raise absent

    assert caught.value.__cause__ is absent
    assert isinstance(caught.value, BackendUnavailableError)


def test_every_extra_installs_its_packages() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]

    def installed(extra: str) -> set[str]:
        found = set()
        for each in extras[extra]:
            if inner := re.match(r"llmopt\[(.*)\]", each):
                found |= {name for part in inner[1].split(",") for name in installed(part)}
            found.add(re.split(r"[^\w-]", each)[0])
        return found

    for package, extra in lazy.EXTRAS.items():
        if package != "tvm_ffi":  # apache-tvm brings it
            assert DISTRIBUTIONS.get(package, package) in installed(extra)


def test_public_names_are_listed_before_they_are_imported() -> None:
    done = bare_python((), "-c", "import llmopt; print(*dir(llmopt))")

    assert {*llmopt.__all__, "__version__"} <= {*done.stdout.split()}


def test_public_names_are_what_they_are_called() -> None:
    for name in llmopt.__all__:
        assert getattr(llmopt, name).__name__ == name


def test_there_is_no_other_name() -> None:
    with pytest.raises(AttributeError, match="module 'llmopt' has no attribute 'compil'"):
        _ = llmopt.compil


def test_examples_in_docstrings_hold() -> None:
    assert doctest.testmod(lazy).failed == 0
