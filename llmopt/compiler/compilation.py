"""One optimized source on its way to one target: lowered, written, proven, put in its place."""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from llmopt.artifact.manifest import Component, Manifest
from llmopt.artifact.report import write_report
from llmopt.artifact.writer import staged_folder
from llmopt.backends import known_backends
from llmopt.backends.base import Backend, Demand, Lowered
from llmopt.compiler.activations import activation_bytes
from llmopt.compiler.artifact import Artifact, CompileOptions
from llmopt.compiler.calibration import measure_activations
from llmopt.compiler.clock import Clock
from llmopt.compiler.golden import ROWS, make_golden
from llmopt.compiler.proxies import work_of
from llmopt.compiler.recipe import recipe
from llmopt.errors import AccuracyError, UnsupportedModelError, UsageError
from llmopt.evaluation import measure_quality
from llmopt.frontend.base import Source, SourceOptions
from llmopt.fusion import FusionCount
from llmopt.interface.arrays import Run
from llmopt.ir.components import chained
from llmopt.ir.program import Program
from llmopt.passes.base import Pass
from llmopt.passes.pipeline import Pipeline, Ran
from llmopt.passes.quantizers import quantizers
from llmopt.passes.rounding import Rounding, rounding_of
from llmopt.quantization.schemes import Blockwise, DynamicInt8, Scheme, Static
from llmopt.verification import Verification, verify
from llmopt.verification.each import Watch
from llmopt.version import __version__

AfterPass = Callable[[Pass, Program, Ran], None]


def noted(done: list[Ran], watch: Watch | None) -> AfterPass:
    """Return a hook of ``Pipeline.run`` that adds to ``done`` and lets ``watch`` compare."""

    def after(item: Pass, program: Program, ran: Ran) -> None:
        done.append(ran)
        if watch is not None:
            watch(item, program, ran)

    return after


@dataclass(frozen=True, kw_only=True)
class Optimized:
    """A source whose Program has been through the passes that no target asks for.

    Args:
        source: The source.
        pipeline: The text of those passes.
        ran: The passes, with what each did.
        fusion: Counts of what was expected and what was fused, by kind.
        reading: The options it was read with.
        watch: The comparison after each pass, under ``--verify each``.
        uncached: The source as traced, where a pass then added a cache.
    """

    source: Source
    pipeline: str
    ran: Sequence[Ran]
    fusion: Mapping[str, FusionCount]
    reading: SourceOptions
    watch: Watch | None = None
    uncached: Source | None = None


