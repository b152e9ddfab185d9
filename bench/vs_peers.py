"""TVM artifacts against llama.cpp, OpenVINO and onnxruntime-genai, beside the machine's limits.

    python bench/vs_peers.py --install --work DIR
    python bench/vs_peers.py --work DIR [--blocks 4] [--json FILE] [--side S]... [--avx2] CASE ...

A case is ``smollm2``, ``llama-1.2b``, ``minilm`` or ``bert-base`` (1.2 B and base: random);
``--install`` makes an environment in DIR with the other tools, llama.cpp compiled for this very
processor (minutes). Every side runs in fresh processes with the same threads, one after the other
in a *block*; the order turns from block to block. Decoders: prefill of 128 and of 512 tokens, then
64 decoded, each on a new random prompt. Encoders: 1 x 128 and 8 x 128 tokens. Printed are medians
over blocks, the ratio of ours to each side with a 95 % interval from a bootstrap of blocks, and the
fraction of the roofline: decoding, the weights' bytes per second against what the machine reads;
else, the products per second against its peak in int8.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import families
import frameworks
import peers
import shapes
from intervals import median_interval

PACKAGES: Final = (
    "openvino==2026.4.1",
    "openvino-genai==2026.4.1",
    "openvino-tokenizers==2026.4.1",
)
UNBOUND: Final = ("optimum", "optimum-intel", "nncf")
LLAMA: Final = ("diskcache", "llama-cpp-python==0.3.36")
"""Installed without what they ask for: the project's environment has it, and in other builds."""
NEEDED: Final = (
    "transformers==4.57.1",  # the newest that optimum-intel exports with
    "huggingface-hub<1",
    "natsort",
    "pydot",
    "rich",
    "networkx",
    "scikit-learn",
    "tabulate",
    "jsonschema",
    "psutil",
)
OPENVINO: Final = "venv-openvino"
LLAMACPP: Final = "venv-llamacpp"
LLAMACPP_AVX2: Final = "venv-llamacpp-avx2"
"""Environments in the work folder; the last is llama.cpp compiled for AVX2 and no more."""
NATIVE: Final = "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"
CTRANSLATE2: Final = "venv-ctranslate2"
OPTIMUM: Final = "venv-optimum"
OLIVE: Final = "venv-olive"
"""Environments that ``suite.py`` makes."""
AVX2: Final = "-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DLLAVA_BUILD=OFF"
PREFILLS: Final = (128, 512)
DECODE: Final = 64
BATCHES: Final = (1, 8)
WARM, ROUNDS = 1, 3  # of a process, for each workload

BERT: Final = {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072}


@dataclass(frozen=True)
class Side:
    """One tool on one model.

    Args:
        build: Makes what it runs from a checkpoint.
        run: Opens that.
        file: What its model is called in the work folder, after the case; empty for the checkpoint.
        foreign: The environment that it lives in, empty for the project's own.
    """

    build: Callable[[Path, Path], None] | None
    run: Callable[[Path, int], Any]
    file: str
    foreign: str = ""


def llmopt(target: str, scheme: str) -> Side:
    """Return llmopt for a target."""
    return Side(peers.build_llmopt(target, scheme), peers.Llmopt, f"{target}-{scheme}")


def decoders(group: int) -> dict[str, Side]:
    """Return the sides of a decoder: ours is the first."""
    return {
        "tvm-cpu w4": llmopt("tvm-cpu", "w4"),
        "onnxruntime-cpu w4": llmopt("onnxruntime-cpu", "w4"),
        "llama.cpp Q4_0": Side(peers.build_gguf, peers.LlamaCpp, "q4_0.gguf", foreign=LLAMACPP),
        "OpenVINO int4": Side(
            peers.build_openvino(group), peers.OpenVino, f"ov-int4-g{group}", foreign=OPENVINO
        ),
        "genai int4": Side(peers.build_genai("int4"), peers.Genai, "genai-int4"),
        "CTranslate2 int8": Side(
            frameworks.build_ctranslate2("int8"),
            frameworks.CTranslate2Decoder,
            "ct2-int8",
            foreign=CTRANSLATE2,
        ),
        "torch fp32": Side(None, frameworks.TorchDecoder, ""),
        "torch.compile fp32": Side(None, frameworks.TorchCompiledDecoder, ""),
        "Optimum fp32": Side(
            frameworks.build_optimum("text-generation-with-past"),
            frameworks.OptimumDecoder,
            "optimum",
            foreign=OPTIMUM,
        ),
        "Olive int4": Side(frameworks.build_olive, peers.Genai, "olive-int4", foreign=OLIVE),
    }


