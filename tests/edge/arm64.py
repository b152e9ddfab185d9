"""An arm64 machine made of packages: an emulator, Debian's Python and wheels.

    python tests/edge/arm64.py FOLDER

makes it in FOLDER, once, or notes there what is missing to make one. Nothing is installed outside
FOLDER, and root is not needed. On an arm64 machine there is nothing to make. Recipe and limits:
docs/edge.md.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
FOLDER: Final = ROOT / "build" / "arm64"
EMULATORS: Final = ("qemu-aarch64", "qemu-aarch64-static")
OLDEST: Final = 8  # qemu 7.2 crashes where onnxruntime asks for the processor's features
PACKAGES: Final = ("python3", "libgomp1", "libstdc++6")
WHEELS: Final = (
    "numpy",
    "tokenizers",
    "typing_extensions",
    "backports.zstd",
    "onnxruntime",
    "apache-tvm",
    "apache-tvm-ffi",
    "ml_dtypes",
)
KEYS: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
GLIBC: Final = range(17, 37)  # Debian 12 has 2.36
_RECORD: Final = "machine.json"
_MISSING: Final = "missing.txt"


class MissingError(Exception):
    """What is needed to make the machine and is not here."""


@dataclass(frozen=True)
class Arm64:
    """A way to run Python on arm64.

    Args:
        command: What starts its Python.
        site: The folder of its packages; empty if they are where its Python looks.
    """

    command: tuple[str, ...]
    site: str = ""

    def run(self, script: Path, *arguments: str | Path) -> str:
        """Return what a script prints there; it sees llmopt and the runtimes.

        Raises:
            RuntimeError: it failed; with what it said.
        """
        paths = os.pathsep.join(filter(None, [self.site, str(ROOT)]))
        environment = {**os.environ, "PYTHONPATH": paths, "TVM_NUM_THREADS": "1"}
        if self.site:  # to compile modules anew takes longer than all that is tested
            environment["PYTHONPYCACHEPREFIX"] = str(Path(self.site).with_name("pycache"))
            environment.pop("PYTHONDONTWRITEBYTECODE", None)
        done = subprocess.run(
            [*self.command, str(script), *map(str, arguments)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"arm64: exit {done.returncode}: {done.stdout}{done.stderr}"[-4000:])
        return done.stdout


@dataclass(frozen=True)
class Apt:
    """Debian's packages of one architecture, in a folder of its own.

    Args:
        folder: Where its lists and archives lie.
        architecture: ``"arm64"``.
        release: ``"bookworm"``, or ``"bookworm-backports"`` to prefer what is in there.
    """

    folder: Path
    architecture: str
    release: str

    def unpack(self, packages: Sequence[str], into: Path) -> None:
        """Unpack packages and all that they depend on.

        Raises:
            MissingError: apt could not get them.
        """
        self._prepare(_sources(self.release))
        self._apt("install", "--download-only", "--yes", *packages)
        self._extract(self.folder / "archives", into)

    def unpack_alone(self, package: str, into: Path) -> None:
        """Unpack one package of a release that this machine need not be of, and nothing else.

        Raises:
            MissingError: apt could not get it.
        """
        here = _codename()
        lines = (line.replace(f" {here} ", f" {self.release} ") for line in _sources(here))
        self._prepare(lines)
        self._apt("download", package, where=self.folder)
        self._extract(self.folder, into)

    def _prepare(self, sources: Iterable[str]) -> None:
        for place in ("lists/partial", "archives/partial"):
            (self.folder / place).mkdir(parents=True, exist_ok=True)
        (self.folder / "status").touch()
        (self.folder / "sources.list").write_text("".join(sources))
        self._apt("update")

    def _extract(self, archives: Path, into: Path) -> None:
        for archive in sorted(archives.glob("*.deb")):
            _done(["dpkg-deb", "--extract", str(archive), str(into)])
        shutil.rmtree(self.folder)

    def _apt(self, *arguments: str, where: Path | None = None) -> None:
        settings = {
            "APT::Architecture": self.architecture,
            "APT::Architectures": self.architecture,
            "APT::Default-Release": self.release,
            "APT::Install-Recommends": "false",
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
            "Dir::Cache::archives": f"{self.folder}/archives",
            "Dir::Cache::pkgcache": "",
            "Dir::Cache::srcpkgcache": "",
            "Dir::Etc::sourcelist": f"{self.folder}/sources.list",
            "Dir::Etc::sourceparts": "-",
            "Dir::State": str(self.folder),
            "Dir::State::lists": f"{self.folder}/lists",
            "Dir::State::status": f"{self.folder}/status",
        }
        options = [f"-o{name}={value}" for name, value in settings.items()]
        _done(["apt-get", "--quiet", *options, *arguments], where)


def machine(folder: Path = FOLDER) -> Arm64:
    """Return the machine that was made in ``folder``.

    Raises:
        MissingError: none was made; with what is missing.
    """
    record, missing = folder / _RECORD, folder / _MISSING
    if not record.is_file():
        told = missing.read_text().strip() if missing.is_file() else "run `make edge-test`"
        raise MissingError(told)
    found = json.loads(record.read_text())
    return Arm64(tuple(found["command"]), found["site"])


def make(folder: Path = FOLDER) -> Arm64:
    """Make the machine in ``folder`` and try it.

    Raises:
        MissingError: something that it needs is not to be had here.
    """
    if platform.machine() == "aarch64":
        return Arm64((sys.executable,))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    root = folder / "root"
    Apt(folder / "apt", "arm64", _codename()).unpack(PACKAGES, root)
    pythons = sorted(path for path in (root / "usr/bin").glob("python3.*") if path.is_file())
    if not pythons:
        raise MissingError("the arm64 python3 of this Debian has no interpreter")
    site = folder / "site"
    _wheels(site, pythons[0].name.removeprefix("python"))
    command = (_emulator(folder), "-cpu", "max", "-L", str(root), str(pythons[0]))
    made = Arm64(command, str(site))
    try:
        made.run(Path(__file__).with_name("guest.py"), "--versions")
    except RuntimeError as error:
        raise MissingError(f"the emulated Python does not work: {error}") from error
    return made


def _emulator(folder: Path) -> str:
    """Return a qemu that is new enough: this machine's, or Debian's unpacked into ``folder``."""
    for name in EMULATORS:
        here = shutil.which(name)
        if here is not None and _major(here) >= OLDEST:
            return here
    place = folder / "qemu"
    codename = _codename()
    release = f"{codename}-backports" if codename == "bookworm" else codename
    host = _done(["dpkg", "--print-architecture"]).strip()
    Apt(folder / "apt-qemu", host, release).unpack(["qemu-user"], place)
    for other in (place / "usr/bin").iterdir():
        if other.name not in EMULATORS:
            other.unlink()  # the same for thirty other processors
    for name in EMULATORS:
        found = place / "usr/bin" / name
        if found.is_file() and _major(str(found)) >= OLDEST:
            return str(found)
    raise MissingError(f"qemu-user {OLDEST} or newer: Debian {release} has none that starts")


def _major(emulator: str) -> int:
    """Return the first number of a qemu's version, 0 if it does not start."""
    try:
        text = _done([emulator, "--version"])
    except MissingError:
        return 0
    found = re.search(r"version (\d+)\.", text)
    return int(found[1]) if found else 0


