"""Replay the passes on the golden programs and tiny models, here and at another revision.

``python tests/golden/replay.py [REV [ONLY]]`` runs both, in processes of their own, on the same
programs, those whose title has the text ONLY, and prints what the passes make of them that REV, by
default the last commit, does not: nothing for a refactor. REV is checked out by ``git worktree``;
the working tree stays as it is.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from llmopt.ir.program import Program

ROOT: Final = Path(__file__).resolve().parents[2]
TARGET: Final = "cpu"
INDEX: Final = "index.json"
_ABSENT: Final = ("UnknownNameError", "ModuleNotFoundError")
"""What a revision says of a pass that it has not got: there is nothing to compare then."""


def main(revision: str = "HEAD", only: str = "") -> int:
    """Print what differs from ``revision``; return 1 if anything does, 2 if it is not there."""
    with tempfile.TemporaryDirectory(prefix="llmopt-replay-") as temporary:
        work = Path(temporary)
        try:
            _git("worktree", "add", "--quiet", "--detach", str(work / "tree"), revision)
        except subprocess.CalledProcessError as error:
            said = str(error.stderr).strip().partition("\n")[0]
            click.echo(f"Error: no tree of {revision!r}: {said}; give a revision", err=True)
            return 2
        try:
            _make_sources(work / "sources")
            for tree, out in ((work / "tree", "before"), (ROOT, "after")):
                _recorded(tree, work / "sources", work / out, only)
            return _compared(work / "before", work / "after")
        finally:
            _git("worktree", "remove", "--force", str(work / "tree"))


def _git(*arguments: str) -> None:
    """Run git on the repository.

    Raises:
        CalledProcessError: It refused.
    """
    line = ["git", "-C", str(ROOT), *arguments]
    subprocess.run(line, check=True, capture_output=True, text=True)


def _make_sources(folder: Path) -> None:
    """Write the tiny models, which both revisions read."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support.tiny_sources import bigram_file, llama_folder

    llama_folder(folder / "llama")
    bigram_file(folder / "bigram.onnx")


def _recorded(tree: Path, sources: Path, out: Path, only: str) -> None:
    """Let the code of ``tree`` write what it makes of every program."""
    places = [tree, tree / "tests", tree / "tests" / "models", tree / "tests" / "golden"]
    search = os.pathsep.join(map(str, places))
    line = [sys.executable, "-P", __file__, "--record", str(sources), str(out), only]
    subprocess.run(line, check=True, env=os.environ | {"PYTHONPATH": search})


def record(sources: Path, out: Path, only: str) -> None:
    """Write what the passes make of every program, and a list of it."""
    import onnx_ir as ir

    out.mkdir()
    index: dict[str, str] = {}
    for title, make in _programs(sources):
        if only not in title:
            continue
        try:
            program = make()
        except Exception as error:  # noqa: BLE001 - it is what the revision does
            index[title] = f"{type(error).__name__}: {error}"
            continue
        index[title] = f"{len(index):04d}.onnx"
        ir.save(program.model, out / index[title], format="protobuf")
    (out / INDEX).write_text(json.dumps(index), encoding="utf-8")


def _programs(sources: Path) -> Iterator[tuple[str, Callable[[], Program]]]:
    """Yield a title, and what makes the program, of every case."""
    golden = importlib.import_module("test_golden")  # that of the tree whose code runs
    known = golden.KNOWN
    for file in sorted(Path(__file__).parent.glob("*.ir")):
        for match in golden.LAYOUT.finditer(file.read_text(encoding="utf-8")):
            case = golden.Golden(file, **match.groupdict(default=""))
            for pipeline in dict.fromkeys((case.pipeline, "default")):
                title = f"{file.name}: {case.name} | {pipeline}"
                yield title, functools.partial(_passed, case.program, pipeline, known)
    models = [str(sources / "llama"), str(sources / "bigram.onnx")]
    models += [f"{ROOT}/tests/models/{name}.py:make" for name in ("gpt", "bert")]
    for source in models:
        title, read = Path(source).name, functools.partial(_read, source)
        yield f"{title} | as it is read", read
        for pipeline in ("default", "default,quantize-weights{bits=8}"):
            yield f"{title} | {pipeline}", functools.partial(_passed, read, pipeline, known)
        yield f"{title} | default, lowered to {TARGET}", functools.partial(_lowered, read)


def _read(source: str) -> Program:
    """Return the Program of a source, its own to edit."""
    return _traced(source).clone()


@functools.cache
def _traced(source: str) -> Program:
    sources: Any = importlib.import_module(
        "llmopt.frontend.source"
    )  # every revision has both there
    program: Program = sources.open_source(source, sources.SourceOptions()).program
    return program


def _passed(read: Callable[[], Program], pipeline: str, known: Any) -> Program:
    from llmopt.passes.pipeline import Pipeline

    return Pipeline.parse(pipeline, known=known).run(read())


def _lowered(read: Callable[[], Program]) -> Program:
    from llmopt.backends import find_backend
    from llmopt.passes.pipeline import Pipeline

    program = Pipeline.parse("default").run(read())
    return Pipeline(find_backend(TARGET).passes(None)).run(program)


def _compared(before: Path, after: Path) -> int:
    from llmopt.cli.diff import summary
    from llmopt.comparison import compare

    old, new = (json.loads((side / INDEX).read_text("utf-8")) for side in (before, after))
    code = 0
    for title in new:
        was, now = old[title], new[title]
        if was.startswith(_ABSENT):
            continue
        sides = ((before, was), (after, now))
        files = [side / name for side, name in sides if name.endswith(".onnx")]
        if len(files) == 2:
            found = compare(*files)
            text = "" if found.equal else summary(found)
        else:
            text = "" if was == now else f"{_outcome(was)} → {_outcome(now)}"
        if text:
            click.echo(f"{title}\n{textwrap.indent(text, '    ')}\n")
            code = 1
    return code


def _outcome(entry: str) -> str:
    return "a program" if entry.endswith(".onnx") else entry


if __name__ == "__main__":
    if sys.argv[1:2] == ["--record"]:
        record(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
    else:
        sys.exit(main(*sys.argv[1:]))
