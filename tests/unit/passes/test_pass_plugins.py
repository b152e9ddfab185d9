"""Passes of others: found, given options, run and reported as ours, and told where they break."""

from __future__ import annotations

import doctest
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from click.testing import CliRunner, Result
from support.programs import operators, program
from support.tiny_sources import bigram_file
from typing_extensions import override

from llmopt import compile as compile_
from llmopt import spelling
from llmopt.backends import known_backends
from llmopt.cli import app
from llmopt.errors import PassError, PassFailedError, PluginError, UsageError
from llmopt.ir.program import Program
from llmopt.origin import defined_at
from llmopt.passes import known_passes, plugins
from llmopt.passes.base import Outcome, Pass
from llmopt.passes.pipeline import Pipeline
from llmopt.passes.plugins import load_plugin, passes_with
from llmopt.passes.remove_dead import RemoveDead

TEXT = "main (float[B,4] x) => (float[B,4] y) { a = Abs (x)\n y = Relu (a) }"
HEAD = "from dataclasses import dataclass\nfrom llmopt import Outcome, Pass\n"
MINE = '''
@dataclass(frozen=True)
class Mine(Pass):
    """Do nothing.

    Args:
        limit: The most.
    """
    name = "mine"
    limit: int = 2

    def run(self, program):
        outcome = Outcome()
        outcome.note(f"the most is {self.limit}")
        return outcome
'''


def written(folder: Path, content: str, name: str = "mine.py") -> str:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(HEAD + content, encoding="utf-8")
    return str(path)


def llmopt(*arguments: object) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(app, list(map(str, arguments)), prog_name="llmopt")


@dataclass(frozen=True)
class Choosy(Pass):
    """A pass whose options are of every kind."""

    name: ClassVar[str] = "choosy"
    mode: Literal["fast", "exact"] = "fast"
    most: int | None = None
    ratio: float | None = 0.5
    tags: str = field(default_factory=str)

    @override
    def run(self, program: Program) -> Outcome:
        return Outcome(applied=0, notes=[str(self.most)])


@dataclass(frozen=True)
class Demanding(Choosy):
    """A pass that cannot be made without an option, nor with every value."""

    name: ClassVar[str] = "demanding"
    size: int = field(kw_only=True)

    def __post_init__(self) -> None:
        """Refuse a size of zero."""
        if not self.size:
            raise ValueError("a size of 0 is none")


def test_a_file_adds_its_passes(tmp_path: Path) -> None:
    path = written(tmp_path, MINE)

    pipeline = Pipeline.parse("remove-dead,mine{limit=9}", plugins=[path])

    assert str(pipeline) == "remove-dead,mine{limit=9}"
    told: list[Any] = []
    pipeline.run(program(TEXT), lambda *ran: told.append(ran[2]))
    assert told[1].notes == ("the most is 9",)
    assert told[1].duration_s > 0


def test_a_module_is_imported_by_name() -> None:
    assert load_plugin("llmopt.passes.remove_dead")["remove-dead"] is RemoveDead
    assert passes_with(["llmopt.passes.remove_dead"]) == known_passes()


def test_passes_that_a_file_imports_from_llmopt_are_not_its_own(tmp_path: Path) -> None:
    path = written(tmp_path, "from llmopt.passes.remove_dead import RemoveDead\n" + MINE)

    assert list(load_plugin(path)) == ["mine"]


def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    paths = [
        written(tmp_path, MINE, "a/mine.py"),
        written(tmp_path, MINE.replace('"mine"', '"other"'), "b/mine.py"),
    ]

    assert {"mine", "other"} <= passes_with(paths).keys()


def test_classes_and_objects_are_taken_too() -> None:
    by_name = Pipeline.parse("choosy{most=3}", plugins=[Choosy])
    as_they_are = Pipeline.parse(["remove-dead", Choosy(most=3), "-remove-dead"])

    assert by_name == as_they_are == Pipeline((Choosy(most=3),))
    assert Pipeline.parse([Choosy(), "-choosy"], plugins=[Choosy]) == Pipeline(())


