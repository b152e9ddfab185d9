"""The page: what it shows is in the JSON, and nothing is fetched or run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from llmopt.benchmark.machine import MachineFingerprint
from llmopt.benchmark.page import figure, page, rounded
from llmopt.benchmark.profiling import phase_of
from llmopt.benchmark.results import ArtifactResult, BenchmarkResult, Metric
from llmopt.runtime.session import TimedOperator, TimedRun

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def result(path: str = "a/model", **changes: Any) -> BenchmarkResult:
    """A result with something in every section of the page."""
    layers = [TimedOperator(f"layers.{n}.mlp", "MatMul", 0.001, 0.0011 + n / 1e4) for n in (0, 1)]
    operators = (*layers, TimedOperator("lm_head", "MatMul", 0.002, 0.002))
    phase = phase_of("decode", [TimedRun(0.0061, operators)]).to_dict()
    reached = {
        "phase": "decode",
        "seconds": 0.0123,
        "macs": {"int8": 123456, "float32": 777},
        "read_bytes": 4321,
        "read_s": 0.0031,
        "multiply_s": None,
        "bound": "memory",
        "fraction": 0.252,
        "in_cache": True,
    }
    samples = (*(0.0123 + n / 1e5 for n in range(80)), 0.5)
    artifact = ArtifactResult(
        path,
        "onnxruntime-cpu",
        123,
        (Metric("ttft_s", samples), Metric("load_s", (0.25, 0.26))),
        {"ttft_s": (1.0,)},
        "w4",
        {
            "passes": [{"name": "fuse-norms", "applied": 61, "missed": 2}],
            "fusion": {"norm": {"expected": None, "fused": 61}},
        },
        (reached,),
        (phase,),
    )
    machine = MachineFingerprint(
        "a chip", "x86_64", 2, ("avx2",), 10**10, "Linux 6", {"python": "3.11"}
    )
    ceilings = {"read_bytes_per_s": 1.4e6, "macs_per_s": {"int8": 2.5e7, "float32": 1.1e7}}
    ceilings |= {"by": {"int8": "onnxruntime", "float32": "numpy"}, "threads": 2}
    made: dict[str, Any] = {"steady": False, "load_average": 3.5, "ceilings": ceilings} | changes
    return BenchmarkResult("prefill=8,decode=4", 2, machine, (artifact,), 3, **made)


def numbers(data: Any) -> set[float]:
    """Return every number in parsed JSON."""
    if isinstance(data, dict):
        return set().union(*map(numbers, data.values()))
    if isinstance(data, list):
        return set().union(*map(numbers, data))
    return {float(data)} if isinstance(data, int | float) and not isinstance(data, bool) else set()


def test_every_figure_on_the_page_is_in_the_json() -> None:
    data = json.loads(result().to_json())
    text = page(data)
    shown = [float(value) for value in re.findall(r'<data value="([^"]*)"', text)]
    body = text.partition("<body>")[2].partition("<script")[0]
    words = re.sub(r"<(data|svg|code|th)\b.*?</\1>|<[^>]*>", " ", body, flags=re.DOTALL)
    for text_of_the_result in ("prefill=8,decode=4", "x86_64", "avx2", "Linux 6", "python 3.11"):
        words = words.replace(text_of_the_result, "")
    left = re.findall(r"(?<![\w&#])\d[\d.]*", words)

    assert len(shown) > 30
    assert set(shown) <= numbers(data)
    assert set(left) <= {"95", "100", "1", "90", "99"}, left  # of "95 %", "p90", number of a row


def test_the_page_carries_the_result() -> None:
    data = json.loads(result("<script>alert(1)</script>").to_json())
    text = page(data)
    (carried,) = re.findall(r'<script type="application/json" id="result">(.*?)</script>', text)
    assert json.loads(carried) == data
    assert text.count("<script") == 1
    assert "&lt;script&gt;" in unescape(text).replace("<", "&lt;").replace(">", "&gt;")


def test_what_makes_numbers_doubtful_is_said() -> None:
    doubtful = page(result().to_dict())
    assert "still show a trend" in doubtful
    assert "The machine was busy" in doubtful
    assert 'class="out"' in doubtful
    calm = page(result(steady=True, load_average=0.1).to_dict())
    assert "notice" not in calm.partition("<body>")[2]


def test_what_was_not_measured_has_no_section() -> None:
    text = page(result(ceilings={}).to_dict())
    assert "roofline" not in text.partition("<body>")[2].partition("<script")[0].replace("t's", "")
    assert figure(None) == "unknown"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (-2.5, "-2.50"), (999.96, "1000"), (10, "10"), (12345.6, "12346")],
)
def test_numbers_are_rounded_for_people(value: float, text: str) -> None:
    assert rounded(value) == text


def browsed(html: str, folder: Path) -> tuple[list[str], list[str]]:
    """Return what a browser says of a page on its console, and what the page asks for."""
    folder.mkdir()
    (folder / "page.html").write_text(html, encoding="utf-8")
    log = folder / "net.json"
    done = subprocess.run(
        [
            *(str(CHROMIUM), *QUIET, f"--user-data-dir={folder / 'profile'}"),
            *("--enable-logging=stderr", f"--log-net-log={log}", "--virtual-time-budget=1000"),
            *("--dump-dom", f"file://{folder / 'page.html'}"),
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    events = json.loads(log.read_text(encoding="utf-8"))["events"]
    requests = [event["params"] for event in events if "initiator" in event.get("params", {})]
    asked = [r["url"] for r in requests if r["initiator"] != "not an origin"]  # the browser's own
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line], asked


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt install chromium")
def test_a_browser_finds_nothing_wrong_and_asks_nobody(tmp_path: Path) -> None:
    html = page(json.loads(result().to_json()))
    assert browsed(html, tmp_path / "page") == ([], [])

    image = '<img src="http://127.0.0.1:9/x.png">'
    said, asked = browsed(f"{image}<script>console.error(1)</script>", tmp_path / "other")
    assert len(said) == 1
    assert asked == ["http://127.0.0.1:9/x.png"]
    said, asked = browsed(html.replace("<h1>", f"{image}<h1>"), tmp_path / "refused")
    assert (len(said), asked) == (1, [])  # the page's own policy forbids it
