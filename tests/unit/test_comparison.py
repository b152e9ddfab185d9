"""llmopt diff: what changed is found and told, and what is called otherwise is no change."""

from __future__ import annotations

import doctest
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result
from support.programs import program
from support.tiny_artifacts import TinyDecoder, TinyEncoder
from support.tiny_decoder import tiny_decoder
from support.tiny_sources import bigram_file

import llmopt
from llmopt.cli import app, diff
from llmopt.comparison import compare
from llmopt.ir import fingerprints, weights
from llmopt.ir.difference import Difference, difference
from llmopt.ir.fingerprints import fingerprint
from llmopt.ir.program import Program

PORTS = "main (float[B,S,4] x) => (float[B,S,4] y)"
LAYERS = """main (float[B,S,4] x) => (float[B,S,4] y)
<float[4] a = {1,2,3,4}, float[4] b = {4,3,2,1}, float[4] c = {1,1,2,2}>
{
   ["layers.0.norm/Norm"] h = RMSNormalization <epsilon = 1e-5> (x, a)
   ["layers.0.act/Relu"] i = Relu (h)
   ["layers.1.norm/Norm"] j = RMSNormalization <epsilon = 1e-5> (i, b)
   ["layers.1.act/Relu"] k = Relu (j)
   ["layers.2.norm/Norm"] l = RMSNormalization <epsilon = 1e-5> (k, c)
   ["layers.2.act/Relu"] y = Relu (l)
}"""


def run(*arguments: object) -> Result:
    """Run ``llmopt diff`` in this process."""
    return CliRunner().invoke(app, ["diff", *map(str, arguments)], prog_name="llmopt")


def between(before: str, after: str) -> Difference:
    return compare(program(before), program(after))


def lines(found: Difference) -> list[str]:
    return diff.summary(found).splitlines()


SAME = f"""{PORTS} <float[4] w = {{1,2,3,4}}>
{{ q = Relu (x)
   r = Abs (x)
   p = Add (q, r)
   y = LayerNormalization (p, w) }}"""


@pytest.mark.parametrize(
    "changes",
    [
        {"q = Relu (x)\n   r = Abs (x)": "r = Abs (x)\n   q = Relu (x)"},
        {"Add (q, r)": "Add (r, q)"},
        {" w": " v", "r = Abs": '["a.b/Abs"] r = Abs'},
        {"LayerNormalization": "LayerNormalization <axis = -1, epsilon = 1e-5>"},
        {"= {1,2,3,4}>": "= {1,2,3,4}, float[9] unused = {0,0,0,0,0,0,0,0,0}>"},
        {"<float[4] w = {1,2,3,4}>": "", "{ q": "{ w = Constant <value = float[4] {1,2,3,4}> () q"},
        {"B,S": "N,T"},
    ],
)
def test_names_and_order_are_no_change(changes: dict[str, str]) -> None:
    other = SAME
    for old, new in changes.items():
        assert old in other
        other = other.replace(old, new)

    found = between(SAME, other)

    assert found.equal, lines(found)
    assert found.weights.same == found.weights.before == found.weights.after == 1


TWO = f"{PORTS} {{ a = Sub (x, x)\n b = Abs (x)\n c = Div (a, b)\n y = Relu (c) }}"
IF = """main (float[4] x, bool p) => (float[4] y) {
   y = If (p) <then_branch = t () => (float[4] u) { u = Relu (x) },
               else_branch = e () => (float[4] v) { v = Neg (x) }>
}"""


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (TWO, TWO.replace("Div (a, b)", "Div (b, a)"), "~ Div: operand 0 of Sub → of Abs"),
        (TWO, TWO.replace("Abs (x)", "Abs (a)"), "~ Abs: operand 0 an input → of Sub"),
        (TWO, TWO.replace("Abs", "Neg"), "- Abs"),
        (TWO, TWO.replace("y = Relu (c)", "d = Neg (c)\n y = Relu (d)"), "+ Neg"),
        (TWO, TWO.replace("c)", "a)").replace("y =", "z = Relu (a)\n y ="), "+ Relu"),
        (IF, IF.replace("Neg", "Abs"), "~ If: else_branch"),
        (LAYERS, LAYERS.replace("{4,3,2,1}", "{4,3,2,2}"), "operand 1 float[4] [4.0, 3.0, 2.0"),
        (TWO, TWO.replace("S,4] x", "S,4] x, float[B] z"), "input z added: float[B]"),
        (TWO, TWO.replace("B,S,4", "B,B,4"), "input x: float[B, S, 4] → float[B, B, 4]"),
        (TWO, TWO.replace("[B,S,4] x", "[B,4] x").replace("[B,S,4] y", "[B,4] y"), "output y"),
    ],
)
def test_what_changed_is_told(before: str, after: str, told: str) -> None:
    found = between(before, after)

    assert not found.equal
    assert told in diff.summary(found)
    assert between(after, after).equal


