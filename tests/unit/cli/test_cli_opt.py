"""llmopt opt: passes on one file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from llmopt.cli import opt


@pytest.fixture(scope="module")
def written_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SiLU written out, which a pass fuses, and a weight too large to print."""
    weight = onnx.numpy_helper.from_array(np.ones((16, 16), np.float32), "w")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "project"),
        helper.make_node("Sigmoid", ["h"], ["s"], "gate"),
        helper.make_node("Mul", ["h", "s"], ["y"], "swish"),
    ]
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["B", 16]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], [weight])
    path = tmp_path_factory.mktemp("opt") / "silu.onnx"
    opsets = [helper.make_opsetid("", 25)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=11), path)
    return path


def test_the_text_is_printed_and_each_pass_told(llmopt: Any, written_out: Path) -> None:
    result = llmopt("opt", written_out, "--passes", "canonicalize,fuse-activations")

    assert result.exit_code == 0, result.stderr
    assert "y = Swish" in result.stdout
    assert "Sigmoid" not in result.stdout
    assert 'w = ["location": "elided"]' in result.stdout
    lines = [line for line in result.stderr.splitlines() if not line.startswith("  ")]
    assert lines == ["canonicalize: 0 applied, 0 missed", "fuse-activations: 1 applied, 0 missed"]


def test_the_text_parses(llmopt: Any, written_out: Path) -> None:
    shown = llmopt("opt", written_out, "--passes", "fuse-activations").stdout

    assert [node.op_type for node in onnx.parser.parse_model(shown).graph.node] == [
        "MatMul",
        "Swish",
    ]


def test_the_result_is_written(llmopt: Any, written_out: Path, tmp_path: Path) -> None:
    line = ["opt", written_out, "--passes", "fuse-activations", "-o", tmp_path / "out.onnx"]
    result = llmopt(*line)

    assert result.stdout == ""
    model = onnx.load(tmp_path / "out.onnx")
    assert [node.op_type for node in model.graph.node] == ["MatMul", "Swish"]
    assert onnx.numpy_helper.to_array(model.graph.initializer[0]).sum() == 256
    assert llmopt(*line).exit_code == 2
    assert llmopt(*line, "--force").exit_code == 0


def test_large_weights_go_into_a_file_beside_it(
    llmopt: Any, written_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opt, "_EMBEDDED_BYTES", 100)
    passes = ["--passes", "fuse-activations"]
    result = llmopt("opt", written_out, *passes, "-o", tmp_path / "out.onnx")

    assert result.exit_code == 0, result.stderr
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["out.onnx", "out.onnx.data"]
    model = ir.load(tmp_path / "out.onnx")
    weight = model.graph.initializers["w"].const_value
    assert weight is not None
    assert weight.numpy().sum() == 256


def test_text_goes_in_and_out_with_its_weights(
    llmopt: Any, written_out: Path, tmp_path: Path
) -> None:
    text, back = tmp_path / "silu.ir", tmp_path / "back.onnx"

    assert llmopt("opt", written_out, "--passes", "fuse-activations", "-o", text).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["silu.ir", "silu.ir.data"]
    assert "Swish" in text.read_text()
    result = llmopt("opt", text, "--passes", "remove-dead", "--timing", "-o", back)

    assert result.exit_code == 0, result.stderr
    assert re.fullmatch(r"remove-dead: 0 applied, 0 missed, \d+\.\d ms\n", result.stderr)
    model = onnx.load(back)
    assert [node.op_type for node in model.graph.node] == ["MatMul", "Swish"]
    assert onnx.numpy_helper.to_array(model.graph.initializer[0]).sum() == 256


