"""Every peer that is asked for, each in its own environment, in turns; one JSON and one page.

    python bench/suite.py --work DIR [--peers torch,genai] [--json FILE] [--html FILE] CASE ...

``make bench PEERS=torch,ctranslate2`` does this for SmolLM2 and MiniLM. A peer is one of those that
``--help`` lists. What a peer needs is installed into an environment in DIR when it is first asked
for; one that cannot be installed or built is left out, and said so. Cases, sides, blocks and what
is computed of them are those of ``vs_peers.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parent))
import vs_peers

from llmopt.benchmark.machine import this_machine

FOURS: Final = ("transformers==4.57.1", "huggingface-hub<1")
"""What runs transformers 4, where a tool does not know 5 yet."""


@dataclass(frozen=True)
class Peer:
    """A tool.

    Args:
        sides: How its sides' names begin.
        environment: The folder of its environment; empty for the project's own.
        packages: What is installed there.
        unbound: What is installed there without what it asks for.
    """

    sides: str
    environment: str = ""
    packages: tuple[str, ...] = ()
    unbound: tuple[str, ...] = ()


PEERS: Final[Mapping[str, Peer]] = {
    "llamacpp": Peer("llama.cpp", vs_peers.LLAMACPP),
    "openvino": Peer("OpenVINO", vs_peers.OPENVINO),
    "genai": Peer("genai"),
    "torch": Peer("torch"),
    "ctranslate2": Peer("CTranslate2", vs_peers.CTRANSLATE2, FOURS, ("ctranslate2==4.8.5",)),
    "optimum": Peer("Optimum", vs_peers.OPTIMUM, FOURS, ("optimum==2.1.0", "optimum-onnx==0.1.0")),
    # the last onnxruntime-genai whose builder is the one that Olive 0.13 calls
    "olive": Peer("Olive", vs_peers.OLIVE, ("olive-ai==0.13.0",), ("onnxruntime-genai==0.13.2",)),
}


def chosen_peers(text: str) -> list[str]:
    """Return the peers that a text names, all for ``"all"``."""
    names = list(PEERS) if text == "all" else [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        sys.exit(f"peer {unknown[0]!r} is none of {', '.join(PEERS)}")
    return names


def installed(names: Sequence[str], work: Path) -> list[str]:
    """Make the environments of peers that have none yet; return the peers that have theirs."""
    there = []
    for name in names:
        peer = PEERS[name]
        place = work / peer.environment
        try:
            if peer.environment and not (place / "complete").exists():
                _install(peer, work)
                (place / "complete").touch()
            there.append(name)
        except (subprocess.CalledProcessError, RuntimeError) as error:
            print(f"{name} could not be installed and is left out: {error}", file=sys.stderr)
    return there


def _install(peer: Peer, work: Path) -> None:
    own = {
        vs_peers.OPENVINO: vs_peers.install_openvino,
        vs_peers.LLAMACPP: vs_peers.install_llamacpp,
    }
    if peer.environment in own:
        own[peer.environment](work / peer.environment)
        return
    pip = vs_peers.environment(work / peer.environment)
    if peer.packages:
        subprocess.run([*pip, *peer.packages], check=True)
    if peer.unbound:
        subprocess.run([*pip, "--no-deps", *peer.unbound], check=True)


def sides_of(case: str, names: Sequence[str]) -> list[str]:
    """Return the sides of a case that belong to us or to the peers, ours first."""
    starts = ("tvm-cpu", "onnxruntime-cpu", *(PEERS[name].sides for name in names))
    every = vs_peers.CASES[case][1]
    return [side for side in every if side.startswith(starts) and not side.endswith("avx2")]


# --- the page -----------------------------------------------------------------------------------


def page(everything: Mapping[str, Any]) -> str:
    """Return the results as one page: nothing is fetched, and no script runs."""
    import llmopt.benchmark

    style = Path(llmopt.benchmark.__file__).with_name("page.css").read_text(encoding="utf-8")
    machine = everything["machine"]
    body = "".join(_case(result) for result in everything["results"])
    data = json.dumps(everything).replace("<", "\\u003c")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">"
        f"<title>llmopt and its peers</title><style>{style}</style></head><body>"
        f"<h1>llmopt and its peers</h1><p>{escape(machine['processor'])}, "
        f"{everything['threads']} threads. Bars are tokens a second, medians over blocks; beside "
        "them is the ratio of ours to each with its 95 % interval, and the fraction of the "
        f"machine's limit.</p>{body}"
        f'<script type="application/json" id="result">{data}</script></body></html>\n'
    )


def _case(result: Mapping[str, Any]) -> str:
    parts = [f"<h2>{escape(result['case'])}</h2>"]
    for workload in dict.fromkeys(row["workload"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["workload"] == workload]
        most = max(row["tokens_per_s"] for row in rows)
        parts.append(f'<section class="card"><h3>{escape(workload)}</h3>')
        for number, row in enumerate(rows):
            ratio, low, high = row["ours_to_it"]
            limit = f"{100 * row['roofline']:.0f} % of the limit"
            share = 100 * row["tokens_per_s"] / most
            parts.append(
                f'<div class="row"><header><span>{escape(row["side"])}</span><span><strong>'
                f"{row['tokens_per_s']:.0f} tokens/s</strong> <small>ours is {ratio:.2f} times it "
                f"[{low:.2f}, {high:.2f}], {limit}</small></span>"
                f'</header><div class="bar"><i class="p{0 if number == 0 else 6}" '
                f'style="width:{share:.1f}%"></i></div></div>'
            )
        parts.append("</section>")
    return "".join(parts)


# --- all of it ----------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("cases", nargs="+", choices=vs_peers.CASES, metavar="CASE")
    parser.add_argument("--work", type=Path, required=True, help="keeps environments and models")
    parser.add_argument("--peers", default="all", help=f"all, or some of {','.join(PEERS)}")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--html", type=Path)
    return parser.parse_args()


def main() -> None:
    """Install, build, measure in turns, write."""
    chosen = arguments()
    chosen.work = chosen.work.absolute()
    chosen.work.mkdir(parents=True, exist_ok=True)
    names = installed(chosen_peers(chosen.peers), chosen.work)
    limits = {
        "read_bytes_per_s": vs_peers.read_bytes_per_s(chosen.threads),
        "int8_per_s": vs_peers.int8_per_s(chosen.threads),
    }
    results = []
    for case in chosen.cases:
        chosen.side, chosen.avx2 = sides_of(case, names), False
        results.append(vs_peers.compare(case, chosen))
        vs_peers.report(results[-1], vs_peers.work_of(chosen.work / case), limits)
    machine = this_machine()
    everything = {
        "schema": 1,
        "machine": vars(machine) | {"fingerprint": machine.fingerprint},
        "limits": limits,
        "threads": chosen.threads,
        "load_average": os.getloadavg()[0],
        "peers": names,
        "results": results,
    }
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(everything, indent=1, default=list) + "\n")
    if chosen.html is not None:
        chosen.html.write_text(page(json.loads(json.dumps(everything, default=list))))


if __name__ == "__main__":
    main()
