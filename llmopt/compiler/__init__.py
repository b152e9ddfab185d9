"""Compile: a source goes in, an artifact that is proven to compute the same thing comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from llmopt.compiler.artifact import VERIFY, Artifact, CompileOptions, Progress
from llmopt.compiler.clock import Clock
from llmopt.errors import UsageError

if TYPE_CHECKING:
    import torch

    from llmopt.backends.base import Backend
    from llmopt.compiler.compilation import Optimized
    from llmopt.frontend.base import Source, SourceOptions
    from llmopt.interface.signature import Signature
    from llmopt.ir.program import Program
    from llmopt.passes.pipeline import Pipeline, Ran

__all__ = [
    "Artifact",
    "Clock",
    "CompileOptions",
    "Progress",
    "compile_source",
    "optimize",
    "pipeline_of",
]

_ADDS_CACHE: Final = "add-kv-cache"


def compile_source(  # noqa: PLR0913, PLR0917 - the options that every caller sets stand alone
    source: str | Path | torch.nn.Module,
    targets: Sequence[str],
    output: Path | None,
    options: CompileOptions,
    reading: SourceOptions,
    progress: Progress = lambda _: None,
) -> list[Artifact]:
    """Return one artifact for each target.

    Args:
        source: A path, ``file.py:factory``, or a module.
        targets: Target names.
        output: The artifact itself for one target, else the parent of one for each.
        options: The artifact to make.
        reading: Options of reading the source.
        progress: Told what is being done.

    Raises:
        LlmoptError: as ``open_source``, the passes, the backends and verification do.
    """
    from llmopt.artifact.writer import check_destination
    from llmopt.backends import find_backend
    from llmopt.compiler.compilation import Compilation

    backends = [find_backend(target) for target in targets]
    _check_distinct(backends)
    _check_scheme(options, backends)
    if options.verify not in VERIFY:
        raise UsageError(f"--verify {options.verify!r}: choose one of {', '.join(VERIFY)}")
    for backend in backends if output is not None else ():
        check_destination(_place(output, "", backend, targets), force=options.force)
    options = _without_lowering(options, backends)
    clock = Clock(progress)
    optimized = optimize(source, options, reading, clock)
    name = optimized.source.name
    places = [_place(output, name, backend, targets) for backend in backends]
    for place in places:
        check_destination(place, force=options.force)
    suited = [_suited(optimized, backend, options, clock) for backend in backends]
    return [
        Compilation.prepare(each, backend, options, clock).run(place)
        for each, backend, place in zip(suited, backends, places, strict=True)
    ]


def _suited(
    optimized: Optimized, backend: Backend, options: CompileOptions, clock: Clock
) -> Optimized:
    """Return the source as it was optimized, or without a cache that this backend cannot run."""
    traced = optimized.uncached
    reason = None if traced is None else backend.cache_obstacle(optimized.source.program)
    if traced is None or reason is None:
        return optimized
    forked = dataclasses.replace(traced, program=traced.program.clone())
    pipeline = pipeline_of(options.minus(_ADDS_CACHE))
    again = _optimized(forked, pipeline, options, optimized.reading, clock)
    note = f"no KV cache on {backend.name}, each new token recomputes the whole prefix: {reason}"
    opened = dataclasses.replace(again.source, notes=(*again.source.notes, note))
    return dataclasses.replace(again, source=opened)


def optimize(
    source: str | Path | torch.nn.Module,
    options: CompileOptions,
    reading: SourceOptions,
    clock: Clock,
) -> Optimized:
    """Return a source traced and through the passes that no target asks for.

    Raises:
        LlmoptError: as ``open_source`` and the passes do; or what is required was not fused.
    """
    from llmopt.frontend.source import open_source
    from llmopt.fusion import required_kinds

    pipeline = pipeline_of(options)
    required_kinds(options.require)  # a wrong one is reported before any work
    with clock("tracing"):
        opened = open_source(source, reading)
    return _optimized(opened, pipeline, options, reading, clock)


def _optimized(
    opened: Source,
    pipeline: Pipeline,
    options: CompileOptions,
    reading: SourceOptions,
    clock: Clock,
) -> Optimized:
    """Return a traced source, which is edited, through the passes that no target asks for."""
    from llmopt.compiler.compilation import Optimized, noted
    from llmopt.fusion import fusion_report, require
    from llmopt.verification.each import Watch

    uncached = _uncached(opened, pipeline)
    watch: Watch | None = None
    ran: list[Ran] = []
    before = opened.program.signature
    with clock("optimizing"):
        if options.verify == "each":
            watch = Watch.started(opened.reference, opened.program)
            watch.checks[0].require()
        pipeline.run(opened.program, noted(ran, watch))
    opened = _as_signed(opened, before, ran)
    report = fusion_report(opened.program, ran)
    require(report, options.require)
    _check_dialect(opened.program)
    if not any(each.name == _ADDS_CACHE and each.applied for each in ran):
        uncached = None
    return Optimized(
        source=opened,
        pipeline=str(pipeline),
        ran=ran,
        fusion=report,
        reading=reading,
        watch=watch,
        uncached=uncached,
    )


def _uncached(opened: Source, pipeline: Pipeline) -> Source | None:
    """Return a copy of a traced source where passes may add a cache; unread weights are shared."""
    program = opened.program
    adds = any(each.name == _ADDS_CACHE for each in pipeline.passes)
    if not adds or program.signature.has_cache:
        return None
    return dataclasses.replace(opened, program=program.clone())


def _as_signed(opened: Source, before: Signature, ran: Sequence[Ran]) -> Source:
    """Return the source as passes changed its edge, and what became of its cache in words."""
    from llmopt.frontend.adapted import adapted

    reference = adapted(opened.reference, before, opened.program.signature)
    notes = (*opened.notes, *_cache_notes(opened.program, ran))
    return dataclasses.replace(opened, reference=reference, notes=notes)


def _cache_notes(program: Program, ran: Sequence[Ran]) -> list[str]:
    """Return what `add-kv-cache` did, or why it did nothing, in words."""
    notes = []
    for each in (each for each in ran if each.name == _ADDS_CACHE):
        if each.applied:
            layers = program.facts.model.layers
            notes.append(f"add-kv-cache: keys and values of {layers} layers are remembered")
        notes.extend(
            "add-kv-cache: no KV cache, each new token recomputes the whole prefix; "
            f"{miss.node!r}: {miss.reason}"
            for miss in each.missed
        )
    return notes


def _check_distinct(backends: Sequence[Backend]) -> None:
    names = [backend.name for backend in backends]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"--target {name} is given twice, and both would be written to one place; "
                "compile them one by one, each with its own -o"
            )


def _check_scheme(options: CompileOptions, backends: Sequence[Backend]) -> None:
    from llmopt.backends import known_backends

    scheme = options.quantize
    if scheme is None:
        if options.max_kl is not None:
            raise UsageError("--max-kl bounds what quantization costs: give --quantize too")
        return
    for backend in backends:
        if (reason := backend.supports(scheme)) is not None:
            others = [
                name for name, of in known_backends().items() if of().supports(scheme) is None
            ]
            hint = f"; {scheme} is for {', '.join(others)}" if others else ""
            raise UsageError(f"--quantize {scheme}: {backend.name} has {reason}{hint}")


def _without_lowering(options: CompileOptions, backends: Sequence[Backend]) -> CompileOptions:
    """Return the options, lowering passes that ``passes`` takes away moved to ``without``."""
    from llmopt.passes import PASSES

    lowering = {each.name for b in backends for each in b.passes(options.quantize)} - set(PASSES)
    items = options.passes
    moved = [item for item in items if isinstance(item, str) and item[:1] == "-"]
    moved = [item for item in moved if item[1:] in lowering]
    if not moved:
        return options
    kept = tuple(item for item in items if item not in moved)
    return dataclasses.replace(options, passes=kept, without=frozenset(item[1:] for item in moved))


def pipeline_of(options: CompileOptions) -> Pipeline:
    """Return the passes that no target asks for, those of plugins among them.

    Raises:
        LlmoptError: There is no such pass, or a plugin cannot be read.
    """
    from llmopt.passes.pipeline import Pipeline

    return Pipeline.parse(options.passes, plugins=options.plugins)


def _place(output: Path | None, name: str, backend: Backend, targets: Sequence[str]) -> Path:
    if output is None:
        return Path(f"{name}.{backend.name}")
    return output if len(targets) == 1 else output / backend.name


def _check_dialect(program: Program) -> None:
    from llmopt.errors import PassError
    from llmopt.ir.dialect import invariants

    if problems := [each for m in program.components.values() for each in invariants(m)]:
        raise PassError("default", "; ".join(problems[:3]))
