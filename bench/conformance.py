"""Every target that runs here against the source: the worst error of each, case by case.

    python bench/conformance.py [--target T]... [--model M]... [--scheme S]... [--json FILE]

A case is a target, a model and a scheme. The artifact is run by its runner, with the kernels that
users get, in three ways: one sequence in one step; a prefill and one step for each token after it;
three sequences padded to one length. The source is transformers' own implementation in float32; a
quantized artifact is compared with the source's weights rounded alike, so that what is left is the
target's arithmetic. The error of a token is ``max|a - b|``, as a part of the largest ``|b|`` of
all; that of a case is the worst of real tokens, and where activations are rounded of 95 in 100.
Without ``--json`` the rows that docs/conformance.md shows are replaced: those measured now, the
others stay.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from families import MODELS, Array, Model, positions

RESULTS: Final = Path(__file__).with_name("conformance.json")
LENGTH, PREFILL, ROWS = 41, 35, 3  # longer than every window; no multiple of a tile
PADDING: Final = (0, 3, 10)
VARIANTS: Final = ("onnxruntime-cpu{ep=openvino}", "tvm-cpu{mcpu=haswell}")
"""Options that choose other kernels: another provider, AVX2 alone."""

TOLERANCES: Final = {  # of two layers; what is rounded in each adds up like noise
    "fp32": 1e-4,  # sums in another order, of any number of layers
    "fp16": 2e-2,  # 11 bits in every activation
    "bf16": 1e-1,  # 8 bits
    "w8": 5e-2,  # activations are rounded to int8, a scale per block
    "w4": 5e-2,
    "w8a8-dynamic": 5e-2,  # a scale per token
}
SCHEMES: Final = tuple(TOLERANCES)


COUNTED: Final = 0.95
"""Part of the tokens that counts where activations are rounded. In a trained model a small change
can move a token onto or off an attention sink (Xiao et al. 2024, arXiv:2309.17453): its logits are
then others altogether, in any implementation, and say nothing of the target's."""


class UnusableError(Exception):
    """A case that cannot be measured on this machine; says what is missing."""


@dataclass
class Subject:
    """A model's checkpoint, traced once, and what its source computes with each rounding.

    Args:
        model: The model.
        folder: Where its checkpoint is, or will be.
    """

    model: Model
    folder: Path

    @cached_property
    def source(self) -> Path:
        """The checkpoint, written when it is first asked for.

        Raises:
            UnusableError: its weights are not installed.
        """
        try:
            self.model.write(self.folder)
        except FileNotFoundError as error:
            raise UnusableError(str(error)) from error
        return self.folder

    @cached_property
    def traced(self) -> Any:
        """The source, its Program optimized."""
        from llmopt.compiler import Clock, CompileOptions, optimize
        from llmopt.frontend.base import SourceOptions

        options = CompileOptions(require=["attention=all", "norm=all"])
        return optimize(self.source, options, SourceOptions(), Clock())

    @cached_property
    def inputs(self) -> dict[str, Array]:
        """Tokens and mask, [3, 41]; the first row is whole, the others padded in front."""
        config = json.loads((self.source / "config.json").read_text())
        ids = np.random.default_rng(0).integers(3, config["vocab_size"], (ROWS, LENGTH))
        mask = np.ones_like(ids)
        for row, count in enumerate(PADDING):
            mask[row, :count] = 0
        padding = config.get("pad_token_id") or 0  # RoBERTa's positions count what is none
        return {"input_ids": np.where(mask == 1, ids, padding), "attention_mask": mask}

    @cached_property
    def unrounded(self) -> Array:
        """What transformers computes."""
        return self.model.oracle(self.source)(*self.inputs.values())

    def rounded(self, transform: Any) -> Array:
        """Return what the source computes with its weights rounded by ``transform``."""
        opened, mask = self.traced.source, self.inputs["attention_mask"]
        types = np.zeros_like(mask)
        known = {**self.inputs, "position_ids": positions(mask), "token_type_ids": types}
        ports = [port.name for port in opened.program.signature.inputs]
        (found,) = opened.reference.run([{n: a for n, a in known.items() if n in ports}], transform)
        return np.asarray(next(iter(found.values())))

    def compiled(self, target: str, scheme: str, place: Path) -> Array:
        """Write an artifact and return what it has to compute.

        The work of ``llmopt compile`` for a source that was traced before; the proof is ours.
        """
        from llmopt.backends import find_backend
        from llmopt.compiler import Clock, CompileOptions
        from llmopt.compiler.compilation import Compilation
        from llmopt.quantization.schemes import parse_scheme

        quantize = None if scheme == "fp32" else parse_scheme(scheme)
        options = CompileOptions(quantize=quantize, verify="off", force=True)
        way = Compilation.prepare(self.traced, find_backend(target), options, Clock())
        way.run(place)
        return self.unrounded if quantize is None else self.rounded(way.rounding())