@pytest.mark.parametrize(
    "text", ["choosy", "choosy{mode=exact}", "choosy{most=3,ratio=none}", "choosy{tags=a}"]
)
def test_options_of_every_kind_are_read_as_they_are_spelled(text: str) -> None:
    assert str(Pipeline.parse(text, plugins=[Choosy])) == text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("choosy{mode=slow}", "option mode='slow' of pass choosy: expected fast or exact"),
        ("choosy{most=1.5}", "expected int or none"),
        ("demanding", "needs its option size: write demanding{size=int}"),
        ("demanding{size=0}", "demanding{size=0} cannot be made: a size of 0 is none"),
    ],
)
def test_options_that_do_not_fit_are_refused(text: str, told: str) -> None:
    with pytest.raises(UsageError) as refused:
        Pipeline.parse(text, plugins=[Choosy, Demanding])

    assert told in str(refused.value)


BAD = {
    "a syntax error": ("def (", "mine.py:3: cannot be imported: SyntaxError"),
    "an exception": ("x = 1\ny = 1 / 0", "mine.py:4: cannot be imported: ZeroDivisionError"),
    "a missing module": ("import no_such_module", "mine.py:3: ModuleNotFoundError"),
    "an exit": ("raise SystemExit(3)", "mine.py:3: cannot be imported: SystemExit: 3"),
    "no pass": ("x = 1", "no subclass of llmopt.Pass with a name"),
    "no name": (MINE.replace("name =", "title ="), "Mine (mine.py:4) has no name"),
    "a bad name": (MINE.replace('"mine"', '"my pass"'), "mine.py:4: Mine has the name 'my pass'"),
    "no method": (MINE.replace("def run", "def go"), "mine.py:4: Mine has no method run"),
    "our name": (MINE.replace('"mine"', '"fuse-norms"'), "'fuse-norms' has the name of llmopt's"),
    "a name twice": (MINE + MINE.replace("class Mine", "class Yours"), "mine.py:4; rename"),
    "an odd option": (MINE.replace("int", "list[int]"), "option limit is of a type"),
    "an unknown type": (MINE.replace(": int", ": 'Intt'"), "types of its options are unknown"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_file_that_cannot_be_used_is_one_line_with_the_place(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content, told = BAD[what]
    written(tmp_path, content)

    result = llmopt("passes", "--plugin", "mine.py")

    assert result.exit_code == 2
    [line] = result.stderr.splitlines()
    assert line.startswith("Error: plugin ")
    assert told in line
    assert "; " in line
    assert result.stdout == ""


def test_what_is_no_plugin_at_all_is_refused(tmp_path: Path) -> None:
    for plugin in (str(tmp_path / "none.py"), "no_such_module", int):
        with pytest.raises(PluginError, match=r"none\.py|no_such_module|int"):
            passes_with([plugin])  # type: ignore[list-item]


FAILING = {
    "1 / 0": "mine.py:16: ZeroDivisionError: division by zero",
    "program.graph.nothing": "mine.py:16: AttributeError",
    "return None": "run returned NoneType, not llmopt.Outcome",
    "program.graph[0].domain = 'x.y'": "(mine.py:4) left the program invalid: LayerNormal",
    "program.graph.outputs[0].name = 'z'": "(mine.py:4) left the program invalid: it changed the",
}


@pytest.mark.parametrize("statement", FAILING)
def test_a_pass_that_fails_is_one_line_and_no_bug_of_ours(
    statement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written(
        tmp_path, MINE.replace("outcome = Outcome()", f"outcome = Outcome()\n        {statement}")
    )
    graph = "main (float[B,4] x, float[4] s) => (float[B,4] y) { y = LayerNormalization (x, s) }"
    (tmp_path / "norm.ir").write_text(graph, encoding="utf-8")

    result = llmopt("opt", "norm.ir", "--passes", "mine", "--plugin", "mine.py")

    assert result.exit_code == 1
    [line] = result.stderr.splitlines()
    assert line.startswith("Error: pass 'mine' ")
    assert FAILING[statement] in line
    assert "leave it out of --passes" in line


def test_compile_takes_passes_as_they_are_and_names_them(tmp_path: Path) -> None:
    source = bigram_file(tmp_path / "bigram.onnx")

    artifact = compile_(
        source, passes=["default", Choosy(most=3), "-merge-qkv"], output=tmp_path / "out"
    )

    told = next(each for each in artifact.summary()["passes"] if each["name"] == "choosy")
    assert told == {"name": "choosy", "applied": 0, "missed": [], "notes": ["3"]}
    assert artifact.manifest.pipeline.startswith("canonicalize,")
    assert ",choosy{most=3}" in artifact.manifest.pipeline
    assert "merge-qkv" not in artifact.manifest.pipeline
    given = "--passes 'default,choosy{most=3},-merge-qkv' --plugin GIVEN_IN_PYTHON"
    assert given in artifact.manifest.recipe


def test_our_own_errors_and_bugs_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Outcome:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(RemoveDead, "run", broken)
    with pytest.raises(ZeroDivisionError, match="ours"):
        Pipeline.parse("remove-dead").run(program(TEXT))

    def refuses(*_: object) -> Outcome:
        raise UsageError("on purpose")

    monkeypatch.setattr(Choosy, "run", refuses)
    with pytest.raises(UsageError, match="on purpose"):
        Pipeline((Choosy(),)).run(program(TEXT))
    monkeypatch.setattr(Choosy, "run", broken)
    with pytest.raises(PassFailedError) as failed:
        Pipeline((Choosy(),)).run(program(TEXT))
    assert isinstance(failed.value, PassError)
    assert isinstance(failed.value.__cause__, ZeroDivisionError)


class _Entry:
    """An entry point of an installed package."""

    dist = None

    def __init__(self, name: str, loaded: object) -> None:
        self.name, self.value, self.loaded = name, f"theirs:{name}", loaded

    def load(self) -> object:
        if isinstance(self.loaded, BaseException):
            raise self.loaded
        return self.loaded


def test_passes_and_backends_of_installed_packages_are_known_and_broken_ones_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Fuse(RemoveDead):
        """A pass with a name of ours."""

        name: ClassVar[str] = "fuse-norms"

    class Nameless(RemoveDead):
        """A pass that text cannot name."""

        name: ClassVar[str] = "a b"

    backend = type("Theirs", (known_backends()["reference"],), {"name": "theirs"})
    offered = {
        "llmopt.passes": [
            _Entry("choosy", Choosy),
            _Entry("late", ImportError("no libtheirs")),
            _Entry("dead", RemoveDead),
            _Entry("fuse-norms", Fuse),
            _Entry("a b", Nameless),
            _Entry("number", 3),
        ],
        "llmopt.backends": [_Entry("theirs", backend), _Entry("cpu", backend)],
    }
    monkeypatch.setattr(plugins, "_entries", lambda group, _path: offered[group])

    assert known_passes()["choosy"] is Choosy
    assert known_passes()["fuse-norms"] is not Fuse
    assert {"late", "dead", "a b", "number"}.isdisjoint(known_passes())
    assert known_backends()["theirs"] is backend
    assert "cpu" not in known_backends()
    for name, told in {
        "late": "cannot be imported: ImportError: no libtheirs",
        "dead": "calls itself 'remove-dead'",
        "fuse-norms": "has a name that is taken",
        "a b": "cannot be used",
        "number": "not a subclass of llmopt's Pass",
        "cpu": "calls itself 'theirs'",
    }.items():
        assert f"theirs:{name}: its {name!r}" in caplog.text
        assert told in caplog.text


def test_one_pass_is_described_with_its_options(tmp_path: Path) -> None:
    path = written(tmp_path, MINE)

    shown = llmopt("passes", "mine", "--plugin", path).stdout
    unknown = llmopt("passes", "mines", "--plugin", path)

    assert shown.splitlines()[2] == "Do nothing."
    assert "limit   int         2  The most." in shown
    assert shown.splitlines()[-1] == "spelled mine{limit=2}"
    assert unknown.exit_code == 2
    assert "did you mean 'mine'?" in unknown.stderr
    assert '"type": "true or false"' in llmopt("passes", "quantize-weights", "--json").stdout
    assert llmopt("passes", "remove-dead").stdout.endswith("spelled remove-dead\n")


def test_what_a_pass_without_a_file_is_called() -> None:
    made = type("Made", (Choosy,), {"name": "made", "__module__": "nowhere"})

    assert defined_at(made) == "nowhere.Made"
    assert operators(Pipeline((made(),)).run(program(TEXT))) == ["Abs", "Relu"]


@pytest.mark.parametrize("module", [spelling, plugins])
def test_examples_in_docstrings_hold(module: Any) -> None:
    assert doctest.testmod(module).failed == 0
