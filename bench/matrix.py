"""Every family against what transformers computes of it: traced, fused, cached, right?

    python bench/matrix.py [--work DIR] [--again] [FAMILY]...

A row is a family: a tiny random checkpoint, compiled for ``reference`` and ``onnxruntime-cpu``, in
float32 and ``w8``, each artifact verified on the whole matrix of inputs (batch 1 and 3; lengths 1,
7 and 33; no, left and right padding; prefill and steps through the cache). The source is the
module of transformers; for ``w8`` its weights are rounded alike. How many attentions and norms
there are is counted by what that module calls, rotary embeddings by its config. An encoder and a
decoder are one row.

Each row is measured in a process of its own, so that a crash is a row. Rows that DIR has already
are kept, so that a run that was cut short goes on; ``--again`` measures them anew. They take the
places of those in ``bench/matrix.json``, which ``docs/matrix.md`` shows; other rows stay.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parent))
from matrix_families import FAMILIES, Family
from matrix_oracles import Oracle

RESULTS: Final = Path(__file__).with_name("matrix.json")
TARGETS: Final = ("reference", "onnxruntime-cpu")
SCHEMES: Final = ("fp32", "w8")
ALLOWED: Final = {"fp32": 1e-4, "w8": 1e-3}  # relative; w8 against weights rounded alike
LIMIT_S: Final = 900  # a row that takes longer hangs
Row = dict[str, Any]


def measure(
    family: Family,
    work: Path,
    targets: Sequence[str] = TARGETS,
    schemes: Sequence[str] = SCHEMES,
) -> Row:
    """Return the row of a family.

    Args:
        family: What to make and compile.
        work: An empty folder for the checkpoint and the artifacts.
        targets: What to compile for.
        schemes: How weights are stored.
    """
    from llmopt.compiler import Clock, CompileOptions, optimize
    from llmopt.errors import LlmoptError
    from llmopt.frontend.base import SourceOptions

    folder, start = work / family.name, time.perf_counter()
    row: Row = {"family": family.name, "kind": family.kind}
    family.write(folder)
    try:
        found = optimize(folder, CompileOptions(), SourceOptions(), Clock(lambda _: None))
    except LlmoptError as error:
        return {**row, "traced": False, "reason": str(error)}
    traced_s = time.perf_counter() - start
    oracle = Oracle.open(folder, family, found.source.program)
    row |= {"traced": True, "cache": _cache(family, found.source)}
    row["fused"] = _fused(found, oracle.expected)
    row["misses"] = [m for fused in found.fusion.values() for m in fused.misses]
    source = dataclasses.replace(found.source, reference=oracle.reference)
    proven = dataclasses.replace(found, source=source)
    row["errors"] = {
        target: {
            scheme: _error(proven if scheme == "fp32" else found, target, scheme, work)
            for scheme in schemes
        }
        for target in targets
    }
    seconds = {"traced": traced_s, "all": time.perf_counter() - start}
    return row | {"seconds": {name: round(s, 1) for name, s in seconds.items()}}


def _cache(family: Family, source: Any) -> str:
    if not family.writes:
        return ""
    notes = [note for note in source.notes if "without a cache" in note]
    return "yes" if source.program.signature.has_cache else "; ".join(notes) or "no"


def _fused(found: Any, expected: Mapping[str, int]) -> dict[str, list[int]]:
    """Return how many of each kind there are and how many were fused."""
    kinds = {kind: found.fusion[kind].fused for kind in expected if kind in found.fusion}
    return {kind: [expected[kind], kinds.get(kind, 0)] for kind in expected if expected[kind]}


def _error(found: Any, target: str, scheme: str, work: Path) -> float | str:
    """Return the worst error of an artifact, or why there is none."""
    from llmopt.backends import find_backend
    from llmopt.compiler import Clock, CompileOptions
    from llmopt.compiler.compilation import Compilation
    from llmopt.errors import LlmoptError
    from llmopt.quantization.schemes import parse_scheme

    quantize = None if scheme == "fp32" else parse_scheme(scheme)
    options = CompileOptions(quantize=quantize, force=True)
    clock = Clock(lambda _: None)
    try:
        way = Compilation.prepare(found, find_backend(target), options, clock)
        artifact = way.run(work / f"{target}.{scheme}")
    except LlmoptError as error:
        return str(error)
    return float(artifact.manifest.verification["worst_error_rel"])


def right(row: Row) -> bool:
    """Whether every artifact of a row was made and computes what the source does."""
    errors = [item for of in row.get("errors", {}).values() for item in of.items()]
    return bool(errors) and all(
        isinstance(error, float) and error <= ALLOWED[scheme] for scheme, error in errors
    )


def _apart(family: str, work: Path) -> Row:
    """Return the row of a family, measured by a process of its own."""
    place = work / family
    command = [sys.executable, __file__, "--work", str(place), "--row", family]
    start = time.perf_counter()
    row: Row = {"family": family, "kind": FAMILIES[family].kind, "traced": False}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return {**row, "reason": f"it took longer than {LIMIT_S} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return dict(json.loads(lines[-1]))
    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    (work / f"{family}.stderr").write_text(done.stderr)
    seconds = round(time.perf_counter() - start, 1)
    return {**row, "reason": f"crashed: {last}", "seconds": {"all": seconds}}


def _told(row: Row) -> str:
    fused = " ".join(f"{kind} {f}/{e}" for kind, (e, f) in row.get("fused", {}).items())
    verdict = "right" if right(row) else row.get("reason") or json.dumps(row["errors"])
    return f"{row['family']:14} {fused:40} {verdict}"


def main() -> None:
    """Measure what was asked for and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="all if not given")
    parser.add_argument("--work", type=Path, default=Path("build/matrix"))
    parser.add_argument("--again", action="store_true", help="measure rows that are there, too")
    parser.add_argument("--row", choices=FAMILIES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    if asked.row:
        print(json.dumps(measure(FAMILIES[asked.row], asked.work)))
        return
    if unknown := [name for name in asked.families if name not in FAMILIES]:
        parser.error(f"no family {', '.join(unknown)}; known: {', '.join(FAMILIES)}")
    for name in asked.families or FAMILIES:
        kept = asked.work / f"{name}.json"
        if asked.again or not kept.is_file():
            row = _apart(name, asked.work)
            kept.write_text(json.dumps(row))
            print(_told(row), file=sys.stderr, flush=True)
    before = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
    known = {row["family"]: row for row in before}
    for name in FAMILIES:
        if (file := asked.work / f"{name}.json").is_file():
            known[name] = json.loads(file.read_text())
    rows = [known[name] for name in FAMILIES if name in known]
    missing = [name for name in FAMILIES if name not in known]
    results = {"schema": 1, "missing": missing, "rows": rows}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    bad = [row["family"] for row in rows if not right(row)]
    sys.exit(f"{len(bad)} of {len(rows)} families are not right: {', '.join(bad)}" if bad else 0)


if __name__ == "__main__":
    main()