def targets() -> list[str]:
    """Return every target, and those of its options that choose other kernels."""
    from llmopt.backends import find_backend, known_backends
    from llmopt.errors import UsageError

    found = list(known_backends())
    for variant in VARIANTS:
        try:
            find_backend(variant)
        except UsageError:
            continue
        found.append(variant)
    return found


def missing(target: str) -> str:
    """Return what this machine lacks to build and run a target; nothing if it can."""
    from llmopt.backends import find_backend

    here = find_backend(target).available()
    return "; ".join(filter(None, [here.builds, here.runs]))


def tolerance(model: Model, scheme: str) -> float:
    """Return the error that a case may have.

    >>> tolerance(MODELS["SmolLM2-135M-Instruct"], "w4"), tolerance(MODELS["bert"], "fp32")
    (0.19, 0.0001)
    """
    growth = 1.0 if scheme == "fp32" else math.sqrt(model.layers / 2)
    return float(f"{TOLERANCES[scheme] * growth:.2g}")


def schemes(target: str, model: Model) -> list[str]:
    """Return ``"fp32"`` where the target has it, and the schemes that it has kernels for."""
    from llmopt.backends import find_backend

    if "ep=openvino" in target:  # that provider takes encoders, and rounds nothing
        return ["fp32"] if model.task == "encoder" else []
    backend = find_backend(target)
    known = backend.schemes
    dynamic = {"w8a8-dynamic"} if model.task == "decoder" else set()  # it is for encoders
    floats = ["fp32"] if backend.default_scheme is None else []
    return [*floats, *(s for s in SCHEMES if s in known - dynamic)]


def measure(subject: Subject, target: str, scheme: str, work: Path) -> dict[str, float]:
    """Return the error of each way to run an artifact, by name.

    Raises:
        UnusableError: the target does not build and run here, or the weights are not here.
        LlmoptError: the model could not be compiled for the target, or not run.
    """
    import llmopt
    from llmopt.errors import BackendUnavailableError

    if lacking := missing(target):
        raise UnusableError(f"{target} needs: {lacking}")
    run = _decoder if subject.model.task == "decoder" else _encoder
    counted = 1.0 if scheme == "fp32" else COUNTED
    try:
        wanted = subject.compiled(target, scheme, work)
        return dict(run(llmopt.load(work), subject.inputs, wanted, counted))
    except BackendUnavailableError as error:  # known only once it is asked to run
        raise UnusableError(str(error)) from error


def _decoder(
    runner: Any, feeds: dict[str, Array], wanted: Array, counted: float
) -> Iterator[tuple[str, float]]:
    ids, mask = feeds.values()
    yield "one step", error(runner.logits(ids[:1]), wanted[:1], mask[:1], counted)
    yield (
        "through the cache",
        error(runner.logits(ids[:1], prefill=PREFILL), wanted[:1], mask[:1], counted),
    )
    found = runner.logits(ids, prefill=PREFILL, mask=mask)
    yield "padded in front", error(found, wanted, mask, counted)


