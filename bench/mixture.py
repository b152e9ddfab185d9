"""What it gives to run a mixture of experts as one operator: a random Qwen3-MoE, in turns.

    python bench/mixture.py [--scheme w4]... [--workload prefill=128,decode=32]

Each scheme is compiled twice, with ``lower-experts`` and without it: as torch's exporter writes
mixtures, where the weights of each chosen expert are copied for each token.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from typing_extensions import override

from llmopt.backends import find_backend
from llmopt.backends.base import Backend
from llmopt.backends.onnxruntime import OnnxRuntimeCpu
from llmopt.backends.onnxruntime.lower_experts import LowerExperts
from llmopt.benchmark import MeasurePlan, Metric, measure, parse_workload
from llmopt.compiler import Clock, CompileOptions, optimize
from llmopt.compiler.compilation import Compilation
from llmopt.frontend.base import SourceOptions
from llmopt.passes.base import Pass
from llmopt.passes.quantize_experts import QuantizeExperts
from llmopt.quantization.schemes import Scheme, parse_scheme

SHAPE: Final = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "moe_intermediate_size": 256,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
}
"""76 million parameters, of which 9 million are read for a token."""
SHOWN: Final = ("ttft_s", "time_per_output_token_s", "peak_rss_bytes")


@dataclass(frozen=True)
class AsWritten(OnnxRuntimeCpu):
    """The backend without what it does to experts."""

    @override
    def passes(self, scheme: Scheme | None) -> tuple[Pass, ...]:
        every = super().passes(scheme)
        return tuple(p for p in every if not isinstance(p, LowerExperts | QuantizeExperts))


def main() -> None:
    """Compile, measure, and print one table for each scheme."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--scheme", action="append", help="[default: fp32, w8 and w4]")
    parser.add_argument("--workload", default="prefill=128,decode=32")
    parser.add_argument("--verify", default="final", help="'off' measures sooner")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        source = written(Path(work) / "source")
        for scheme in options.scheme or ("fp32", "w8", "w4"):
            backends = {"one operator": find_backend("cpu"), "as written": AsWritten()}
            folders = [
                compiled(source, backend, scheme, Path(work) / f"{scheme} {name}", options.verify)
                for name, backend in backends.items()
            ]
            plan = MeasurePlan(parse_workload(options.workload))
            found = measure(folders, plan, lambda _: None)
            print(f"\n{scheme}, {options.workload}, {found.machine.processor}")
            for name in SHOWN:
                one, written_out = (each.metric(name) for each in found.artifacts)
                if one is not None and written_out is not None:
                    print(told(name, one, written_out))


def written(folder: Path) -> Path:
    """Write a checkpoint of random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**SHAPE)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


def compiled(source: Path, backend: Backend, scheme: str, out: Path, verify: str) -> Path:
    """Compile the checkpoint by a backend and return the artifact."""
    quantize = None if scheme == "fp32" else parse_scheme(scheme)
    options = CompileOptions(quantize=quantize, verify=verify)
    clock = Clock(lambda _: None)
    found = optimize(source, options, SourceOptions(), clock)
    return Compilation.prepare(found, backend, options, clock).run(out).path


def told(name: str, one: Metric, written_out: Metric) -> str:
    """Return a line of the table."""
    ratio = written_out.median / one.median
    return f"{name:26} {one.median:12.4g} as written {written_out.median:12.4g}  {ratio:6.2f} times"


if __name__ == "__main__":
    main()
