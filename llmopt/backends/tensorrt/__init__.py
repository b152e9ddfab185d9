"""TensorRT and TensorRT-RTX: one typed network, engines for NVIDIA GPUs."""

from __future__ import annotations

import ctypes
import dataclasses
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

import onnx_ir as ir
from typing_extensions import override

from llmopt.backends.base import (
    TOLERANCE,
    Availability,
    Backend,
    Demand,
    ExampleBounds,
    Lowered,
)
from llmopt.backends.tensorrt.golden import golden_tolerance, write_golden
from llmopt.backends.tensorrt.int4_weights import Int4Weights
from llmopt.backends.tensorrt.legalize_attention import LegalizeAttention, declined
from llmopt.backends.tensorrt.legalize_operators import LegalizeOperators
from llmopt.backends.tensorrt.network import problems_of, profiles_of
from llmopt.backends.tensorrt.quantize_static import QuantizeStatic
from llmopt.backends.tensorrt.report import (
    AttentionFusion,
    attentions,
    read_layers,
    summary,
)
from llmopt.errors import (
    ArtifactError,
    BackendUnavailableError,
    UnsupportedModelError,
    UsageError,
)
from llmopt.interface.arrays import Run
from llmopt.ir import graph as g
from llmopt.ir.dialect import OPSET
from llmopt.ir.program import Program
from llmopt.ir.saving import save_with_data
from llmopt.passes.base import Pass
from llmopt.passes.convert_float import ConvertFloat
from llmopt.passes.merge_reshapes import MergeReshapes
from llmopt.quantization.calibration import Observer
from llmopt.quantization.schemes import Blockwise, Scheme, Static
from llmopt.runtime.engines.cuda_driver import LIBRARY
from llmopt.runtime.engines.tensorrt_build import (
    CAPABILITIES,
    INSTALL,
    MODULES,
    build_engine,
    import_tensorrt,
)
from llmopt.runtime.engines.tensorrt_recipe import (
    NETWORK,
    RECIPE,
    WEIGHTS,
    EngineRecipe,
    engine_file,
)

REPORT: Final = "engine-report.json"
_ALIGNMENT: Final = 4096  # a page
TOLERANCES: Final[Mapping[str, float]] = {
    "fp16": 2e-2,
    "bf16": 1e-1,
    "w4": 5e-2,
    "w8a8": 5e-2,
    "fp8": 5e-2,
}
"""What rounding every value to 11 bits (or 8: bf16) leaves of the largest output after tens of
layers, against the source with its weights rounded the same way. Activations of 8 bits are left
unrounded for it; what they cost is the quality that ``compile`` measures."""


_LEAST: Final[Mapping[str, int]] = {"bf16": 80, "fp8": 89}
"""The first compute capability that has the type, ten times."""