def avx2_decoders() -> dict[str, Side]:
    """Return the sides of a decoder where there are no vectors of 512 bits, and no VNNI."""
    return {
        "tvm-cpu w4 avx2": llmopt("tvm-cpu{mcpu=haswell}", "w4"),
        "llama.cpp Q4_0 avx2": Side(
            peers.build_gguf, peers.LlamaCpp, "q4_0.gguf", foreign=LLAMACPP_AVX2
        ),
    }


def encoders() -> dict[str, Side]:
    """Return the sides of an encoder: ours is the first."""
    return {
        "tvm-cpu w8a8-dynamic": llmopt("tvm-cpu", "w8a8-dynamic"),
        "onnxruntime-cpu w8a8-dynamic": llmopt("onnxruntime-cpu", "w8a8-dynamic"),
        "OpenVINO int8": Side(
            peers.build_openvino_encoder("int8"), peers.OpenVinoEncoder, "ov-i8", foreign=OPENVINO
        ),
        "OpenVINO bf16": Side(
            peers.build_openvino_encoder("fp32"), peers.OpenVinoHalf, "ov", foreign=OPENVINO
        ),
        "OpenVINO fp32": Side(
            peers.build_openvino_encoder("fp32"), peers.OpenVinoEncoder, "ov", foreign=OPENVINO
        ),
        "torch fp32": Side(None, peers.Torch, ""),
        "torch.compile fp32": Side(None, frameworks.TorchCompiled, ""),
        "CTranslate2 int8": Side(
            frameworks.build_ctranslate2("int8"),
            frameworks.CTranslate2Encoder,
            "ct2-int8",
            foreign=CTRANSLATE2,
        ),
        "Optimum fp32": Side(
            frameworks.build_optimum("feature-extraction"),
            frameworks.OptimumEncoder,
            "optimum",
            foreign=OPTIMUM,
        ),
    }


CASES: Final[Mapping[str, tuple[Callable[[Path], None], Mapping[str, Side]]]] = {
    "smollm2": (shapes.smollm2, decoders(64) | avx2_decoders()),
    "llama-1.2b": (shapes.llama, decoders(128) | avx2_decoders()),
    "minilm": (families.write_minilm, encoders()),
    "bert-base": (partial(peers.write_bert, BERT), encoders()),
}


# --- one process --------------------------------------------------------------------------------


def measure(case: str, name: str, place: Path, threads: int, seed: int) -> dict[str, list[float]]:
    """Return samples in seconds by workload, of a side in this process."""
    side = CASES[case][1][name]
    source = place / case
    opened = side.run(place / f"{case}-{side.file}" if side.file else source, threads)
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    rng = np.random.default_rng(seed)
    samples: dict[str, list[float]] = {}
    if hasattr(opened, "prefill_and_decode") and "decode" in workloads(case):
        for number in range(WARM + ROUNDS):
            for length in PREFILLS:
                prompt = rng.integers(10, vocabulary, length)
                first, each = opened.prefill_and_decode(prompt, DECODE if length == 128 else 1)
                if number >= WARM:
                    samples.setdefault(f"prefill {length}", []).append(first)
                    if length == 128:
                        samples.setdefault("decode", []).append(each)
        return samples
    for batch in BATCHES:
        for number in range(WARM + 4 * ROUNDS):
            tokens = rng.integers(1000, vocabulary, (batch, 128))
            start = time.perf_counter()
            opened.encode(tokens)
            if number >= WARM:
                samples.setdefault(f"{batch} x 128", []).append(time.perf_counter() - start)
    return samples


def workloads(case: str) -> list[str]:
    """Return what is measured of a case."""
    if "tvm-cpu w4" in CASES[case][1]:
        return [*(f"prefill {length}" for length in PREFILLS), "decode"]
    return [f"{batch} x 128" for batch in BATCHES]


def tokens_of(workload: str) -> int:
    """Return how many tokens a sample of a workload handles.

    >>> tokens_of("prefill 512"), tokens_of("decode"), tokens_of("8 x 128")
    (512, 1, 1024)
    """
    if workload == "decode":
        return 1
    return int(np.prod([int(part) for part in workload.split() if part.isdigit()]))


# --- the machine's limits -----------------------------------------------------------------------


def read_bytes_per_s(threads: int) -> float:
    """Return how fast this machine reads memory far larger than its caches, best of five."""
    parts = [np.ones(1 << 25, np.int64) for _ in range(threads)]  # 256 MB each

    def once() -> float:
        workers = [threading.Thread(target=np.add.reduce, args=(part,)) for part in parts]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return sum(part.nbytes for part in parts) / (time.perf_counter() - start)

    return max(once() for _ in range(5))


