"""What this machine's processor can do, in the names that Linux gives its features."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Final

CPUINFO: Final = Path("/proc/cpuinfo")
_X86: Final = {
    "adx": "adx",
    "aes": "aes",
    "amx-bf16": "amx_bf16",
    "amx-fp16": "amx_fp16",
    "amx-int8": "amx_int8",
    "amx-tile": "amx_tile",
    "avx": "avx",
    "avx2": "avx2",
    "avx512bf16": "avx512_bf16",
    "avx512bitalg": "avx512_bitalg",
    "avx512bw": "avx512bw",
    "avx512cd": "avx512cd",
    "avx512dq": "avx512dq",
    "avx512f": "avx512f",
    "avx512fp16": "avx512_fp16",
    "avx512ifma": "avx512ifma",
    "avx512vbmi": "avx512vbmi",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vl": "avx512vl",
    "avx512vnni": "avx512_vnni",
    "avx512vp2intersect": "avx512_vp2intersect",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avxvnni": "avx_vnni",
    "bmi": "bmi1",
    "bmi2": "bmi2",
    "f16c": "f16c",
    "fma": "fma",
    "gfni": "gfni",
    "lzcnt": "abm",
    "movbe": "movbe",
    "popcnt": "popcnt",
    "sha": "sha_ni",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
    "sse4a": "sse4a",
    "ssse3": "ssse3",
    "vaes": "vaes",
    "vpclmulqdq": "vpclmulqdq",
}
_ARM: Final = {
    "aes": "aes",
    "bf16": "bf16",
    "crc": "crc32",
    "dotprod": "asimddp",
    "fullfp16": "asimdhp",
    "i8mm": "i8mm",
    "lse": "atomics",
    "neon": "asimd",
    "rdm": "asimdrdm",
    "sve": "sve",
    "sve2": "sve2",
}
LINUX_NAMES: Final[Mapping[str, Mapping[str, str]]] = {"x86_64": _X86, "aarch64": _ARM}
"""By machine: LLVM's name of each feature that its compiler may use, and Linux's."""

_ARCH_PRCTL: Final = 158
_REQUEST: Final = 0x1023  # ARCH_REQ_XCOMP_PERM, see Linux's Documentation/arch/x86/xstate.rst
_TILE_DATA: Final = 18
_HWCAP: Final = 16
_HWCAP2: Final = 26
_BITS: Final[Mapping[str, tuple[int, int]]] = {
    "asimd": (_HWCAP, 1),
    "aes": (_HWCAP, 3),
    "crc32": (_HWCAP, 7),
    "atomics": (_HWCAP, 8),
    "asimdhp": (_HWCAP, 10),
    "asimdrdm": (_HWCAP, 12),
    "asimddp": (_HWCAP, 20),
    "sve": (_HWCAP, 22),
    "sve2": (_HWCAP2, 1),
    "i8mm": (_HWCAP2, 13),
    "bf16": (_HWCAP2, 14),
}
"""Where the kernel tells a program of arm64 what it may use (asm/hwcap.h): vector, bit."""


def processor_features() -> frozenset[str]:
    """Return what this process may use of the processor, such as ``avx2`` or ``asimddp``.

    AMX is asked for, and left out where Linux refuses it.
    """
    if platform.machine() == "aarch64":
        # not /proc/cpuinfo, which under emulation is the emulating machine's
        getauxval = ctypes.CDLL(None).getauxval
        getauxval.argtypes, getauxval.restype = [ctypes.c_ulong], ctypes.c_ulong
        words = {vector: int(getauxval(vector)) for vector in (_HWCAP, _HWCAP2)}
        return frozenset(name for name, (v, bit) in _BITS.items() if words[v] >> bit & 1)
    found = _listed(CPUINFO)
    if "amx_tile" in found and not tiles_allowed():
        return frozenset(name for name in found if not name.startswith("amx_"))
    return found


def tiles_allowed() -> bool:
    """Ask Linux for AMX's tiles, which a process may not use before, and return its answer.

    Threads that already run need not get them: ask before they start.
    """
    if platform.machine() != "x86_64":
        return False
    return int(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST, _TILE_DATA)) == 0


def _listed(cpuinfo: Path) -> frozenset[str]:
    """Return the flags of the first processor that ``/proc/cpuinfo`` lists."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:  # a sandbox that does not say
        return frozenset()
    found = (line.partition(":")[2].split() for line in lines if line.startswith("flags"))
    return frozenset(next(found, []))
