"""Compile: a source goes in, an artifact that is proven to compute the same thing comes out."""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmopt.errors import AccuracyError, UnsupportedModelError, UsageError
from llmopt.fusion import Fused, fusion_report, require, required_kinds

if TYPE_CHECKING:
    import torch

    from llmopt.backends.base import Backend, Demand
    from llmopt.bundle.manifest import Manifest
    from llmopt.frontend.source import Source, SourceOptions
    from llmopt.ir.program import Program
    from llmopt.passes.base import Pass
    from llmopt.passes.pipeline import Ran
    from llmopt.quantization.schemes import Scheme
    from llmopt.verification import Verification

Progress = Callable[[str], None]


@dataclass(frozen=True)
class CompileOptions:
    """What to make of a source.

    Args:
        quantize: A scheme, ``"w4"`` or ``"w4{block=64}"``; None keeps float32.
        passes: The pipeline before quantization and lowering, as text.
        plugins: Python files or modules that define more passes.
        require: ``"attention=all"`` and the like: a miss is then an error.
        verify: ``"final"`` or ``"off"``.
        max_kl: The largest mean KL divergence from the source that is accepted, nats.
        force: Whether an existing output is replaced.
        batch: Most sequences at once, for backends that must know.
        defer_engine: Whether what needs the device is built there, at the first load.
    """

    quantize: str | None = None
    passes: str = "default"
    plugins: Sequence[str] = ()
    require: Sequence[str] = ()
    verify: str = "final"
    max_kl: float | None = None
    force: bool = False
    batch: int = 8
    defer_engine: bool = False


@dataclass(frozen=True)
class Artifact:
    """A compiled model on disk.

    Args:
        path: Its directory.
        manifest: What its manifest says.
        passes: What each pass did.
        fusion: What was expected and what was fused.
        notes: What a user should know.
    """

    path: Path
    manifest: Manifest
    passes: tuple[Ran, ...] = ()
    fusion: Mapping[str, Fused] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """All of its files together."""
        return sum(file.size_bytes for file in self.manifest.files)

    def summary(self) -> dict[str, Any]:
        """Return what ``compile --json`` shows of it."""
        return {
            "path": str(self.path),
            "target": self.manifest.target,
            "size_bytes": self.size_bytes,
            "passes": [
                {
                    "name": ran.name,
                    "applied": ran.applied,
                    "missed": [{"node": m.node, "reason": m.reason} for m in ran.missed],
                }
                for ran in self.passes
            ],
            "fusion": {kind: dataclasses.asdict(fused) for kind, fused in self.fusion.items()},
            "verification": dict(self.manifest.verification),
            "quality": dict(self.manifest.quality),
        }


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
        options: What to make.
        reading: How to read the source.
        progress: Told what is being done.

    Raises:
        LlmoptError: as ``open_source``, the passes, the backends and verification do.
    """
    from llmopt.backends import find_backend
    from llmopt.bundle.writer import check_destination
    from llmopt.frontend.source import open_source

    backends = [find_backend(target) for target in targets]
    _check_distinct(backends)
    _check_scheme(options, backends)
    pipeline = _pipeline(options)
    required_kinds(options.require)  # a wrong one is told before any work
    if options.verify not in ("final", "off"):
        raise UsageError(f"--verify {options.verify!r}: choose final or off")
    for backend in backends if output is not None else ():
        check_destination(_place(output, "", backend, targets), force=options.force)
    clock = _Clock(progress)
    with clock("tracing"):
        opened = open_source(source, reading)
    places = [_place(output, opened.name, backend, targets) for backend in backends]
    for place in places:
        check_destination(place, force=options.force)
    ran: list[Ran] = []
    with clock("optimizing"):
        pipeline.run(opened.program, lambda _, __, done: ran.append(done))
    report = fusion_report(opened.program, ran)
    require(report, options.require)
    _check_dialect(opened.program)
    return [
        _compilation(opened, backend, options, clock).run(place, str(pipeline), ran, report)
        for backend, place in zip(backends, places, strict=True)
    ]


def _check_distinct(backends: Sequence[Backend]) -> None:
    names = [backend.name for backend in backends]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"--target {name} is given twice, and both would be written to one place; "
                "compile them one by one, each with its own -o"
            )


def _check_scheme(options: CompileOptions, backends: Sequence[Backend]) -> None:
    from llmopt.errors import UnknownNameError
    from llmopt.quantization.schemes import parse_scheme

    if options.quantize is None:
        if options.max_kl is not None:
            raise UsageError("--max-kl bounds what quantization costs: give --quantize too")
        return
    parse_scheme(options.quantize)
    name = options.quantize.split("{")[0]
    for backend in backends:
        if name not in backend.schemes:
            raise UnknownNameError(f"scheme for {backend.name}", name, backend.schemes)


def _pipeline(options: CompileOptions) -> Any:
    from llmopt.passes import known_passes
    from llmopt.passes.pipeline import Pipeline, load_plugin

    known = known_passes()
    for plugin in options.plugins:
        known |= load_plugin(plugin)
    return Pipeline.parse(options.passes, known=known)


def _place(output: Path | None, name: str, backend: Backend, targets: Sequence[str]) -> Path:
    if output is None:
        return Path(f"{name}.{backend.name}")
    return output if len(targets) == 1 else output / backend.name


def _check_dialect(program: Program) -> None:
    from llmopt.errors import PassError
    from llmopt.ir.dialect import invariants

    if problems := invariants(program.model):
        raise PassError("default", "; ".join(problems[:3]))


class _Clock:
    """Tells what is being done, and remembers how long each stage took."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.stages: dict[str, float] = {}

    def __call__(self, stage: str) -> _Stage:
        self.progress(stage)
        return _Stage(self, stage)


