"""Baseline files: earlier measurements, and the machine that they were taken on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from llmopt.artifact.fields import Fields
from llmopt.artifact.manifest import Manifest
from llmopt.benchmark.gate.rounds import BASELINE, Measured, logarithms, metrics_of
from llmopt.benchmark.machine import MachineFingerprint
from llmopt.errors import ArtifactError, LlmoptError, SourceError

SCHEMA: Final = 1
KIND: Final = "llmopt-baseline"
_UPDATE: Final = "remove it, and recreate it with `llmopt check … --baseline FILE.json --update`"
_MEMORY_STEP: Final = 2**28  # a machine reports slightly different totals after each boot


@dataclass(frozen=True)
class BaselineArtifact:
    """An artifact as it was when the baseline was written.

    Args:
        workload: Measured workload, as text.
        threads: Threads inside one operator.
        manifest: Manifest of the artifact.
        measured: Measurements of its processes; empty if only counts were stored.
    """

    workload: str
    threads: int
    manifest: Manifest
    measured: tuple[Measured, ...]


@dataclass(frozen=True)
class Baseline:
    """The contents of a baseline file.

    Args:
        machine: Facts that must match for times to be comparable.
        artifacts: Stored artifacts, by name.
    """

    machine: Mapping[str, Any]
    artifacts: Mapping[str, BaselineArtifact]

    def to_json(self) -> str:
        """Return the text of the file."""
        data = {
            "kind": KIND,
            "schema": SCHEMA,
            "machine": dict(self.machine),
            "artifacts": {
                name: {
                    "workload": stored.workload,
                    "threads": stored.threads,
                    "manifest": json.loads(stored.manifest.to_json()),
                    "measured": [each.to_dict() for each in stored.measured],
                }
                for name, stored in self.artifacts.items()
            },
        }
        return json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n"


def read_baseline(path: Path) -> Baseline:
    """Return the baseline in a file.

    Raises:
        SourceError: The file is not a baseline, damaged, or from a newer llmopt.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        fields = Fields(data, path)
        if fields.text("kind", "") != KIND:
            raise SourceError(path, "not a baseline", _UPDATE)
        if fields.number("schema") != SCHEMA:
            schema = fields.number("schema")
            raise SourceError(path, f"schema {schema}; this llmopt reads {SCHEMA}", _UPDATE)
        names = fields.mapping("artifacts")
        if not names:
            raise SourceError(path, "the baseline has no artifacts", _UPDATE)
        artifacts = {name: _stored(Fields(names[name], path, name), path) for name in names}
        return Baseline(fields.mapping("machine"), artifacts)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SourceError(path, f"not a baseline ({error})", _UPDATE) from error
    except (ArtifactError, LookupError, TypeError, ValueError) as error:
        raise SourceError(path, f"damaged ({error})", _UPDATE) from error


def comparable(machine: MachineFingerprint) -> dict[str, Any]:
    """Return the facts of a machine that must match for times to be comparable.

    The version of llmopt is not one of them: it is what a check compares.
    """
    facts = json.loads(json.dumps(dataclasses.asdict(machine)))
    facts["versions"].pop("llmopt", None)
    if facts["memory_bytes"] is not None:
        facts["memory_bytes"] = round(facts["memory_bytes"] / _MEMORY_STEP) * _MEMORY_STEP
    return dict(facts)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the differences of a baseline's machine from this one, empty if there are none.

    >>> differences({"cores": 4, "processor": "A"}, {"cores": 2, "processor": "A"})
    'cores 4 there, 2 here'
    """
    parts = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            parts.append(differences(old, new))
        elif old != new:
            parts.append(f"{key} {_listed(old)} there, {_listed(new)} here")
    return "; ".join(filter(None, parts))


def _listed(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _stored(fields: Fields, path: Path) -> BaselineArtifact:
    manifest = Manifest.from_json(json.dumps(fields.mapping("manifest")), path)
    measured = tuple(map(_measured, fields.items("measured")))
    for metric in metrics_of(measured):
        try:
            logarithms(measured, BASELINE, metric)
        except LlmoptError as error:
            raise SourceError(path, str(error), _UPDATE) from error
    return BaselineArtifact(fields.text("workload"), fields.number("threads"), manifest, measured)


def _measured(fields: Fields) -> Measured:
    blocks = {
        metric: tuple(tuple(float(sample) for sample in block) for block in samples)
        for metric, samples in fields.mapping("blocks").items()
    }
    return Measured(BASELINE, fields.number("round"), fields.number("number"), blocks)