def int8_per_s(threads: int) -> float:
    """Return this machine's int8 multiply-adds per second.

    Measured, with a loop of nothing but its best instruction; of AMX it is 1024 a cycle at the
    clock that the kernel tells.
    """
    info = Path("/proc/cpuinfo").read_text()
    if "amx_int8" in info:
        lines = info.splitlines()
        return threads * 1024e6 * max(float(x[11:]) for x in lines if x.startswith("cpu MHz\t\t:"))
    os.environ["TVM_NUM_THREADS"] = str(threads)  # else it leaves every second core alone
    import tvm_linear

    run, operations = tvm_linear.multiplying(
        tvm_linear.Bench(threads, 1, "host"), threads, integers=True
    )
    best = float("inf")
    for _ in range(200):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return operations / 2 / best


@dataclass(frozen=True)
class Work:
    """Elements of a model's matrices: multiply-adds of a token.

    Args:
        body: Of the layers, for every token.
        head: Of the head, for the last token of a prompt and for each decoded one.
    """

    body: int
    head: int


def work_of(source: Path) -> Work:
    """Return the work of a checkpoint; tables that are only looked up are none."""
    from safetensors import safe_open

    body = head = 0
    with safe_open(source / "model.safetensors", "np") as file:
        for name in file.keys():  # noqa: SIM118 - the file is no mapping
            shape = file.get_slice(name).get_shape()
            if len(shape) != 2 or "embeddings." in name:
                continue
            if "embed_tokens" in name:  # tied
                head += int(np.prod(shape))
            else:
                body += int(np.prod(shape))
    return Work(body, head)


def roofline(workload: str, rate: float, work: Work, machine: Mapping[str, float]) -> float:
    """Return which fraction of the machine's limit a rate in tokens per second comes to."""
    if workload == "decode":
        weights = work.body + work.head
        return rate * weights * 4.5 / 8 / machine["read_bytes_per_s"]  # 16 bits of scale for 32
    return rate * (work.body + work.head / tokens_of(workload)) / machine["int8_per_s"]


# --- all of them --------------------------------------------------------------------------------


def prepare(case: str, chosen: argparse.Namespace) -> dict[str, Side]:
    """Make the checkpoint and every side's model; return the sides that could be made."""
    make, sides = CASES[case]
    source = chosen.work / case
    if not source.exists():
        make(source)
    ready = {}
    for name, side in sides.items():
        if (chosen.side and name not in chosen.side) or chosen.avx2 != name.endswith("avx2"):
            continue
        place = chosen.work / f"{case}-{side.file}"
        if side.build is not None and not place.exists():
            command = [interpreter(side, chosen.work), __file__, case, "--work", str(chosen.work)]
            done = subprocess.run([*command, "--build", name], check=False)
            if done.returncode:
                _remove(place)  # else it would pass for built next time
                print(f"{case}: {name} could not be built and is left out", file=sys.stderr)
                continue
        ready[name] = side
    return ready


def _remove(place: Path) -> None:
    """Remove what a build has left, a file or a folder, if anything."""
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)


def interpreter(side: Side, work: Path) -> str:
    """Return the Python that has what a side needs."""
    return str(work / side.foreign / "bin" / "python") if side.foreign else sys.executable


def compare(case: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """Return the samples of one case: side, workload, [blocks][rounds] seconds."""
    ready = prepare(case, chosen)
    found: dict[str, dict[str, list[list[float]]]] = {name: {} for name in ready}
    for block in range(chosen.blocks):
        names = list(ready)[block % len(ready) :] + list(ready)[: block % len(ready)]
        for name in names[:: 1 if block % 2 else -1]:
            command = [interpreter(ready[name], chosen.work), __file__, case]
            command += ["--work", str(chosen.work)]
            command += ["--child", name, "--seed", str(block), "--threads", str(chosen.threads)]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode:
                print(f"{case}: {name} failed: {done.stderr[-500:]}", file=sys.stderr)
                continue
            for workload, seconds in json.loads(done.stdout.splitlines()[-1]).items():
                found[name].setdefault(workload, []).append(seconds)
    return {"case": case, "samples": {name: s for name, s in found.items() if s}}


def report(result: dict[str, Any], work: Work, machine: Mapping[str, float]) -> None:
    """Print the rates, the ratios of ours to each side and the fractions of the roofline."""
    samples = result["samples"]
    ours = next(iter(samples))
    result["rows"] = []
    for workload in workloads(result["case"]):
        count = tokens_of(workload)
        for name, of in samples.items():
            blocks = np.array([np.median(block) for block in of[workload]])
            rate = count / float(np.median(blocks))
            ratio, low, high = ratio_of(samples[ours][workload], of[workload])
            part = roofline(workload, rate, work, machine)
            row = {"workload": workload, "side": name, "tokens_per_s": round(rate, 1)}
            row |= {"ours_to_it": [round(x, 3) for x in (ratio, low, high)]}
            result["rows"].append(row | {"roofline": round(part, 3)})
            print(
                f"{result['case']:11} {workload:12} {name:30} {rate:9.1f} tok/s  {part:5.0%} of"
                f" the roofline  ours/it {ratio:.2f} [{low:.2f}, {high:.2f}]"
            )


def ratio_of(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]
) -> tuple[float, float, float]:
    """Return the median over blocks of their time to ours, and its 95 % interval."""
    count = min(len(ours), len(theirs))
    logs = np.array(
        [np.log(np.median(theirs[i]) / np.median(ours[i])) for i in range(count)], np.float64
    )
    low, high = median_interval(logs[:, None])
    return float(np.exp(np.median(logs))), float(np.exp(low)), float(np.exp(high))


