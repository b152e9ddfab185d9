"""``llmopt opt``: run passes on one ONNX file or its text, to see the effect of each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from llmopt.cli.plugins import plugin_option
from llmopt.errors import SourceError, SourceNotFoundError, UnknownNameError

if TYPE_CHECKING:
    import onnx_ir as ir

    from llmopt.ir.program import Program
    from llmopt.passes.base import Pass
    from llmopt.passes.pipeline import Pipeline, Ran

_PRINTED_ELEMENTS: Final = 16  # larger weights are elided in the text
_EMBEDDED_BYTES: Final = 1_000_000_000  # protobuf stops at 2 GB: more goes into a data file
_INLINE_BYTES: Final = 256  # per weight: ir.save keeps at most 256 in the model


@click.command("opt")
@click.argument("model", type=click.Path(path_type=Path), metavar="MODEL")
@click.option(
    "--passes",
    required=True,
    metavar="TEXT",
    help="Pass pipeline, such as canonicalize,fuse-norms.",
)
@plugin_option
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the result to FILE instead of stdout: ONNX, or text if FILE ends in .ir.",
)
@click.option("--force", is_flag=True, help="Overwrite an existing output.")
@click.option(
    "--print-after", metavar="PASS|all", help="Print the IR after this pass, or after every pass."
)
@click.option("--timing", is_flag=True, help="Print the time of each pass in ms.")
def opt_command(model: Path, passes: str, **options: Any) -> None:
    """Run passes on an ONNX file or its text, and print the result.

    Each pass reports on stderr what it applied, and what it declined and why. Text (.ir) and ONNX
    files with a KV cache are read as they are; other ONNX files are raised to the dialect.
    """
    from llmopt.artifact.writer import check_destination
    from llmopt.passes.pipeline import Pipeline

    output, print_after = options["output"], options["print_after"]
    if output is not None:
        check_destination(output, force=options["force"])
    pipeline = Pipeline.parse(passes, plugins=options["plugins"])
    _check_print_after(print_after, pipeline)
    program = _read(model)

    def after(item: Pass, edited: Program, ran: Ran) -> None:
        _report(ran, timed=options["timing"])
        if print_after in {"all", item.name}:
            click.echo(f"# after {item.name}\n{text(edited.model)}")

    pipeline.run(program, after)
    if output is not None:
        _save(program.model, output, force=options["force"])
    elif print_after is None:
        click.echo(text(program.model))


def _check_print_after(name: str | None, pipeline: Pipeline) -> None:
    names = [item.name for item in pipeline.passes]
    if name not in {None, "all", *names}:
        raise UnknownNameError("pass in this pipeline", str(name), [*names, "all"])


def _read(path: Path) -> Program:
    from llmopt.frontend.base import SourceOptions
    from llmopt.frontend.onnx.program_file import TEXT, open_program, read_model
    from llmopt.frontend.source import open_source

    hint = "opt takes an ONNX file or its text (.ir); use `llmopt compile` for other sources"
    if not path.is_file():
        raise SourceNotFoundError(path, hint)
    if path.suffix not in {".onnx", *TEXT}:
        raise SourceError(path, "neither .onnx nor .ir", hint)
    if path.suffix in TEXT or _takes_cache(read_model(path)):
        return open_program(path)
    return open_source(path, SourceOptions()).program


def _takes_cache(model: ir.Model) -> bool:
    return any(str(value.name).startswith("past_key_values") for value in model.graph.inputs)


def _report(ran: Ran, *, timed: bool) -> None:
    duration = f", {ran.duration_s * 1e3:.1f} ms" if timed else ""
    click.echo(f"{ran.name}: {ran.applied} applied, {len(ran.missed)} missed{duration}", err=True)
    for miss in ran.missed:
        click.echo(f"  {miss.node}: {miss.reason}", err=True)
    for note in ran.notes:
        click.echo(f"  {note}", err=True)


def text(model: ir.Model) -> str:
    """Return the text of a model, with large weights reduced to name, type and shape."""
    import onnx_ir as ir

    elided = model.clone()
    for name, value in elided.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.size > _PRINTED_ELEMENTS:
            value.const_value = ir.ExternalTensor(
                "elided", None, None, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
            )
    return ir.to_onnx_text(elided).strip()


def _save(model: ir.Model, output: Path, *, force: bool) -> None:
    import onnx_ir as ir

    from llmopt.artifact.writer import staged_file
    from llmopt.frontend.onnx.program_file import TEXT
    from llmopt.ir.saving import readable

    tensors = [value.const_value for value in model.graph.initializers.values()]
    written = [tensor for tensor in tensors if tensor is not None]
    as_text = output.suffix in TEXT
    if sum(tensor.nbytes for tensor in written) < _EMBEDDED_BYTES and not as_text:
        with staged_file(output, force=force) as staging, readable():
            ir.save(model, staging, format="protobuf")
    elif as_text and all(tensor.nbytes <= _INLINE_BYTES for tensor in written):
        with staged_file(output, force=force) as staging, readable():
            staging.write_text(ir.to_onnx_text(model), encoding="utf-8")
    else:
        _save_with_data(model, output, as_text=as_text, force=force)


def _save_with_data(model: ir.Model, output: Path, *, as_text: bool, force: bool) -> None:
    import onnx

    from llmopt.artifact.writer import staged_file
    from llmopt.ir.saving import save_with_data

    data = output.with_name(f"{output.name}.data")
    with staged_file(data, force=force) as weights, staged_file(output, force=force) as staging:
        save_with_data(model, staging, weights.name)
        written = _renamed_data(staging, data.name)
        text = onnx.printer.to_text(written).encode() if as_text else written.SerializeToString()
        staging.write_bytes(text)


def _renamed_data(file: Path, name: str) -> Any:
    """Return a saved model that refers to its weights by the data file's final name."""
    import onnx

    model = onnx.load(file, load_external_data=False, format="protobuf")
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    return model
