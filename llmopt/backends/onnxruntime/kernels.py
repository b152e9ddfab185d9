"""Which operators a provider of ONNX Runtime has kernels for, from a table recorded once.

`cuda_kernels.json` lists for each kernel the operator, its domain, its versions and the element
types it is compiled for. ONNX Runtime silently runs on the CPU what a provider has no kernel for; a
backend for a device therefore looks up every node before it writes anything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, Self

import onnx_ir as ir

from llmopt.ir.dialect import OPSET
from llmopt.ir.types import Formals, Types, element_types, standard

CUDA: Final = Path(__file__).with_name("cuda_kernels.json")
MICROSOFT: Final = "com.microsoft"


@dataclass(frozen=True)
class KernelDef:
    """One kernel.

    Args:
        first: The first version of the operator it is for.
        last: The last one, None where there is no later one yet.
        types: The element types that each letter of the schema may be.
    """

    first: int
    last: int | None
    types: Mapping[str, frozenset[str]]

    def fits(self, version: int, letters: Mapping[str, str]) -> bool:
        """Whether it is for this version of the operator and these types.

        ONNX Runtime takes a kernel without a last opset for one version alone, since a later one
        may mean something else. A letter that the kernel does not name may be any type.
        """
        if self.last is None and version != self.first:
            return False
        if self.last is not None and not self.first <= version <= self.last:
            return False
        return all(dtype in self.types.get(name, {dtype}) for name, dtype in letters.items())


@dataclass(frozen=True)
class KernelTable:
    """The kernels of one provider.

    Args:
        provider: Name of the provider.
        source: Origin and version of the table.
        kernels: Kernels by domain and operator.
        formals: The schemas of operators beyond ONNX's own.
    """

    provider: str
    source: str
    kernels: Mapping[tuple[str, str], Sequence[KernelDef]]
    formals: Mapping[tuple[str, str], Formals]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the table that ``bench/gpu/record_kernels.py`` wrote."""
        data = json.loads(path.read_text(encoding="utf-8"))
        kernels: dict[tuple[str, str], list[KernelDef]] = {}
        for domain, op_type, first, last, types in data["kernels"]:
            letters = {name: frozenset(dtypes) for name, dtypes in types.items()}
            kernels.setdefault((domain, op_type), []).append(KernelDef(first, last, letters))
        formals = {
            (domain, op_type): Formals(tuple(inputs), tuple(outputs), variadic=variadic)
            for domain, op_type, inputs, outputs, variadic in data["schemas"]
        }
        return cls(data["provider"], data["source"], kernels, formals)

    def lacking(self, graph: ir.Graph) -> list[str]:
        """Return every node that would fall back to the CPU, and why."""
        types = element_types(graph, self.schema)
        return [problem for node in graph if (problem := self._problem(node, types))]

    def schema(self, node: ir.Node) -> Formals | None:
        """Return the types of an operator of any domain."""
        return standard(node) or self.formals.get((node.domain, node.op_type))

    def _problem(self, node: ir.Node, types: Types) -> str:
        known = self.kernels.get((node.domain, node.op_type))
        label = f"{node.op_type} ({node.name!r})"
        if not known:
            return "" if decomposes(node) else f"no {self.provider} kernel for {label}"
        letters = self._letters(node, types)
        if decomposes(node) or any(
            kernel.fits(since(node.domain, node.op_type), letters) for kernel in known
        ):
            return ""
        actual = ", ".join(f"{name} {dtype}" for name, dtype in sorted(letters.items()))
        return f"no {self.provider} kernel for {label} with {actual}"

    def _letters(self, node: ir.Node, types: Types) -> dict[str, str]:
        """Return the types that the letters of a node's schema stand for."""
        formals = self.schema(node)
        letters: dict[str, str] = {}
        for values, named in ((node.inputs, "input"), (node.outputs, "output")):
            for index, value in enumerate(values):
                name = getattr(formals, named)(index) if formals is not None else ""
                if value is not None and value in types and name and "(" not in name:
                    letters.setdefault(name, types[value].name.lower())
        return letters


@cache
def _has_body(op_type: str, domain: str) -> bool:
    import onnx

    if not onnx.defs.has(op_type, domain):
        return False
    schema = onnx.defs.get_schema(op_type, OPSET, domain)
    return bool(schema.has_function or schema.has_context_dependent_function)  # type: ignore[attr-defined]


def decomposes(node: ir.Node) -> bool:
    """Whether ONNX defines the operator by others, so that any runtime can inline it."""
    return _has_body(node.op_type, node.domain)


@cache
def since(domain: str, op_type: str) -> int:
    """Return the version of an operator that the dialect's opset has, 0 where it has none."""
    import onnx

    if domain == MICROSOFT:
        return 1
    if not onnx.defs.has(op_type, domain):
        return 0
    version: int = onnx.defs.get_schema(op_type, OPSET, domain).since_version
    return version


@cache
def cuda_kernels() -> KernelTable:
    """Return the committed table of CUDA's kernels."""
    return KernelTable.read(CUDA)