def install(work: Path) -> None:
    """Make the environments of the other tools, which see the project's own packages too."""
    install_openvino(work / OPENVINO)
    install_llamacpp(work / LLAMACPP)
    install_llamacpp(work / LLAMACPP_AVX2, AVX2)


def install_openvino(place: Path) -> None:
    """Make the environment of OpenVINO and what exports to it."""
    pip = environment(place)
    subprocess.run([*pip, *PACKAGES, *NEEDED], check=True)
    subprocess.run([*pip, "--no-deps", *UNBOUND], check=True)


def install_llamacpp(place: Path, flags: str = "") -> None:
    """Compile llama.cpp: for this processor, or with flags of CMake's.

    Raises:
        RuntimeError: The processor has AMX and there is no clang.
    """
    chosen = {} if flags else compiler()
    pip = [*environment(place), "--no-deps", "--no-cache-dir"]  # else what was compiled with others
    subprocess.run(
        [*pip, *LLAMA], check=True, env={**os.environ, **chosen, "CMAKE_ARGS": flags or NATIVE}
    )


def compiler() -> dict[str, str]:
    """Return the environment that chooses the compiler of llama.cpp.

    What gcc 12 makes of its code for AMX dies of an illegal instruction: it takes the 64 bytes that
    `_tile_loadconfig` reads for fewer, and drops stores to them. clang (with its libomp) does not.

    Raises:
        RuntimeError: The processor has AMX and there is no clang.
    """
    if "amx_int8" not in Path("/proc/cpuinfo").read_text():
        return {}
    for version in ("", *(f"-{number}" for number in range(22, 15, -1))):
        if shutil.which(f"clang++{version}"):
            return {"CC": f"clang{version}", "CXX": f"clang++{version}"}
    raise RuntimeError(
        "llama.cpp needs clang 16 or newer for AMX: apt install clang-16 libomp-16-dev"
    )


def environment(place: Path) -> list[str]:
    """Make an environment and return the command that installs into it."""
    venv.create(place, with_pip=True)
    (folder,) = place.glob("lib/python*/site-packages")
    here = [path for path in sys.path if path.endswith("site-packages")]
    (folder / "project.pth").write_text("".join(f"{path}\n" for path in here))
    return ["nice", "-n", "19", str(place / "bin" / "python"), "-m", "pip", "install", "--quiet"]


def arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], metavar="CASE")
    parser.add_argument("--work", type=Path, required=True, help="keeps models between runs")
    parser.add_argument("--install", action="store_true", help="make the environment of the peers")
    parser.add_argument("--side", action="append", help="only these; all if not given")
    parser.add_argument("--avx2", action="store_true", help="code for AVX2 alone, on both sides")
    parser.add_argument("--blocks", type=int, default=5, help="0 makes the models and no more")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--build", help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure the cases that were asked for."""
    chosen = arguments()
    chosen.work.mkdir(parents=True, exist_ok=True)
    if chosen.install:
        install(chosen.work)
    case = chosen.cases[0] if chosen.cases else ""
    if chosen.build:
        side = CASES[case][1][chosen.build]
        assert side.build is not None
        side.build(chosen.work / case, chosen.work / f"{case}-{side.file}")
        return
    if chosen.child:
        found = measure(case, chosen.child, chosen.work, chosen.threads, chosen.seed)
        print(json.dumps(found))
        return
    machine = {
        "read_bytes_per_s": read_bytes_per_s(chosen.threads),
        "int8_per_s": int8_per_s(chosen.threads),
    }
    print(f"reads {machine['read_bytes_per_s'] / 1e9:.1f} GB/s with {chosen.threads} threads")
    results = []
    for name in chosen.cases:
        results.append(compare(name, chosen))
        if chosen.blocks:
            report(results[-1], work_of(chosen.work / name), machine)
    if chosen.json is not None:
        load = os.getloadavg()[0]
        everything = {"machine": machine, "load_average": load, "results": results}
        chosen.json.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