@dataclass(frozen=True)
class _TensorRtBase(Backend):
    """What both packages share: options of the typed network, and how it is written.

    Args:
        dtype: The float of activations where a scheme does not say: ``float16`` or ``bfloat16``.
        chunk: Most new tokens of one call of a decoder; longer prompts take several.
        percentile: Share of the magnitudes of calibration that a scale covers, for ``w8a8`` and
            ``fp8``.
        calibration: A file for the same, one text a line; random tokens if not given.
    """

    schemes: ClassVar[frozenset[str]] = frozenset({"fp16", "bf16", "w4", "w8a8", "fp8"})
    islands: ClassVar[str] = "residuals"
    package: ClassVar[str]
    dtype: Literal["float16", "bfloat16"] = "float16"
    chunk: int = 512
    percentile: int | float = 100
    calibration: str = ""

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        if self.chunk < 1:
            raise UsageError(f"chunk={self.chunk}: choose 1 token or more")
        Observer(self.percentile)

    @property
    @override
    def proven_by(self) -> str:
        return "the typed network in onnxruntime-cpu; the engine itself was not run"

    @override
    def tolerance(self, scheme: Scheme | None) -> float:
        return TOLERANCE if scheme is None else TOLERANCES[scheme.name]

    @override
    def example_bounds(self, scheme: Scheme | None) -> ExampleBounds | None:
        # No engine ran here, so nobody knows how far off one is; a deferred one is compared with
        # the typed network where it is built.
        return None

    @override
    def available(self) -> Availability:
        there = any(find_spec(name) is not None for name in MODULES[self.package])
        missing = "" if there else INSTALL[self.package]
        return Availability(self._to_build(missing), missing or _driver())

    @override
    def cache_obstacle(self, program: Program) -> str | None:
        from llmopt.backends.caches import shared_cache_obstacle

        return shared_cache_obstacle(program)

    @override
    def check(self, program: Program) -> list[str]:
        return problems_of(program)

    @override
    def passes(self, scheme: Scheme | None) -> tuple[Pass, ...]:
        # heads are [B, H, S, D] now: what was joined to [B, S, H * D] for the dialect is parted
        legal = (LegalizeAttention(), LegalizeOperators(), MergeReshapes())
        match scheme:
            case Static(code):
                first = QuantizeStatic(code, float(self.percentile), self.calibration)
                return (first, *legal, ConvertFloat(self.dtype, self.islands))
            case Blockwise():
                return (Int4Weights(), *legal, ConvertFloat(self.dtype, self.islands))
        return legal

    @override
    def supports(self, scheme: Scheme) -> str | None:
        if isinstance(scheme, Blockwise) and not scheme.symmetric:
            return "no zero points; leave symmetric=false out"
        return super().supports(scheme)

    @override
    def storage_scheme(self, scheme: Scheme) -> Scheme:
        if not isinstance(scheme, Blockwise):
            return scheme
        return dataclasses.replace(scheme, positive=True, scale=self.dtype)

    @override
    def write(self, program: Program, folder: Path, demand: Demand) -> Lowered:
        trt = None if demand.defer_engine else self._tensorrt()
        recipe = EngineRecipe(
            self.package,
            () if demand.defer_engine else self._capabilities(),
            profiles_of(program, demand.batch, self.chunk),
            tolerance=golden_tolerance(program),
        )
        _write_network(program, folder)
        (folder / RECIPE).write_text(recipe.to_json(), encoding="utf-8")
        if demand.defer_engine:
            write_golden(program, folder)
        versions: dict[str, str | int] = {"opset": OPSET}
        requires: dict[str, Any] = {
            "batch": demand.batch,
            "length": program.facts.max_length,
            "chunk": self.chunk,
        }
        notes = _notes(program, demand)
        if trt is None:
            notes += (f"the engine is built at the first load, by {self.package} on the device",)
            return Lowered(NETWORK, program, versions, requires, notes)
        versions[self.package] = str(trt.__version__)
        requires |= {"sm": list(recipe.capabilities), self.package: str(trt.__version__)}
        notes += self._build(trt, program, folder, recipe)
        return Lowered(NETWORK, program, versions, requires, notes)

    @override
    def open(self, entry: Path, *, exact: bool = False) -> Run:
        from llmopt.backends.tensorrt.typed_run import open_typed

        return open_typed(entry, exact=exact)

    def _tensorrt(self) -> Any:
        try:
            return import_tensorrt(self.package, self.name)
        except BackendUnavailableError as error:
            hint = "or pass --defer-engine: the engine is then built at the first load"
            raise BackendUnavailableError(self.name, f"{error.reason}; {hint}") from error

    def _to_build(self, missing: str) -> str:
        return missing

    @abstractmethod
    def _capabilities(self) -> tuple[str, ...]:
        """Return the compute capabilities to build engines for."""

    def _build(
        self, trt: Any, program: Program, folder: Path, recipe: EngineRecipe
    ) -> tuple[str, ...]:
        """Build and write every engine and the report; return notes of what was fused."""
        nodes = [str(node.name) for node in g.nodes(program.graph, "Attention")]
        written = declined(program)
        engines, notes = [], []
        for capability in recipe.capabilities:
            try:
                built = build_engine(trt, folder / NETWORK, recipe, capability)
            except ArtifactError as error:
                hint = "please report it: the check before the build should have caught this"
                raise UnsupportedModelError(self.name, [error.problem], hint) from error
            (folder / engine_file(capability)).write_bytes(built.engine)
            layers = read_layers(built.layers)
            fusions = attentions(layers, nodes, written, len(recipe.profiles))
            engines.append(summary(capability, layers, fusions))
            notes.append(_fused(capability, fusions))
        text = json.dumps({"schema": 1, "engines": engines}, indent=2) + "\n"
        (folder / REPORT).write_text(text, encoding="utf-8")
        return tuple(notes)