class _Stage:
    def __init__(self, clock: _Clock, name: str) -> None:
        self._clock = clock
        self._name = name

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent = time.perf_counter() - self._start
        self._clock.stages[self._name] = self._clock.stages.get(self._name, 0.0) + spent


def _compilation(
    source: Source, backend: Backend, options: CompileOptions, clock: _Clock
) -> _Compilation:
    """Return the work for one target, with what the backend chooses by itself chosen."""
    from llmopt.quantization.schemes import parse_scheme

    named = options.quantize or backend.default_scheme
    with clock(f"preparing {backend.name}"):
        settled, notes = backend.settled(source.program, named)
    chosen = dataclasses.replace(options, quantize=named)
    scheme = None if named is None else settled.stored(parse_scheme(named))
    return _Compilation(source, settled, scheme, chosen, clock, notes)


@dataclass(frozen=True)
class _Compilation:
    """One source on its way to one target."""

    source: Source
    backend: Backend
    scheme: Scheme | None
    options: CompileOptions
    clock: _Clock
    notes: tuple[str, ...] = ()

    def run(
        self, place: Path, pipeline: str, ran: Sequence[Ran], report: Mapping[str, Fused]
    ) -> Artifact:
        """Lower, write, prove, and put the artifact in its place."""
        from llmopt.backends.base import Demand
        from llmopt.bundle.writer import staged_folder

        program = self.source.program.clone()
        done = list(ran)
        problems = self.backend.check(program)
        if problems:
            hint = f"choose another target than {self.backend.name}, or replace the operation"
            raise UnsupportedModelError(self.source.name, problems, hint)
        with staged_folder(place, force=self.options.force) as folder:
            lowering = self._lower(program, done)
            demand = Demand(self.options.batch, self.options.defer_engine)
            with self.clock("writing"):
                lowered = self.backend.write(program, folder, demand)
                for name, content in program.facts.files.items():
                    (folder / name).write_bytes(content)
            with self._runnable(program, folder / lowered.entry, demand) as (runner, entry):
                proof = self._prove(program, runner, entry)
                quality = self._quality(program, runner, entry)
            text = ",".join(filter(None, [pipeline, lowering]))
            manifest = self._manifest(program, lowered.entry, text, proof, quality)
            manifest = dataclasses.replace(
                manifest,
                versions={**manifest.versions, **lowered.versions},
                requires=lowered.requires,
            )
            self._finish(folder, manifest)
        from llmopt.bundle.manifest import Manifest

        notes = (*self.source.notes, *self.notes, *lowered.notes)
        return Artifact(place, Manifest.read(place), tuple(done), report, notes)

    def _lower(self, program: Program, done: list[Ran]) -> str:
        from llmopt.passes.pipeline import Pipeline

        lowering = Pipeline(self._passes())
        with self.clock(f"lowering to {self.backend.name}"):
            lowering.run(program, lambda _, __, ran: done.append(ran))
        return str(lowering)

    def _quantizer(self) -> tuple[Pass, ...]:
        from llmopt.passes.convert_float import ConvertFloat
        from llmopt.passes.quantize_dynamic import QuantizeDynamic
        from llmopt.passes.quantize_weights import QuantizeWeights
        from llmopt.quantization.schemes import Blockwise, Cast, DynamicInt8

        match self.scheme:
            case Blockwise(bits, block, symmetric, positive, half):
                return (QuantizeWeights(bits, block, symmetric, positive, half),)
            case DynamicInt8():
                return (QuantizeDynamic(),)
            case Cast(dtype):
                return (ConvertFloat(dtype, self.backend.islands),)
        return ()

    def _passes(self) -> tuple[Pass, ...]:
        return (*self._quantizer(), *self.backend.passes(self.options.quantize))

    def _transform(self) -> Any:
        """Return what is done to the source's weights on purpose."""
        from llmopt.backends.tensorrt import quantize_static
        from llmopt.backends.tensorrt.quantize_static import QuantizeStatic
        from llmopt.passes import convert_float, quantize_dynamic, quantize_weights
        from llmopt.passes.convert_float import ConvertFloat
        from llmopt.quantization.schemes import Blockwise, DynamicInt8

        program = self.source.program
        to_float = (item for item in self._passes() if isinstance(item, ConvertFloat))
        narrower = next(to_float, None)
        static = next((item for item in self._passes() if isinstance(item, QuantizeStatic)), None)
        if static is not None and narrower is not None:
            others = convert_float.rounding(program, narrower)
            return quantize_static.rounding(program, static, others)
        match self.scheme, narrower:
            case Blockwise(), None:
                return quantize_weights.rounding(program, self.scheme)
            case Blockwise(), ConvertFloat():
                return convert_float.block_rounding(program, self.scheme, narrower)
            case DynamicInt8(), _:
                return quantize_dynamic.rounding(program)
            case _, ConvertFloat():
                return convert_float.rounding(program, narrower)
        return None

    @contextlib.contextmanager
    def _runnable(
        self, program: Program, entry: Path, demand: Demand
    ) -> Iterator[tuple[Backend, Path]]:
        """Yield what runs here and its file: the artifact, or the same for this machine."""
        runner = None if self.options.verify == "off" else self.backend.stand_in()
        if runner is None:
            yield self.backend, entry
            return
        with tempfile.TemporaryDirectory(dir=entry.parent.parent) as place:
            with self.clock(f"writing for {runner.name}, which runs here"):
                lowered = runner.write(program, Path(place), demand)
            yield runner, Path(place) / lowered.entry

    def _prove(self, program: Program, runner: Backend, entry: Path) -> Verification:
        from llmopt.verification import Verification, verify

        if self.options.verify == "off":
            return Verification("off")
        with self.clock("verifying against the source"):
            proof = verify(
                program,
                runner.open(entry, exact=True),
                self.source.reference,
                tolerance=self.backend.tolerance(self.options.quantize),
                transform=self._transform(),
            )
        by = self.backend.proven_by or ("" if runner is self.backend else runner.target)
        return dataclasses.replace(proof, proven_by=by)

    def _quality(self, program: Program, runner: Backend, entry: Path) -> dict[str, Any]:
        from llmopt.evaluation import measure_quality

        if self.scheme is None or self.options.verify == "off":
            return {}
        with self.clock("measuring quality against the source"):
            quality = measure_quality(program, runner.open(entry), self.source.reference)
        bound, found = self.options.max_kl, quality.get("kl_mean")
        if bound is not None and found is None:
            raise UsageError("--max-kl: this model gives no logits to measure it on")
        if bound is not None and found is not None and found > bound:
            hint = "quantize less (--quantize w8), or accept more with --max-kl"
            raise AccuracyError("mean KL divergence from the source", found, bound, hint)
        return quality

    def _manifest(
        self,
        program: Program,
        entry: str,
        pipeline: str,
        proof: Verification,
        quality: Mapping[str, Any],
    ) -> Manifest:
        import llmopt
        from llmopt.bundle.manifest import Manifest

        precision = {} if self.scheme is None else {"weights": str(self.scheme)}
        return Manifest(
            target=self.backend.target,
            entry=entry,
            task=program.facts.task,
            versions={"llmopt": llmopt.__version__},
            source=program.facts.source,
            pipeline=pipeline,
            precision=precision,
            signature=program.signature,
            model=program.facts.model,
            verification=proof.summary(),
            quality=quality,
        )

    def _finish(self, folder: Path, manifest: Manifest) -> None:
        from llmopt.bundle.report import write_report

        with self.clock("writing"):
            manifest.with_files(folder).write(folder)
            peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            write_report(folder, self.clock.stages, peak_mb)
