"""What changed from one model to another: Programs, artifacts, ONNX files, their text, sources."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from llmopt.errors import SourceNotFoundError
from llmopt.ir.difference import Difference, difference
from llmopt.ir.program import Program

if TYPE_CHECKING:
    import onnx_ir as ir

    from llmopt.artifact.manifest import Manifest

Side = Program | str | Path
_KINDS: Final = "give an artifact, an .onnx file, its text (.ir), or a source that compiles"
_MANIFEST: Final = "manifest.json"
_GRAPHS: Final = (".onnx", ".onnx.data", ".onnx_data")
_FACTS: Final = ("target", "task", "pipeline")


@dataclass(frozen=True)
class _Opened:
    """One side of a comparison.

    Args:
        models: The graphs, by the name of the component.
        facts: Everything else that is compared, as text, by the name that a message has for it.
    """

    models: Mapping[str, ir.Model] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)


def compare(before: Side, after: Side) -> Difference:
    """Return what changed: operators, attributes, shapes, inputs, outputs and weights by digest.

    Names of nodes, values and weights are no change, and their order is none.

    Args:
        before: A Program; or the path of an artifact, of an .onnx file, of its text, or of a
            source, which is then traced.
        after: The other one, of any of these kinds.

    Raises:
        LlmoptError: One is not there, or is damaged.
    """
    sides = [_open(side) for side in (before, after)]
    graphs = difference(sides[0].models, sides[1].models)
    facts = tuple(_facts(sides[0].facts, sides[1].facts))
    return dataclasses.replace(graphs, edges=(*facts, *graphs.edges))


def _open(side: Side) -> _Opened:
    if isinstance(side, Program):
        return _Opened(side.components)
    path = Path(side)
    if (path / _MANIFEST).is_file():
        return _artifact(path)
    from llmopt.frontend.onnx.program_file import TEXT, read_model

    if path.is_file() and path.suffix in {".onnx", *TEXT}:
        return _Opened({"model": read_model(path)})
    from llmopt.frontend.base import SourceOptions
    from llmopt.frontend.source import open_source

    if ".py:" not in str(side) and not path.exists():
        raise SourceNotFoundError(path, _KINDS)
    return _Opened(open_source(str(side), SourceOptions()).program.components)


def _artifact(path: Path) -> _Opened:
    """Return the graphs of an artifact, and what its manifest says of the rest."""
    from llmopt.artifact.manifest import Manifest
    from llmopt.frontend.onnx.program_file import read_model

    manifest = Manifest.read(path)
    manifest.check_sizes(path)
    names = [file.path for file in manifest.files if file.path.endswith(".onnx")]
    single = len(names) == 1
    models = {"model" if single else name: read_model(path / name) for name in names}
    return _Opened(models, dict(_recorded(manifest, graphs=bool(models))))


def _recorded(manifest: Manifest, *, graphs: bool) -> Iterator[tuple[str, str]]:
    for name in _FACTS:
        yield name, str(getattr(manifest, name))
    for name, scheme in manifest.precision.items():
        yield f"precision of {name}", str(scheme)
    for name, fact in dataclasses.asdict(manifest.model).items():
        yield f"model {name}", str(fact)
    for file in manifest.files:
        if not file.path.startswith("golden/") and not file.path.endswith(_GRAPHS):
            yield f"file {file.path}", file.sha256
    work: Mapping[str, Any] = manifest.work or {}
    for scope, counts in work.get("operators", {}).items() if not graphs else ():
        yield f"operators of {scope or 'the model'}", str(counts)


def _facts(before: Mapping[str, str], after: Mapping[str, str]) -> Iterator[str]:
    """Yield what is recorded otherwise; nothing where one side records nothing."""
    for name in dict.fromkeys([*before, *after]) if before and after else ():
        old, new = before.get(name), after.get(name)
        if old == new:
            continue
        if name.startswith("file ") and old is not None and new is not None:
            yield f"{name} has other content"
        elif old is None or new is None:
            yield f"{name} {'added' if old is None else 'removed'}"
        else:
            yield f"{name} {old} → {new}"
