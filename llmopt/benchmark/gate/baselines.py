"""Baselines in files: what was measured before, and on which machine."""

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
_UPDATE: Final = "remove it, and write it anew with `llmopt check … --baseline FILE.json --update`"
_MEMORY_STEP: Final = 2**28  # the same machine reports a few pages more or less after a start


@dataclass(frozen=True)
class BaselineArtifact:
    """An artifact as it was when the baseline was written.

    Args:
        workload: What was measured, as text.
        threads: Threads inside one operator.
        manifest: The artifact's.
        measured: What its processes measured; none where only counts were stored.
    """

    workload: str
    threads: int
    manifest: Manifest
    measured: tuple[Measured, ...]


@dataclass(frozen=True)
class Baseline:
    """A file of what was measured before.

    Args:
        machine: What has to be the same for times to be comparable.
        artifacts: By name.
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
    """Return what a file holds.

    Raises:
        SourceError: It is no baseline, damaged, or from a newer llmopt.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        fields = Fields(data, path)
        if fields.text("kind", "") != KIND:
            raise SourceError(path, "not a baseline", _UPDATE)
        if fields.number("schema") != SCHEMA:
            found = fields.number("schema")
            raise SourceError(path, f"schema {found}, and this llmopt reads {SCHEMA}", _UPDATE)
        names = fields.mapping("artifacts")
        if not names:
            raise SourceError(path, "it holds no artifact", _UPDATE)
        artifacts = {name: _stored(Fields(names[name], path, name), path) for name in names}
        return Baseline(fields.mapping("machine"), artifacts)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SourceError(path, f"not a baseline ({error})", _UPDATE) from error
    except (ArtifactError, LookupError, TypeError, ValueError) as error:
        raise SourceError(path, f"damaged ({error})", _UPDATE) from error


def comparable(machine: MachineFingerprint) -> dict[str, Any]:
    """Return what has to be the same of two machines for times to be comparable.

    The version of llmopt is left out: it is what is compared.
    """
    facts = json.loads(json.dumps(dataclasses.asdict(machine)))
    facts["versions"].pop("llmopt", None)
    if facts["memory_bytes"] is not None:
        facts["memory_bytes"] = round(facts["memory_bytes"] / _MEMORY_STEP) * _MEMORY_STEP
    return dict(facts)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return in what a baseline's machine differs from this one; empty where it does not.

    >>> differences({"cores": 4, "processor": "A"}, {"cores": 2, "processor": "A"})
    'cores 4 there, 2 here'
    """
    told = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            told.append(differences(old, new))
        elif old != new:
            told.append(f"{key} {_listed(old)} there, {_listed(new)} here")
    return "; ".join(filter(None, told))


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
        metric: tuple(tuple(float(sample) for sample in block) for block in found)
        for metric, found in fields.mapping("blocks").items()
    }
    return Measured(BASELINE, fields.number("round"), fields.number("number"), blocks)