def test_layers_that_changed_alike_are_told_once() -> None:
    found = between(LAYERS, LAYERS.replace("1e-5", "1e-6").replace("y = Relu (l)", "y = Abs (l)"))

    assert lines(found) == [
        "operator  before  after",
        "Abs            0      1",
        "Relu           3      2",
        "total          6      6",
        "",
        "layers.0-2.norm (3 x)",
        "  ~ RMSNormalization: epsilon default → 1e-06",
        "",
        "layers.2.act",
        "  - Relu",
        "  + Abs",
    ]


def test_outputs_that_are_exchanged_are_told() -> None:
    text = "main (float[4] x) => (float[4] y, float[4] z) { y = Relu (x)\n z = Abs (x) }"
    found = between(text, text.replace("y = Relu", "y = Abs").replace("z = Abs", "z = Relu"))

    assert found.edges == ("output y of Relu → of Abs", "output z of Abs → of Relu")
    ports = text.replace("(float[4] y, float[4] z)", "(float[4] z, float[4] y)")
    assert between(text, ports).edges == ("outputs in another order: y, z → z, y",)


def mutants() -> list[tuple[str, str]]:
    """Every node of a decoder, with another attribute, weight or operand."""
    made = tiny_decoder(keep=True)
    found = [(str(node.name), "attribute") for node in made.graph]
    found += [(str(name), "weight") for name in made.graph.initializers if name != "logits_to_keep"]
    return found


@pytest.mark.parametrize("kind", ["attribute", "weight"])
def test_a_single_change_anywhere_is_found_and_nothing_else(kind: str) -> None:
    before = tiny_decoder(keep=True)
    names = [name for name, of in mutants() if of == kind]
    for name in names:
        after = before.clone()
        mutate(after, name, kind)

        found = compare(before, after)

        readers = [n for n in after.graph if name in {str(v.name) for v in n.inputs if v}]
        touched = {name} if kind == "attribute" else {str(node.name) for node in readers}
        assert {change.node for change in found.changes} == touched, name
        assert {change.kind for change in found.changes} == {"changed"}


@pytest.mark.parametrize("kind", ["attribute", "weight"])
def test_a_single_change_anywhere_gives_another_fingerprint(kind: str) -> None:
    before = tiny_decoder(keep=True)
    known = {fingerprint(before), fingerprint(before.clone())}
    names = [name for name, of in mutants() if of == kind]
    for name in names:
        after = before.clone()
        mutate(after, name, kind)
        known.add(fingerprint(after))

    assert len(known) == 1 + len(names)


def test_a_fingerprint_knows_versions_and_the_edge_but_no_names_of_nodes() -> None:
    before = tiny_decoder(keep=True)
    older, renamed, other = (before.clone() for _ in range(3))
    older.graph.opset_imports[""] = 24
    for node in renamed.graph:
        node.name = f"{node.name} again"
    other.graph.outputs[0].name = "scores"

    assert fingerprint(renamed) == fingerprint(before)
    assert len({fingerprint(each) for each in (before, older, other)}) == 3


def test_a_fingerprint_reads_no_weight_that_is_still_to_be_made() -> None:
    def unread() -> Any:
        raise AssertionError("it was read")

    text = "main (float[4] x) => (float[4] y) <float[4] w = {1,2,3,4}> { y = Add (x, w) }"
    made = program(text)
    leaf = weights.Leaf("model.w", unread, ir.DataType.FLOAT, [4])
    made.graph.initializers["w"].const_value = leaf

    assert fingerprint(made) == fingerprint(made.clone())