def _wheels(site: Path, python: str) -> None:
    """Unpack the arm64 wheels of what runs artifacts, in the versions that are installed here."""
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in reversed(GLIBC)]
    wanted = [f"{name}=={version(name)}" for name in WHEELS]
    only = ["--no-deps", "--only-binary=:all:", "--no-compile", f"--python-version={python}"]
    quiet = ["--quiet", "--disable-pip-version-check", "--target", str(site)]
    also = ["--platform=manylinux2014_aarch64", "--platform=any"]
    pip = [sys.executable, "-m", "pip", "install", *quiet, *only]
    _done([*pip, *platforms, *also, *wanted])


def _codename() -> str:
    """Return the Debian release of this machine, whose packages its mirror has."""
    system = _system()
    if system.get("ID") != "debian" or shutil.which("apt-get") is None:
        name = system.get("PRETTY_NAME", "this system")
        raise MissingError(f"Debian's packages for arm64, which {name} does not reach")
    return system["VERSION_CODENAME"]


def _system() -> dict[str, str]:
    try:
        return platform.freedesktop_os_release()
    except OSError:
        return {}


def _sources(release: str) -> Iterator[str]:
    """Yield the lines of a sources.list: this machine's own mirror of Debian, one component."""
    codename = release.partition("-")[0]
    told = _done(["apt-get", "update", "--print-uris"])
    found = re.search(rf"'(\S+)/dists/{codename}/InRelease'", told)
    if found is None:
        raise MissingError(f"a source of Debian {codename} in apt's configuration")
    signed = f"[signed-by={KEYS}] " if KEYS.exists() else ""
    for suite in dict.fromkeys([codename, release]):
        yield f"deb {signed}{found[1]} {suite} main\n"


def _done(command: Sequence[str], where: Path | None = None) -> str:
    """Return what a program prints that is started in a folder.

    Raises:
        MissingError: it is not here, or failed; with the end of what it said.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=where)
    except OSError as error:
        raise MissingError(f"{command[0]}: {error}") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise MissingError(f"{Path(command[0]).name} failed: {' '.join(said)}")
    return done.stdout


def main() -> None:
    """Make the machine; what is missing is noted and told, and is no failure."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    try:
        text, place = json.dumps(asdict(make(folder.resolve())), indent=2), _RECORD
    except MissingError as error:
        text, place = str(error), _MISSING
        sys.stderr.write(f"no arm64 machine, its tests will be skipped: {error}\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / place).write_text(f"{text}\n")


if __name__ == "__main__":
    main()
