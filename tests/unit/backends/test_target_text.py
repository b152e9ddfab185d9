"""Targets are text; a backend says what it has, and lists what it has not before any work."""

from __future__ import annotations

import pytest
from support.programs import program
from support.schemes import scheme_of

from llmopt.backends import ALIASES, BACKENDS, find_backend, known_backends
from llmopt.backends.base import ExampleBounds
from llmopt.backends.onnxruntime import OnnxRuntimeCpu, finish, installed
from llmopt.errors import UnknownNameError, UsageError


def test_a_target_and_its_alias_are_the_same_backend() -> None:
    assert find_backend("cpu") == find_backend("onnxruntime-cpu") == OnnxRuntimeCpu()
    assert {*ALIASES.values()} <= {*BACKENDS} <= {*known_backends()}


@pytest.mark.parametrize("name", known_backends())
def test_every_backend_describes_itself(name: str) -> None:
    cls = known_backends()[name]

    assert cls.name == name
    assert cls.summary
    assert cls.schemes
    lacks = cls().available().builds
    assert lacks == "" or "pip install" in lacks


def test_an_unknown_target_names_those_there_are() -> None:
    with pytest.raises(UnknownNameError, match="onnxruntime-cpu"):
        find_backend("onnxruntime-cpus")


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="threads"):
        find_backend("cpu{threads=2}")


@pytest.mark.parametrize("text", ["", "cpu{", "cpu}", "cpu{a=1}b", "cpu{flag}"])
def test_text_that_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        find_backend(text)


@pytest.mark.parametrize(
    "text",
    [
        "tvm-cpu{mcpu=znver4,without=avx512f+amx-tile}",
        "onnxruntime-cpu{ep=auto}",
        "onnxruntime-cuda{dtype=bfloat16,graph=true}",
        "tensorrt{chunk=64,percentile=99}",
        "tensorrt-rtx{percentile=99.9,calibration=text.txt,sm=89;120}",
    ],
)
def test_a_target_is_spelled_as_it_was_written(text: str) -> None:
    assert find_backend(text).target == text
    spaced = text.replace("=", " = ").replace(",", " , ").replace("{", "{ ")
    assert find_backend(f" {spaced} ").target == text


def test_options_with_the_values_they_have_anyway_are_left_out() -> None:
    text = "tensorrt{chunk=512,percentile=100.0,dtype=float16}"
    assert find_backend(text).target == "tensorrt"
    assert find_backend("gpu{graph=false}").target == "onnxruntime-cuda"


def test_an_option_of_another_type_says_what_is_expected() -> None:
    with pytest.raises(UsageError, match="option chunk='few' of target tensorrt: expected int"):
        find_backend("tensorrt{chunk=few}")
    with pytest.raises(UsageError, match=r"graph='maybe' .*: expected true or false"):
        find_backend("gpu{graph=maybe}")
    with pytest.raises(UsageError, match="option chunk of target tensorrt is given twice"):
        find_backend("tensorrt{chunk=1,chunk=2}")


def test_operators_without_a_kernel_are_listed() -> None:
    made = program(
        """main (float[B,4] x) => (float[B,4] y, float[B,4] z)
    { a = Swish (x)\n [odd] y = Relu (a)\n z = Relu (x) }"""
    )
    next(node for node in made.graph if node.name == "odd").op_type = "NoSuchOperator"

    assert find_backend("cpu").check(made) == ["no CPU kernel for NoSuchOperator ('odd')"]


def test_a_finished_model_imports_the_vendors_domain_only_where_it_is_used() -> None:
    made = program("main (float[B,4] x) => (float[B,4] y) { y = Swish (x) }")
    finish(made.model)
    assert "com.microsoft" not in made.graph.opset_imports

    for item in find_backend("cpu").passes(None):
        item.run(made)
    finish(made.model)

    assert made.graph.opset_imports["com.microsoft"] == 1


def test_an_absent_package_has_no_version() -> None:
    assert installed("no-such-package-anywhere") == "absent"


@pytest.mark.parametrize(
    ("target", "scheme", "bounds"),
    [
        ("onnxruntime-cpu", None, ExampleBounds(1e-3)),
        ("tvm-cpu", "w8", ExampleBounds(5e-2, 0.95)),
        ("onnxruntime-arm64", "w4{block=16}", ExampleBounds(1e-1, 0.95)),
        ("onnxruntime-cuda", "fp16", ExampleBounds(5e-2, 0.95)),
        ("tensorrt-rtx", "fp16", None),  # no engine runs where it is built
    ],
)
def test_what_a_device_may_be_off_follows_from_what_kernels_round(
    target: str, scheme: str | None, bounds: ExampleBounds | None
) -> None:
    assert find_backend(target).example_bounds(scheme_of(scheme)) == bounds