def mutate(after: Program, name: str, kind: str) -> None:
    if kind == "attribute":
        node = next(node for node in after.graph if node.name == name)
        node.attributes["mutated"] = ir.AttrInt64("mutated", 1)
    else:
        value = after.graph.initializers[name]
        assert value.const_value is not None
        array = value.const_value.numpy().copy()
        array.reshape(-1)[-1] -= 1
        value.const_value = ir.tensor(array, name=name)


def test_defaults_and_versions_are_told() -> None:
    before, after = tiny_decoder(keep=True), tiny_decoder(keep=True)
    after.graph.initializers["logits_to_keep"].const_value = ir.tensor(np.asarray(0, np.int64))
    after.graph.opset_imports[""] = 24

    assert compare(before, after).edges == (
        "input logits_to_keep: default int64[] 1 → int64[] 0",
        "opset ai.onnx 25 → 24",
    )


def test_components_are_told_apart() -> None:
    one, two = program(TWO).model, program(TWO.replace("Abs", "Neg")).model

    found = difference({"encoder": one, "decoder": one}, {"encoder": one, "decoder": two})
    assert {change.component for change in found.changes} == {"decoder"}
    assert "decoder: outside modules" in diff.summary(found)
    lost = difference({"encoder": one, "decoder": one}, {"encoder": one})
    assert lost.edges == ("component decoder removed",)


def test_functions_are_what_they_compute(tmp_path: Path) -> None:
    head = '<ir_version: 11, opset_import: ["" : 25, "own" : 1]>\n'
    body = '<domain: "own", opset_import: ["" : 25]> twice (a) => (b) { b = Add (a, a) }'
    called = f"{head}{PORTS} {{ y = own.twice (x) }}\n{body}"
    onnx.save(onnx.parser.parse_model(called), tmp_path / "called.onnx")
    written = f"{head}{PORTS} {{ y = Add (x, x) }}"
    onnx.save(onnx.parser.parse_model(written), tmp_path / "written.onnx")

    assert run(tmp_path / "called.onnx", tmp_path / "written.onnx").exit_code == 0


def test_files_and_their_text_are_compared(tmp_path: Path) -> None:
    source = bigram_file(tmp_path / "bigram.onnx")
    text = tmp_path / "bigram.ir"
    opt = ["opt", str(source), "--passes", "canonicalize", "-o", str(text)]
    assert CliRunner().invoke(app, opt).exit_code == 0

    same = run(source, text)
    assert (same.exit_code, same.stdout, same.stderr) == (0, "", "")
    text.write_text(text.read_text().replace("LayerNormalization", "RMSNormalization"))
    other = run(source, text, "--json")

    assert other.exit_code == 1
    data = json.loads(other.stdout)
    assert data["equal"] is False
    assert data["operators"]["RMSNormalization"] == [0, 1]
    assert [change["kind"] for change in data["changes"]] == ["removed", "added"]
    assert "- LayerNormalization" in run(source, text).stdout


def test_artifacts_are_compared_with_what_they_carry(tmp_path: Path) -> None:
    TinyDecoder("shared").write(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert run(tmp_path / "one", tmp_path / "two").exit_code == 0

    manifest = tmp_path / "two" / "manifest.json"
    data = json.loads(manifest.read_text())
    data |= {"pipeline": "canonicalize", "precision": {"weights": "w8"}}
    data["files"][-1]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(data))
    TinyEncoder().write(tmp_path / "three")

    told = run(tmp_path / "one", tmp_path / "two").stdout
    assert "pipeline" in told
    assert "precision of weights added" in told
    assert run(tmp_path / "one", tmp_path / "three").exit_code == 1


def test_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    bigram_file(tmp_path / "a.onnx")
    (tmp_path / "b.ir").write_text("nothing", encoding="utf-8")

    for name, code in (("none.onnx", 2), ("b.ir", 1)):
        result = run(tmp_path / "a.onnx", tmp_path / name)
        assert result.exit_code == code
        assert len(result.stderr.splitlines()) == 1


def test_the_interface_compares_programs_and_paths(tmp_path: Path) -> None:
    source = bigram_file(tmp_path / "bigram.onnx")
    traced = llmopt.diff(source, source)

    assert traced.equal
    assert llmopt.diff(tiny_decoder(), tiny_decoder()).equal


@pytest.mark.parametrize("module", [diff, fingerprints])
def test_examples_in_docstrings_hold(module: Any) -> None:
    assert doctest.testmod(module).failed == 0