def _encoder(
    runner: Any, feeds: dict[str, Array], wanted: Array, counted: float
) -> Iterator[tuple[str, float]]:
    if "token_type_ids" in runner.session.inputs:
        feeds = {**feeds, "token_type_ids": np.zeros_like(feeds["input_ids"])}
    mask = feeds["attention_mask"]

    def states(given: dict[str, Array]) -> Array:
        return np.asarray(runner.run(given)["last_hidden_state"])

    first = {name: array[:1] for name, array in feeds.items()}
    yield "one sequence", error(states(first), wanted[:1], mask[:1], counted)
    yield "padded in front", error(states(feeds), wanted, mask, counted)
    behind = {name: rolled(array) for name, array in feeds.items()}
    alone = states({name: array[1:2, PADDING[1] :] for name, array in feeds.items()})
    found = states(behind)[1:2, : LENGTH - PADDING[1]]
    yield "padded behind, to alone", error(found, alone, np.ones(found.shape[:2]), counted)


def rolled(array: Array) -> Array:
    """Return rows [3, 41] with the padding in front of each moved behind it."""
    return np.stack([np.roll(row, -count) for row, count in zip(array, PADDING, strict=True)])


def error(found: Array, wanted: Array, mask: Array, counted: float) -> float:
    """Return max|a-b| / max|b| over the tokens that the mask [B, S] calls real.

    Args:
        found: [B, S, N] of the artifact.
        wanted: Of the source.
        mask: Which tokens are real.
        counted: The part of them that counts, those with the least error.
    """
    if found.shape != wanted.shape or not np.isfinite(found[mask == 1]).all():
        return float("inf")
    real = mask == 1
    each = np.abs(found - wanted)[real].max(axis=-1) / np.abs(wanted[real]).max()
    return float(np.quantile(each, counted, method="higher"))


def rows(
    chosen: Sequence[str], models: Sequence[str], only: Sequence[str], folder: Path
) -> Iterator[dict[str, Any]]:
    """Yield one row for each case that can be measured, telling of the others."""
    from llmopt.errors import LlmoptError

    for name in models:
        subject = Subject(MODELS[name], folder / name)
        for target in chosen:
            for scheme in schemes(target, subject.model):
                if only and scheme not in only:
                    continue
                case = {"target": target, "model": name, "scheme": scheme}
                try:
                    place = folder / f"{name}.{target}.{scheme}"  # a library is known by its path
                    errors = measure(subject, target, scheme, place)
                except UnusableError as reason:
                    print(f"{target:28} {name:22} {scheme:13} skipped: {reason}", file=sys.stderr)
                    continue
                except LlmoptError as reason:
                    print(f"{target:28} {name:22} {scheme:13} FAILED: {reason}", file=sys.stderr)
                    yield {**case, "failed": str(reason)}
                    continue
                worst, allowed = max(errors.values()), tolerance(subject.model, scheme)
                mark = "" if worst <= allowed else f"  ABOVE {allowed:g}"
                print(f"{target:28} {name:22} {scheme:13} {worst:.1e}{mark}", file=sys.stderr)
                shutil.rmtree(place)
                rounded = {way: float(f"{e:.2g}") for way, e in errors.items()}
                yield {**case, "tolerance": allowed, "errors": rounded}


def merged(new: Sequence[dict[str, Any]], file: Path) -> list[dict[str, Any]]:
    """Return the rows of ``file`` with those measured now in their place, in a fixed order."""
    old = json.loads(file.read_text())["rows"] if file.exists() else []
    by_case = {(row["target"], row["model"], row["scheme"]): row for row in [*old, *new]}
    order = list(MODELS)
    key = sorted(by_case, key=lambda c: (c[0], order.index(c[1]), SCHEMES.index(c[2])))
    return [by_case[case] for case in key]


def main() -> None:
    """Measure what was asked for and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--target", action="append", help="all if not given")
    parser.add_argument("--model", action="append", choices=MODELS, help="all if not given")
    parser.add_argument("--scheme", action="append", choices=SCHEMES, help="all if not given")
    parser.add_argument("--json", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        asked = (chosen.target or targets(), chosen.model or list(MODELS), chosen.scheme or [])
        for row in rows(*asked, Path(folder)):
            found.append(row)  # a run that is cut short keeps what it measured
            everything = {"schema": 1, "rows": merged(found, chosen.json)}
            chosen.json.write_text(json.dumps(everything, indent=1) + "\n")
    bad = [r for r in found if "failed" in r or max(r["errors"].values()) > r["tolerance"]]
    sys.exit(f"{len(bad)} of {len(found)} cases failed" if bad else 0)


if __name__ == "__main__":
    main()
