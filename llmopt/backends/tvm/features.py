"""What a processor's instructions can do, from its name in LLVM or from this machine."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Final

from llmopt.errors import UnknownNameError
from llmopt.runtime.cpu_features import LINUX_NAMES, processor_features


@dataclass(frozen=True)
class Features:
    """The instructions that kernels are chosen by; all False is code that runs anywhere.

    >>> Features(avx2=True).lanes, Features(neon=True, dotprod=True).label
    (8, 'dotprod')

    Args:
        avx2: 256-bit integers, with fused multiply-add.
        avxvnni: Sums of four int8 products in 256 bits.
        avx512: 512-bit vectors: F, BW, DQ and VL together.
        avx512vnni: Sums of four int8 products in 512 bits.
        avx512bf16: Sums of two bfloat16 products in 512 bits.
        amx_int8: Tiles of int8 products.
        amx_bf16: Tiles of bfloat16 products.
        neon: 128-bit vectors of arm64.
        dotprod: ``sdot`` of arm64.
        i8mm: ``smmla`` of arm64.
    """

    avx2: bool = False
    avxvnni: bool = False
    avx512: bool = False
    avx512vnni: bool = False
    avx512bf16: bool = False
    amx_int8: bool = False
    amx_bf16: bool = False
    neon: bool = False
    dotprod: bool = False
    i8mm: bool = False

    @property
    def lanes(self) -> int:
        """How many float32 numbers the widest vector holds."""
        return 16 if self.avx512 else 8 if self.avx2 else 4

    @property
    def label(self) -> str:
        """The strongest of them, for names: ``"avx512vnni"``; ``"portable"`` if there is none."""
        known = (field.name for field in reversed(fields(self)) if getattr(self, field.name))
        return next(known, "portable")

    @classmethod
    def of(cls, names: Iterable[str]) -> Features:
        """Return the features of a processor that LLVM describes by ``names``.

        >>> Features.of(["avx2", "fma"])
        Features(avx2=True, avxvnni=False, avx512=False, avx512vnni=False, avx512bf16=False, \
amx_int8=False, amx_bf16=False, neon=False, dotprod=False, i8mm=False)
        """
        there = set(names)
        return cls(**{name: needs <= there for name, needs in _NEEDS.items()})


_WIDE: Final = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})
_NEEDS: Final = {
    "avx2": {"avx2", "fma"},
    "avxvnni": {"avxvnni"},
    "avx512": _WIDE,
    "avx512vnni": _WIDE | {"avx512vnni"},
    "avx512bf16": _WIDE | {"avx512bf16"},
    "amx_int8": _WIDE | {"avx512vnni", "amx-tile", "amx-int8"},
    "amx_bf16": _WIDE | {"avx512bf16", "amx-tile", "amx-bf16"},
    "neon": {"neon"},
    "dotprod": {"neon", "dotprod"},
    "i8mm": {"neon", "dotprod", "i8mm"},
}
TRIPLES: Final = {"x86_64": "x86_64-unknown-linux-gnu", "aarch64": "aarch64-unknown-linux-gnu"}


@dataclass(frozen=True)
class Processor:
    """A processor to compile for.

    Args:
        machine: ``"x86_64"`` or ``"aarch64"``.
        mcpu: Name of the processor in LLVM.
        llvm_features: Features that LLVM may use, in LLVM's names.
        masked: Features of the named processor that code must not use, in LLVM's names.
    """

    machine: str
    mcpu: str
    llvm_features: frozenset[str]
    masked: frozenset[str] = frozenset()

    @property
    def features(self) -> Features:
        """What kernels may use."""
        return Features.of(self.llvm_features)

    @property
    def required(self) -> list[str]:
        """What a machine must have to run the code, as Linux names it."""
        names = LINUX_NAMES[self.machine]
        return sorted({names[name] for name in self.llvm_features if name in names})

    @property
    def runs_here(self) -> bool:
        """Whether this machine runs code for it."""
        return self.machine == platform.machine() and set(self.required) <= processor_features()

    @property
    def target(self) -> dict[str, object]:
        """The processor as TVM's target."""
        given = [f"-{name}" for name in sorted(self.masked)]
        return {
            "kind": "llvm",
            "mtriple": TRIPLES[self.machine],
            "mcpu": self.mcpu,
            **({"mattr": given} if given else {}),
        }


def find_processor(machine: str, mcpu: str, without: Iterable[str] = ()) -> Processor:
    """Return a processor by its name in LLVM.

    Args:
        machine: ``"x86_64"`` or ``"aarch64"``.
        mcpu: LLVM's name of it; ``"host"`` for this machine's own, less what it was not given: a
            virtual machine may lack what its processor has.
        without: Features to do without, in LLVM's names.

    Raises:
        UnknownNameError: LLVM knows no such processor, or no such feature.
    """
    from llmopt.backends.tvm import api

    native = mcpu == "host" and machine == platform.machine()
    known = api.processors(TRIPLES[machine])
    if mcpu not in known and not native:
        raise UnknownNameError(f"{machine} processor", mcpu, known, "these are LLVM's names")
    name = api.host_processor() if native else mcpu
    has = api.processor_features(TRIPLES[machine], name)
    masked = set(without)
    if unknown := sorted(masked - LINUX_NAMES[machine].keys()):
        raise UnknownNameError("processor feature", unknown[0], LINUX_NAMES[machine])
    if native:
        there = processor_features()
        masked |= {f for f, linux in LINUX_NAMES[machine].items() if linux not in there}
    return Processor(machine, name, frozenset(has - masked), frozenset(has & masked))
