"""The Python API: compile, load, trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmopt.lazy import extras_needed

if TYPE_CHECKING:
    import torch

    from llmopt.compiler import Artifact, Progress
    from llmopt.ir.difference import Difference
    from llmopt.ir.program import Program
    from llmopt.passes.pipeline import Item, Pipeline
    from llmopt.passes.plugins import Plugin
    from llmopt.runtime import Runner


@extras_needed()
def compile(  # noqa: A001, PLR0913 - the name of the design; every option is a keyword
    source: str | Path | torch.nn.Module,
    *,
    target: str = "onnxruntime-cpu",
    output: str | Path | None = None,
    quantize: str | None = None,
    passes: str | Pipeline | Sequence[Item] = "default",
    plugins: Sequence[Plugin] = (),
    require: Sequence[str] = (),
    verify: str = "final",
    max_kl: float | None = None,
    force: bool = False,
    batch: int = 8,
    defer_engine: bool = False,
    model: str | None = None,
    task: str | None = None,
    example_inputs: Mapping[str, Any] | Sequence[Any] | str | Path | None = None,
    dynamic_shapes: Any = None,
    max_length: int | None = None,
    trust_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = lambda _: None,
) -> Artifact:
    """Return the artifact of ``source`` for ``target``, proven to compute the same thing.

    Args:
        source: A module, ``file.py:factory``, a Hugging Face folder, or a .gguf, .onnx, .pt2 or
            .pt file.
        target: ``llmopt targets`` lists them.
        output: The artifact's directory; ``<source>.<target>`` here if not given.
        quantize: A scheme, ``"w8"``, ``"w4"``, ``"w4{block=64}"``, ``"w8a8-dynamic"``.
        passes: The pipeline, ``"default"`` or as ``"default,-merge-qkv,my-pass"``; or a sequence
            of such texts and passes, ``["default", MyPass(limit=3)]``; or a Pipeline.
        plugins: Python files, modules or classes that define more passes.
        require: ``"attention=all"`` and the like: a fusion that is missed is then an error.
        verify: ``"final"`` compares the artifact with the source; ``"each"`` the Program after
            each pass too, with the one before it; ``"off"`` nothing.
        max_kl: The largest mean KL divergence that quantization may cost, nats.
        force: Whether an existing output is replaced.
        batch: Most sequences at once, for targets that must know before they build.
        defer_engine: Whether what needs the device is built there, at the first load.
        model: ``file.py:factory`` of the module that a state_dict belongs to.
        task: ``"generate"``, ``"embed"``, ``"encode"`` or ``"raw"``; recognized if not given.
        example_inputs: Inputs to call a module with: by name, in order, or the path of an .npz.
        dynamic_shapes: Dimensions as ``torch.export.export`` takes them; batch and tokens if not
            given.
        max_length: The most tokens of one sequence; the model's own limit if not given.
        trust_pickle: Whether a file may execute code that it carries.
        trust_remote_code: Whether Python code in a Hugging Face folder may be executed.
        progress: Told what is being done.

    Raises:
        LlmoptError: the source, an option or the result is not acceptable; it says why.
    """
    from llmopt.compiler import CompileOptions, compile_source
    from llmopt.frontend.base import SourceOptions
    from llmopt.passes.pipeline import items_of
    from llmopt.quantization.schemes import parse_scheme

    options = CompileOptions(
        quantize=None if quantize is None else parse_scheme(quantize),
        passes=items_of(passes),
        plugins=plugins,
        require=require,
        verify=verify,
        max_kl=max_kl,
        force=force,
        batch=batch,
        defer_engine=defer_engine,
    )
    reading = SourceOptions(
        model=model,
        trust_pickle=trust_pickle,
        task=task,
        example_inputs=example_inputs,
        dynamic_shapes=dynamic_shapes,
        max_length=max_length,
        trust_remote_code=trust_remote_code,
    )
    place = None if output is None else Path(output)
    return compile_source(source, [target], place, options, reading, progress)[0]


@extras_needed()
def load(
    artifact: str | Path | Artifact,
    *,
    threads: int | None = None,
    key: str | Path | None = None,
    certificate_chain: Sequence[str | Path] = (),
    signature: str | Path | None = None,
) -> Runner:
    """Return a runner for an artifact.

    Args:
        artifact: The artifact or its directory; or a bundle, of which the variant that suits
            this machine is taken.
        threads: Threads inside one operator; the cores this process may use if not given.
        key: A public key: the bundle has to be signed with its private one.
        certificate_chain: Certificates that the signer's own has to lead to; or a key.
        signature: Signature of the bundle; the one next to it if not given.

    Raises:
        ArtifactError: it is not an artifact, or is damaged.
        BackendUnavailableError: what runs it is not installed, or nothing in a bundle runs here.
        SignatureError: the bundle is not signed by whom it should be.
    """
    from llmopt.runtime import load as load_path

    path = artifact if isinstance(artifact, str | Path) else artifact.path
    return load_path(
        path, threads=threads, key=key, certificate_chain=certificate_chain, signature=signature
    )


@extras_needed()
def diff(before: Program | str | Path, after: Program | str | Path) -> Difference:
    """Return what changed from one model to another; names and order are no change.

    Args:
        before: A Program; or the path of an artifact, of an .onnx file or its text, or a source.
        after: The same of the other model.

    Raises:
        LlmoptError: One is not there, or is damaged.
    """
    from llmopt.comparison import compare

    return compare(before, after)


@extras_needed()
def trace(
    module: torch.nn.Module,
    example_inputs: Mapping[str, Any] | Sequence[Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> Program:
    """Return the Program of a module, as traced: no pass has run yet.

    Args:
        module: The module.
        example_inputs: Inputs to call it with, by name or in order.
        dynamic_shapes: Dimensions as ``torch.export.export`` takes them; batch and tokens if not
            given.

    Raises:
        UnsupportedModelError: torch cannot export it.
    """
    from llmopt.frontend.base import SourceOptions
    from llmopt.frontend.source import open_source

    options = SourceOptions(example_inputs=example_inputs, dynamic_shapes=dynamic_shapes)
    return open_source(module, options).program
