"""The bill of materials of a bundle, in CycloneDX 1.6: models with model cards, and libraries.

https://cyclonedx.org/docs/1.6/json/. It has no timestamp, and its serial number is a hash of its
contents: the same bundle gives the same bytes.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Final

from llmopt.artifact.manifest import Manifest
from llmopt.bundle.contents import Needs, Variant
from llmopt.interface.signature import Port

SPECIFICATION: Final = "1.6"
_TASKS: Final = {"generate": "text-generation", "embed": "feature-extraction"}
_LICENSES: Final = {
    "apache-tvm": "Apache-2.0",
    "numpy": "BSD-3-Clause",
    "onnx": "Apache-2.0",
    "onnxruntime": "MIT",
    "onnxruntime-gpu": "MIT",
    "tokenizers": "Apache-2.0",
}
"""SPDX licenses of the libraries that run artifacts, for open-source ones."""

_ALWAYS: Final = ("numpy", "tokenizers")
Json = dict[str, Any]


def bill_of_materials(
    name: str, parts: Sequence[tuple[Variant, Manifest]], licenses: Sequence[str], version: str
) -> bytes:
    """Return the bill of materials as JSON.

    Args:
        name: Name of the model.
        parts: Variants, each with its artifact's manifest.
        licenses: SPDX names of the model's licenses.
        version: Version of llmopt.
    """
    models = [_model(variant, manifest, licenses) for variant, manifest in parts]
    libraries = {each["bom-ref"]: each for variant, _ in parts for each in _libraries(variant)}
    tool = {"type": "application", "name": "llmopt", "version": version}
    bundle: Json = {"type": "machine-learning-model", "bom-ref": "bundle", "name": name}
    if licenses:
        bundle["licenses"] = _licenses(licenses)
    bom: Json = {
        "metadata": {"tools": {"components": [tool]}, "component": bundle},
        "components": [*models, *(libraries[ref] for ref in sorted(libraries))],
        "dependencies": [
            {"ref": "bundle", "dependsOn": sorted(model["bom-ref"] for model in models)},
            *(
                {
                    "ref": model["bom-ref"],
                    "dependsOn": sorted(each["bom-ref"] for each in _libraries(variant)),
                }
                for model, (variant, _) in zip(models, parts, strict=True)
            ),
            *({"ref": ref} for ref in sorted(libraries)),
        ],
    }
    serial = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(bom, sort_keys=True))
    head = {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPECIFICATION}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPECIFICATION,
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
    }
    return f"{json.dumps(head | bom, indent=1, ensure_ascii=False)}\n".encode()


def _model(variant: Variant, manifest: Manifest, licenses: Sequence[str]) -> Json:
    """Return the component of a variant."""
    source = manifest.source
    properties = {
        "llmopt:target": manifest.target,
        "llmopt:weights": manifest.precision.get("weights", "float32"),
        "llmopt:runtime": str(variant.needs.runtime),
        **_requirements(variant.needs),
    }
    component: Json = {
        "type": "machine-learning-model",
        "bom-ref": f"model:{variant.name}",
        "name": variant.name,
        "modelCard": _card(manifest),
        "components": [_file(variant, record.path, record.sha256) for record in manifest.files],
        "properties": [
            {"name": key, "value": str(value)} for key, value in properties.items() if value
        ],
    }
    if source.name:
        ancestor: Json = {"type": "machine-learning-model", "name": source.name}
        if source.digest:
            ancestor["hashes"] = [_hash(source.digest)]
        component["pedigree"] = {"ancestors": [ancestor]}
    if licenses:
        component["licenses"] = _licenses(licenses)
    return component


def _card(manifest: Manifest) -> Json:
    """Return the model card: task, ports, quality and verification."""
    results = {
        **{f"quality:{key}": value for key, value in manifest.quality.items()},
        **{f"verification:{key}": value for key, value in manifest.verification.items()},
    }
    metrics = [
        {"type": key, "value": f"{value:.6g}"}
        for key, value in sorted(results.items())
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    signature = manifest.signature
    parameters: Json = {
        "task": _TASKS.get(manifest.task, manifest.task),
        "inputs": [{"format": _format(port)} for port in signature.inputs if not port.layer],
        "outputs": [{"format": _format(port)} for port in signature.outputs if not port.layer],
    }
    if manifest.model.family:
        parameters["modelArchitecture"] = manifest.model.family
    card: Json = {"modelParameters": parameters}
    if metrics:
        card["quantitativeAnalysis"] = {"performanceMetrics": metrics}
    return card


def _file(variant: Variant, path: str, digest: str) -> Json:
    ref = f"file:{variant.name}/{path}"
    return {"type": "file", "bom-ref": ref, "name": path, "hashes": [_hash(digest)]}


def _libraries(variant: Variant) -> list[Json]:
    """Return the components of the libraries that run a variant."""
    runtime = variant.needs.runtime
    components = []
    for name in filter(None, (runtime.package, *_ALWAYS)):
        ref = f"library:{name}"
        component: Json = {"type": "library", "bom-ref": ref, "name": name}
        component["purl"] = f"pkg:pypi/{name}"
        if name in _LICENSES:
            component["licenses"] = _licenses([_LICENSES[name]])
        components.append(component)
    return components


def _licenses(names: Sequence[str]) -> list[Json]:
    """Return licenses in the form of CycloneDX: names, or a single expression."""
    if len(names) == 1:
        return [{"expression": names[0]}]
    return [{"license": {"name": name}} for name in names]


def _requirements(needs: Needs) -> Mapping[str, str]:
    return {
        "llmopt:machines": " ".join(needs.machines),
        "llmopt:cpu_features": " ".join(needs.cpu_features),
        "llmopt:memory_bytes": str(needs.memory_bytes),
    }


def _format(port: Port) -> str:
    return f"{port.name} {port.dtype}[{','.join(map(str, port.shape))}]"


def _hash(digest: str) -> Json:
    return {"alg": "SHA-256", "content": digest}