@dataclass(frozen=True)
class TensorRtRtx(_TensorRtBase):
    """Engines for RTX GPUs, built ahead of time on a machine that needs no GPU.

    Args:
        sm: Compute capabilities without their point, separated by semicolons: ``89;120``.
    """

    name: ClassVar[str] = "tensorrt-rtx"
    summary: ClassVar[str] = "TensorRT-RTX engines for RTX GPUs, built ahead of time without a GPU"
    package: ClassVar[str] = "tensorrt_rtx"
    sm: str = "89"

    def __post_init__(self) -> None:
        """Refuse GPUs that TensorRT-RTX does not build for."""
        super().__post_init__()
        known = {each.replace(".", "") for each in CAPABILITIES}
        for given in self.sm.split(";"):
            if given not in known:
                choices = ";".join(each.replace(".", "") for each in CAPABILITIES)
                raise UsageError(f"sm={given}: TensorRT-RTX builds for {choices}")

    @override
    def supports(self, scheme: Scheme) -> str | None:
        least = _LEAST.get(scheme.name, 0)
        if lacking := [sm for sm in self.sm.split(";") if int(sm) < least]:
            return f"no {scheme.name} on sm={';'.join(lacking)}; choose GPUs from sm={least} on"
        return super().supports(scheme)

    @override
    def _capabilities(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(f"{each[:-1]}.{each[-1]}" for each in self.sm.split(";")))


@dataclass(frozen=True)
class TensorRt(_TensorRtBase):
    """An engine for the GPU of this machine, or of the machine that loads it first."""

    name: ClassVar[str] = "tensorrt"
    summary: ClassVar[str] = "a TensorRT engine for the GPU at hand; --defer-engine builds it there"
    package: ClassVar[str] = "tensorrt"

    @override
    def _to_build(self, missing: str) -> str:
        lacking = missing or _driver()
        return f"{lacking}, or compile with --defer-engine" if lacking else ""

    @override
    def _capabilities(self) -> tuple[str, ...]:
        from llmopt.runtime.engines.cuda_driver import Driver

        return (Driver(self.name).capability,)


def _driver() -> str:
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        return f"an NVIDIA GPU and its driver ({LIBRARY})"
    return ""


def _write_network(program: Program, folder: Path) -> None:
    from onnx_ir.passes.common import NameFixPass

    g.name_nodes(program.graph)
    NameFixPass()(program.model)
    save_with_data(program.model, folder / NETWORK, WEIGHTS, alignment=_ALIGNMENT)


def _notes(program: Program, demand: Demand) -> tuple[str, ...]:
    """Return a note of the cache's size, which --max-length and --batch bound."""
    size = sum(
        value.const_value is None and value.dtype is not None and _bytes(value, demand.batch)
        for value in program.graph.inputs
        if g.rank(value) == 4
    )
    if not size:
        return ()
    length = program.facts.max_length
    note = (
        f"the cache of {demand.batch} sequences of {length} tokens takes {size / 2**20:.0f} MiB on "
        "the device, and each step reads all of it: --batch and --max-length bound it"
    )
    return (note,)


def _bytes(value: ir.Value, batch: int) -> int:
    sizes = [size if isinstance(size, int) else batch for size in g.shape(value) or []]
    total = value.dtype.itemsize if value.dtype is not None else 0
    for size in sizes:
        total *= size
    return int(total)


def _fused(capability: str, fusions: Sequence[AttentionFusion]) -> str:
    fused = sum(each.fused for each in fusions)
    text = f"sm {capability}: {fused} of {len(fusions)} attentions are one layer each"
    missed = [f"{each.node}: {each.reason}" for each in fusions if not each.fused]
    return text + (f"; {'; '.join(missed[:3])}" if missed else "")
