"""Record which kernels ONNX Runtime's CUDA provider has, for `llmopt` to look nodes up in.

python bench/gpu/record_kernels.py [--output FILE]

It needs onnxruntime-gpu and the CUDA libraries it loads (no device: a list of kernels computes
nothing). Kernels for opsets that llmopt never writes are left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Final

from llmopt.backends.onnxruntime.kernels import CUDA, MICROSOFT, KernelDef, since
from llmopt.ir.dialect import OPSET

PROVIDER: Final = "CUDAExecutionProvider"
DOMAINS: Final = ("", MICROSOFT)


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=CUDA)
    options = parser.parse_args()
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kernels = recorded(state.get_all_opkernel_def())
    if not kernels:
        raise SystemExit(f"this onnxruntime has no {PROVIDER}: pip install onnxruntime-gpu")
    used = {(domain, op_type) for domain, op_type, *_ in kernels}
    table = {
        "provider": PROVIDER,
        "source": f"get_all_opkernel_def() of onnxruntime-gpu {onnxruntime.__version__}",
        "opset": OPSET,
        "kernels": kernels,
        "schemas": schemas(state.get_all_operator_schema(), used),
    }
    options.output.write_text(text(table), encoding="utf-8")
    print(f"{options.output}: {len(kernels)} kernels of {len(used)} operators")


def recorded(definitions: list[Any]) -> list[list[Any]]:
    """Return [domain, operator, first opset, last opset or null, types by letter], sorted."""
    rows = []
    for kernel in definitions:
        first, last = kernel.version_range
        domain = "" if kernel.domain == "ai.onnx" else kernel.domain
        end = None if last >= 1 << 30 else last
        if kernel.provider != PROVIDER or domain not in DOMAINS:
            continue
        if not KernelDef(first, end, {}).fits(since(domain, kernel.op_name), {}):
            continue
        types = {
            letter: sorted(word.removeprefix("tensor(").removesuffix(")") for word in allowed)
            for letter, allowed in sorted(kernel.type_constraints.items())
        }
        rows.append([domain, kernel.op_name, first, end, types])
    return sorted(rows, key=json.dumps)


def schemas(known: list[Any], used: set[tuple[str, str]]) -> list[list[Any]]:
    """Return [domain, operator, input types, output types, variadic] beyond ONNX's own, sorted."""
    rows = []
    for schema in known:
        if schema.domain != MICROSOFT or (schema.domain, schema.name) not in used:
            continue
        variadic = bool(schema.inputs) and "Variadic" in str(schema.inputs[-1].option)
        inputs = [formal.typeStr for formal in schema.inputs]
        outputs = [formal.typeStr for formal in schema.outputs]
        rows.append([schema.domain, schema.name, inputs, outputs, variadic])
    return sorted(rows, key=json.dumps)


def text(table: dict[str, Any]) -> str:
    """Return the table as JSON, one row a line, so that a diff tells what changed."""
    lines = []
    for key, value in table.items():
        if isinstance(value, list):
            rows = ",\n  ".join(json.dumps(row) for row in value)
            lines.append(f"{json.dumps(key)}: [\n  {rows}\n ]")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n " + ",\n ".join(lines) + "\n}\n"


if __name__ == "__main__":
    main()
