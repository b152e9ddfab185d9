"""``llmopt opt``: passes on one ONNX file, to see what each does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from llmopt.errors import SourceError, SourceNotFoundError, UnknownNameError

if TYPE_CHECKING:
    import onnx_ir as ir

    from llmopt.ir.program import Program
    from llmopt.passes.base import Pass
    from llmopt.passes.pipeline import Pipeline, Ran

_SHOWN_ELEMENTS: Final = 16  # larger weights are named in the text, not spelled out
_EMBEDDED_BYTES: Final = 1_000_000_000  # protobuf takes 2 GB: more goes into a file beside it


@click.command("opt")
@click.argument("model", type=click.Path(path_type=Path), metavar="MODEL.onnx")
@click.option(
    "--passes", required=True, metavar="TEXT", help="The pipeline, as in canonicalize,fuse-norms."
)
@click.option(
    "--plugin", "plugins", multiple=True, metavar="FILE", help="A file that defines more passes."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE.onnx",
    help="Write the result here, and no text to stdout.",
)
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
@click.option(
    "--print-after", metavar="PASS|all", help="Print the text after this pass, or after each."
)
def opt_command(model: Path, passes: str, **options: Any) -> None:
    """Run passes on MODEL.onnx and print the result as text.

    Each pass gets a line on stderr: what it applied, and what it declined and why.
    """
    from llmopt.bundle.writer import check_destination

    output, wanted = options["output"], options["print_after"]
    if output is not None:
        check_destination(output, force=options["force"])
    pipeline = _pipeline(passes, options["plugins"])
    _check_wanted(wanted, pipeline)
    program = _read(model)

    def after(item: Pass, edited: Program, ran: Ran) -> None:
        _report(ran)
        if wanted in {"all", item.name}:
            click.echo(f"# after {item.name}\n{text(edited.model)}")

    pipeline.run(program, after)
    if output is not None:
        _save(program.model, output, force=options["force"])
    elif wanted is None:
        click.echo(text(program.model))


def _pipeline(passes: str, plugins: tuple[str, ...]) -> Pipeline:
    from llmopt.passes import known_passes
    from llmopt.passes.pipeline import Pipeline, load_plugin

    known = known_passes()
    for plugin in plugins:
        known |= load_plugin(plugin)
    return Pipeline.parse(passes, known=known)


def _check_wanted(wanted: str | None, pipeline: Pipeline) -> None:
    names = [item.name for item in pipeline.passes]
    if wanted not in {None, "all", *names}:
        raise UnknownNameError("pass in this pipeline", str(wanted), [*names, "all"])


def _read(path: Path) -> Program:
    from llmopt.frontend.source import SourceOptions, open_source

    hint = "opt takes an ONNX file; `llmopt compile` takes every other source"
    if not path.is_file():
        raise SourceNotFoundError(path, hint)
    if path.suffix != ".onnx":
        raise SourceError(path, "not an .onnx file", hint)
    return open_source(path, SourceOptions()).program


def _report(ran: Ran) -> None:
    click.echo(f"{ran.name}: {ran.applied} applied, {len(ran.missed)} missed", err=True)
    for miss in ran.missed:
        click.echo(f"  {miss.node}: {miss.reason}", err=True)


def text(model: ir.Model) -> str:
    """Return the text of a model; of large weights only name, type and shape."""
    import onnx_ir as ir

    shown = model.clone()
    for name, value in shown.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.size > _SHOWN_ELEMENTS:
            value.const_value = ir.ExternalTensor(
                "elided", None, None, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
            )
    return ir.to_onnx_text(shown).strip()


def _save(model: ir.Model, output: Path, *, force: bool) -> None:
    import onnx_ir as ir

    from llmopt.bundle.writer import staged_file
    from llmopt.ir.saving import save_with_data

    tensors = (value.const_value for value in model.graph.initializers.values())
    if sum(tensor.nbytes for tensor in tensors if tensor is not None) < _EMBEDDED_BYTES:
        with staged_file(output, force=force) as staging:
            ir.save(model, staging, format="protobuf")
        return
    data = output.with_name(f"{output.name}.data")
    with staged_file(data, force=force) as weights, staged_file(output, force=force) as staging:
        save_with_data(model, staging, weights.name)
        _rename_data(staging, data.name)


def _rename_data(file: Path, name: str) -> None:
    """Make a saved model find its weights under the name that they will have."""
    import onnx

    model = onnx.load(file, load_external_data=False, format="protobuf")
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    file.write_bytes(model.SerializeToString())