def test_a_program_with_a_cache_is_read_as_it_is(llmopt: Any, tmp_path: Path) -> None:
    graph = (
        "main (float[B,S,8] x, float[B,1,P,8] past_key_values.0.key) =>"
        " (float[B,1,T,8] present.0.key) <int64[4] sizes = {0,-1,1,8}>"
        '{ rows = Reshape (x, sizes)\n "layers.0" = Transpose <perm = [0,2,1,3]> (rows)\n'
        ' "present.0.key" = Concat <axis = 2> ("past_key_values.0.key", "layers.0") }'
    )
    for name in ("past_key_values.0.key", "present.0.key"):
        graph = graph.replace(f" {name}", f' "{name}"')
    (tmp_path / "cache.ir").write_text(graph, encoding="utf-8")
    line = ["--passes", "canonicalize", "-o", tmp_path / "cache.onnx"]

    assert llmopt("opt", tmp_path / "cache.ir", *line).exit_code == 0
    result = llmopt("opt", tmp_path / "cache.onnx", "--passes", "cancel-transposes")

    assert result.exit_code == 0, result.stderr
    assert '"present.0.key" = Concat' in result.stdout


def test_numbers_that_a_text_leaves_out_are_missed_by_who_reads_them(
    llmopt: Any, written_out: Path, tmp_path: Path
) -> None:
    shown = llmopt("opt", written_out, "--passes", "canonicalize").stdout
    (tmp_path / "shown.ir").write_text(shown, encoding="utf-8")

    again = llmopt("opt", tmp_path / "shown.ir", "--passes", "fuse-activations")
    refused = llmopt(
        "opt", tmp_path / "shown.ir", "--passes", "remove-dead", "-o", tmp_path / "out.onnx"
    )

    assert "Swish" in again.stdout
    assert refused.exit_code == 1
    assert len(refused.stderr.splitlines()) == 2
    assert "the numbers of 'w' are left out of this text" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["shown.ir"]


@pytest.mark.parametrize(("after", "count"), [("all", 2), ("fuse-activations", 1)])
def test_text_after_passes(after: str, count: int, llmopt: Any, written_out: Path) -> None:
    line = ["opt", written_out, "--passes", "canonicalize,fuse-activations", "--print-after", after]
    shown = llmopt(*line).stdout

    assert shown.count("# after ") == count
    assert "Swish" in shown


def test_misses_are_told_with_reasons(llmopt: Any, written_out: Path, tmp_path: Path) -> None:
    (tmp_path / "shy.py").write_text(
        "from llmopt import Outcome, Pass\n\n"
        "class Shy(Pass):\n"
        "    name = 'shy'\n"
        "    def run(self, program):\n"
        "        outcome = Outcome()\n"
        "        outcome.miss('gate', 'too bright')\n"
        "        return outcome\n",
        encoding="utf-8",
    )
    line = ["opt", written_out, "--passes", "shy", "--plugin", tmp_path / "shy.py"]

    assert llmopt(*line).stderr == "shy: 0 applied, 1 missed\n  gate: too bright\n"


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("nothing.onnx --passes canonicalize", 2, "not found"),
        ("{} --passes bogus", 2, "unknown pass 'bogus'"),
        ("{} --passes canonicalize --print-after fuse-norms", 2, "pass in this pipeline"),
        ("{}.txt --passes canonicalize", 1, "neither .onnx nor .ir"),
        ("{}", 2, "Missing option '--passes'"),
        ("open.ir --passes canonicalize", 1, "line: 2 column: "),
        ("odd.ir --passes canonicalize", 1, "No Op registered for Odd"),
        ("old.ir --passes canonicalize", 1, "not in the dialect: opset 20"),
        ("none.ir --passes canonicalize", 2, "not found"),
    ],
)
def test_a_wrong_request_is_refused(
    line: str, code: int, says: str, llmopt: Any, wrong: Path
) -> None:
    result = llmopt("opt", *line.format(wrong).split())

    assert result.exit_code == code
    assert says in result.stderr


@pytest.fixture
def wrong(written_out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file, with texts beside it that are no Programs."""
    monkeypatch.chdir(written_out.parent)
    ports = "main (float[B] x) => (float[B] y)"
    head = '<ir_version: 9, opset_import: ["" : 20]>'
    for name, text in {
        "silu.onnx.txt": "",
        "open.ir": f"{ports} {{\n y = Relu(x)",
        "odd.ir": f"{ports} {{ y = Odd(x) }}",
        "old.ir": f"{head} {ports} {{ y = Relu(x) }}",
    }.items():
        Path(name).write_text(text, encoding="utf-8")
    return written_out
