"""The smallest part of a Program on which a pass goes wrong, in files that show it again."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnx_ir as ir

from llmopt.artifact.writer import staged_folder
from llmopt.errors import LlmoptError, UsageError
from llmopt.frontend.onnx.saved import save_program
from llmopt.interface.arrays import Arrays
from llmopt.interface.signature import Port, Role, Signature
from llmopt.ir import graph as g
from llmopt.ir.program import Program
from llmopt.runtime.npz import write_npz
from llmopt.spelling import spell
from llmopt.verification.bisection import Culprit
from llmopt.verification.checks import STEP
from llmopt.verification.components import fails, unrunnable
from llmopt.verification.neighbourhood import neighbourhood
from llmopt.verification.values import error_of, evaluated, values

MODEL: Final = "model.onnx"
INPUTS: Final = "inputs.npz"
SCRIPT: Final = "reproduce.sh"
_HOPS: Final = (0, 1, 2, 3, 5, 8)
"""How far the parts that are tried reach from the nodes of the change."""


@dataclass(frozen=True)
class Example:
    """A Program on which a pass goes wrong.

    Args:
        program: The Program: a part of a model, or all of it.
        inputs: Inputs that show it; empty where the pass is wrong on any.
    """

    program: Program
    inputs: Arrays


def write_reproducer(
    culprit: Culprit, output: Path, plugins: Sequence[str] = (), *, force: bool = False
) -> str:
    """Write an example of what a pass does wrong; return the command that shows it.

    Args:
        culprit: The pass and what it did.
        output: A folder to make: ``model.onnx``, ``inputs.npz``, ``reproduce.sh``, and copies of
            the plugins that are files.
        plugins: The plugins that define the pass, where it is not one of ours.
        force: Whether an existing folder is replaced.

    Raises:
        UsageError: What the pass does wrong does not show in one component alone.
        OutputExistsError: Something is there, and ``force`` is off.
        StorageError: It could not be written.
    """
    if culprit.component is None:
        raise UsageError("an example has one component, and none shows it alone")
    example = reduced(culprit)
    with staged_folder(output, force=force) as folder:
        save_program(example.program, folder / MODEL)
        if example.inputs:
            write_npz(folder / INPUTS, example.inputs, force=False)
        own = [_copied(plugin, folder) for plugin in plugins]
        words = ["llmopt", "bisect", MODEL, "--passes", spell(culprit.item)]
        words += ["--inputs", INPUTS] if example.inputs else []
        command = shlex.join([*words, *(word for name in own for word in ("--plugin", name))])
        text = f'#!/bin/sh\ncd "$(dirname "$0")" && {command} "$@"\n'
        (folder / SCRIPT).write_text(text, encoding="utf-8")
        (folder / SCRIPT).chmod(0o755)
    return f"cd {shlex.quote(str(output))} && {command}"


def _copied(plugin: str, folder: Path) -> str:
    """Return the name of a copy in ``folder`` of a plugin that is a file; of a module, its own."""
    if not plugin.endswith(".py"):
        return plugin
    shutil.copyfile(plugin, folder / Path(plugin).name)
    return Path(plugin).name


def reduced(culprit: Culprit) -> Example:
    """Return the smallest part tried on which the pass does the same."""
    finding, rewrite = culprit.finding, culprit.rewrite
    if finding is None or finding.trial is None:
        full = Example(culprit.before, {})
        parts = _parts(culprit, rewrite.before, None) if culprit.problem else iter(())
    else:
        full = Example(culprit.before, _taken(culprit.before, finding.trial.feeds))
        parts = _parts(culprit, rewrite.before, finding.trial.feeds)
    return next((part for part in parts if _shows(culprit, part)), full)


def _taken(program: Program, arrays: Arrays) -> Arrays:
    known = {value.name for value in program.graph.inputs}
    return {name: array for name, array in arrays.items() if name in known}


def _parts(culprit: Culprit, program: Program, feeds: Arrays | None) -> Iterator[Example]:
    """Yield parts around the change, from the smallest on."""
    names = culprit.rewrite.nodes_before
    size = 0
    for hops in _HOPS:
        nodes = neighbourhood(names, program, hops)
        if not nodes or len(nodes) == size:
            continue
        size = len(nodes)
        part = cut(program, nodes)
        if part is None:
            continue
        if feeds is None:
            yield Example(part, {})
            continue
        others = [str(v.name) for v in part.graph.inputs if str(v.name) not in feeds]
        known = {str(v.name) for node in program.graph for v in node.outputs}
        inner = [name for name in others if name in known]
        computed = values(program, feeds, inner, exact=culprit.exact)
        yield Example(part, _taken(part, {**feeds, **computed}))


def cut(program: Program, nodes: Sequence[ir.Node]) -> Program | None:
    """Return these nodes as a Program of its own: what they read from others becomes inputs.

    None if a type is not known, or a node holds a graph.
    """
    part = program.clone()
    names = {node.name for node in nodes}
    inside = [node for node in part.graph if node.name in names]
    if any(a.type == ir.AttributeType.GRAPH for n in inside for a in n.attributes.values()):
        return None
    outputs = [v for node in inside for v in node.outputs if _is_read_outside(v, names)]
    inputs = _severed(part.graph, inside, names)
    if not outputs or any(value.dtype is None for value in (*inputs, *outputs)):
        return None
    part.graph.outputs.clear()
    part.graph.outputs.extend(outputs)
    part.graph.inputs.clear()
    part.graph.inputs.extend(inputs)
    g.remove_dead(part.model)
    known = {port.name: port for port in (*program.signature.inputs, *program.signature.outputs)}
    ports = [tuple(_port(v, known) for v in values) for values in (inputs, outputs)]
    part.signature = Signature(*ports)
    return part


def _is_read_outside(value: ir.Value, names: set[str | None]) -> bool:
    return value.is_graph_output() or any(user.name not in names for user in g.users(value))


def _severed(graph: ir.Graph, inside: Sequence[ir.Node], names: set[str | None]) -> list[ir.Value]:
    """Return the inputs of a part, each instead of a value that other nodes make."""
    inputs: dict[ir.Value, ir.Value] = {}
    for node in inside:
        for index, value in enumerate(node.inputs):
            if value is None or g.weight(value) is not None:
                continue
            maker = value.producer()
            if maker is not None and maker.name in names:
                continue
            if value not in inputs:
                inputs[value] = value if maker is None else _input_like(value)
            node.replace_input_with(index, inputs[value])
    order = {value: index for index, value in enumerate(graph.inputs)}
    return sorted(inputs.values(), key=lambda value: order.get(value, len(order)))


def _input_like(value: ir.Value) -> ir.Value:
    return ir.Value(name=value.name, shape=value.shape, type=value.type)


def _port(value: ir.Value, known: dict[str, Port]) -> Port:
    name = str(value.name)
    if name in known:
        return known[name]
    assert value.dtype is not None
    dims = [f"d{axis}" if str(d).startswith("?") else d for axis, d in enumerate(_sizes(value))]
    return Port(name, Role.OTHER, value.dtype.numpy().name, tuple(dims))


def _sizes(value: ir.Value) -> Sequence[int | str]:
    return g.shape(value) or ()


def _shows(culprit: Culprit, example: Example) -> bool:
    """Whether the pass goes wrong on a part as it did on the whole."""
    after = example.program.clone()
    failed = fails(culprit.item, after)
    if culprit.problem:
        return failed is True or (failed is None and unrunnable(after, exact=culprit.exact))
    if failed is not None:
        return False
    try:
        before = evaluated(example.program, exact=culprit.exact)(example.inputs)
        outputs = evaluated(after, exact=culprit.exact)(example.inputs)
    except LlmoptError:
        return False
    assert culprit.finding is not None
    trial = culprit.finding.trial
    assert trial is not None
    return any(not error_of(outputs[name], each, trial) <= STEP for name, each in before.items())