@dataclass(frozen=True)
class Written:
    """What was written, and what opens it here.

    Args:
        backend: The backend that opens it.
        program: The lowered Program, whose signature says what inputs and outputs mean.
        files: The file of each component.
    """

    backend: Backend
    program: Program
    files: Mapping[str, Path]

    def open(self, *, exact: bool = False) -> Run:
        """Return a function from inputs to outputs of all components; see ``Backend.open``."""
        runs = {name: self.backend.open(file, exact=exact) for name, file in self.files.items()}
        return chained(self.program, runs)


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """What one target makes of a source.

    Args:
        optimized: The source; it is not changed, so that the next target can have it.
        backend: The target, its open options chosen.
        scheme: The scheme as the backend stores it; None keeps float32.
        options: The request, with the scheme that was chosen.
        clock: Told what is being done.
        notes: Sentences for the user on the backend's choices.
    """

    optimized: Optimized
    backend: Backend
    scheme: Scheme | None
    options: CompileOptions
    clock: Clock
    notes: tuple[str, ...] = ()

    @classmethod
    def prepare(
        cls, optimized: Optimized, backend: Backend, options: CompileOptions, clock: Clock
    ) -> Self:
        """Let the backend choose what is left to it, and measure what its scheme asks for."""
        _check_components(optimized.source, backend)
        scheme = options.quantize or backend.default_scheme
        with clock(f"preparing {backend.name}"):
            resolved, notes = backend.resolved(optimized.source.program, scheme)
        chosen = dataclasses.replace(options, quantize=scheme)
        scheme = None if scheme is None else resolved.storage_scheme(scheme)
        if isinstance(scheme, Blockwise) and scheme.searched:
            with clock("measuring activations"):
                measure_activations(optimized.source)
        return cls(
            optimized=optimized,
            backend=resolved,
            scheme=scheme,
            options=chosen,
            clock=clock,
            notes=notes,
        )

    def run(self, output: Path) -> Artifact:
        """Lower, write, prove, and put the artifact in its place.

        Raises:
            UnsupportedModelError: the backend cannot lower an operator; all are listed.
            AccuracyError: the artifact computes something else, or loses more than is accepted.
        """
        source, done = self.optimized.source, list(self.optimized.ran)
        program = source.program.clone()
        if problems := [p for part in program.parts() for p in self.backend.check(part)]:
            hint = f"choose another target than {self.backend.name}, or replace the operation"
            raise UnsupportedModelError(source.name, problems, hint)
        demand = Demand(self.options.batch, self.options.defer_engine)
        watch = None if self.optimized.watch is None else self.optimized.watch.forked(self.backend)
        with staged_folder(output, force=self.options.force) as folder:
            lowering = self._lower(program, done, watch)
            lowered = self._write(program, folder, demand)
            with self._runnable(program, lowered.within(folder), demand) as runner:
                proof = self._prove(program, runner, folder)
                quality = self._quality(program, runner)
            text = ",".join(filter(None, [self.optimized.pipeline, lowering]))
            manifest = self._manifest(program, lowered, text, proof, quality)
            work = work_of(program) | {"activation_bytes": activation_bytes(program)}
            did = self._compiled(done)
            self._finish(folder, dataclasses.replace(manifest, work=work, compiled=did))
        notes = (*source.notes, *self.notes, *lowered.notes)
        checks = () if watch is None else tuple(watch.checks)
        fusion = self.optimized.fusion
        return Artifact(
            path=output,
            manifest=Manifest.read(output),
            passes=tuple(done),
            fusion=fusion,
            notes=notes,
            checks=checks,
        )

    def rounding(self) -> Rounding | None:
        """Return what is done to the source's weights on purpose."""
        return rounding_of(self._passes(), self.optimized.source.program)

    def _passes(self) -> tuple[Pass, ...]:
        every = self.backend.passes(self.scheme)
        own = [each for each in every if each.name not in self.options.without]
        return (*quantizers(self.scheme, self.backend.islands), *own)

    def _lower(self, program: Program, done: list[Ran], watch: Watch | None) -> str:
        lowering = Pipeline(self._passes())
        with self.clock(f"lowering to {self.backend.name}"):
            lowering.run(program, noted(done, watch))
        return str(lowering)

    def _write(self, program: Program, folder: Path, demand: Demand) -> Lowered:
        with self.clock("writing"):
            lowered = self.backend.write(program, folder, demand)
            for name, content in program.facts.files.items():
                (folder / name).write_bytes(content)
        return lowered

    @contextlib.contextmanager
    def _runnable(
        self, program: Program, files: Mapping[str, Path], demand: Demand
    ) -> Iterator[Written]:
        """Yield what runs here: the artifact, or the same for this machine."""
        runner = None if self.options.verify == "off" else self.backend.proxy_backend()
        if runner is None:
            yield Written(self.backend, program, files)
            return
        with tempfile.TemporaryDirectory(dir=files[program.main].parent.parent) as place:
            with self.clock(f"writing for {runner.name}, which runs here"):
                lowered = runner.write(program, Path(place), demand)
            yield Written(runner, program, lowered.within(Path(place)))

    def _prove(self, program: Program, runner: Written, folder: Path) -> Verification:
        """Compare the artifact with its source, and write what it computed as an example."""
        if self.options.verify == "off":
            return Verification("off")
        with self.clock("verifying against the source"):
            exact = runner.open(exact=True)
            proof = verify(
                program,
                exact,
                self.optimized.source.reference,
                tolerance=self.backend.tolerance(self.scheme),
                transform=self.rounding(),
            )
        # A scheme that rounds activations says how; otherwise kernels do it each their way, and
        # a device is to answer for its own way alone.
        settled = isinstance(self.scheme, DynamicInt8 | Static)
        shown = runner.open() if settled else exact
        self._exemplify(program, shown, runner.backend.target, folder)
        own = runner.backend is self.backend
        by = self.backend.proven_by or ("" if own else runner.backend.target)
        return dataclasses.replace(proof, proven_by=by)

    def _quality(self, program: Program, runner: Written) -> dict[str, Any]:
        if self.scheme is None or self.options.verify == "off":
            return {}
        with self.clock("measuring quality against the source"):
            quality = measure_quality(program, runner.open(), self.optimized.source.reference)
        bound, found = self.options.max_kl, quality.get("kl_mean")
        if bound is not None and found is None:
            raise UsageError("--max-kl: this model gives no logits to measure it on")
        if bound is not None and found is not None and found > bound:
            hint = "quantize less (--quantize w8), or accept more with --max-kl"
            raise AccuracyError("mean KL divergence from the source", found, bound, hint)
        return quality

    def _exemplify(self, program: Program, run: Run, target: str, folder: Path) -> None:
        """Write the example that the artifact tests itself with on a device."""
        bounds = self.backend.example_bounds(self.scheme)
        if bounds is None:
            return
        with self.clock("making the example"):
            made = make_golden(program, run, folder, min(ROWS, self.options.batch))
            within = dataclasses.asdict(bounds)
            dataclasses.replace(made, producer=target, **within).write(folder)

    def _manifest(
        self,
        program: Program,
        lowered: Lowered,
        pipeline: str,
        proof: Verification,
        quality: Mapping[str, Any],
    ) -> Manifest:
        return Manifest(
            target=self.backend.target,
            entry=lowered.entry,
            task=program.facts.task,
            versions={"llmopt": __version__, **lowered.versions},
            source=program.facts.source,
            pipeline=pipeline,
            recipe=self._recipe(program.facts.source.name),
            precision={} if self.scheme is None else {"weights": str(self.scheme)},
            signature=program.signature,
            components=tuple(
                Component(name, file, program.signatures[name])
                for name, file in lowered.others.items()
            ),
            model=program.facts.model,
            verification=proof.summary(),
            quality=quality,
            requires=lowered.requires,
        )

    def _recipe(self, source: str) -> str:
        """Return the command that makes the artifact again."""
        return recipe(source, self.backend.target, self.options, self.optimized.reading)

    def _compiled(self, done: Sequence[Ran]) -> dict[str, Any]:
        """Return what passes did, for the manifest; the report gives the reasons of misses."""
        passes = [{"name": r.name, "applied": r.applied, "missed": len(r.missed)} for r in done]
        fusion = self.optimized.fusion.items()
        fused = {kind: {"expected": f.expected, "fused": f.fused} for kind, f in fusion}
        return {"passes": passes, "fusion": fused}

    def _finish(self, folder: Path, manifest: Manifest) -> None:
        with self.clock("writing"):
            manifest.with_files(folder).write(folder)
            peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            write_report(folder, self.clock.stages, peak_mb)


def _check_components(source: Source, backend: Backend) -> None:
    """Raise unless the backend takes as many components as the source has.

    Raises:
        UnsupportedModelError: it takes one alone.
    """
    names = list(source.program.components)
    if len(names) > 1 and not backend.takes_components:
        problem = f"{backend.name} takes models of one component, and this one has {len(names)}"
        hint = "compile it for one of " + ", ".join(
            name for name, each in known_backends().items() if each.takes_components
        )
        raise UnsupportedModelError(source.name, [f"{problem} ({', '.join(names)})"], hint)
