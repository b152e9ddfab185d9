"""The HTML report of a benchmark: self-contained, without scripts.

Everything comes from `BenchmarkResult.to_dict`, which is embedded in the page. Each figure is a
``data`` element whose value is the exact number.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any, Final

from llmopt.benchmark import charts

Json = Mapping[str, Any]
_METRICS: Final[Mapping[str, tuple[str, str, float]]] = {
    "ttft_s": ("Time to first token", "ms", 1e3),
    "time_per_output_token_s": ("Time per output token, mean of a repetition", "ms", 1e3),
    "token_latency_s": ("Time of each output token", "ms", 1e3),
    "encode_latency_s": ("Time to encode a batch", "ms", 1e3),
    "run_latency_s": ("Time of a run", "ms", 1e3),
    "prefill_tokens_per_s": ("Prefill", "tokens/s", 1.0),
    "decode_tokens_per_s": ("Decode", "tokens/s", 1.0),
    "encode_tokens_per_s": ("Encode", "tokens/s", 1.0),
    "load_s": ("Time to load, in fresh processes", "ms", 1e3),
    "peak_rss_bytes": ("Peak resident memory, in fresh processes", "MB", 1e-6),
}
"""Heading, unit and factor of each metric, in the order of the page."""
_BUSY: Final = 0.5  # load average per core above which the numbers mean little
_ROWS: Final = 24  # of the longest table


def page(result: Json) -> str:
    """Return the HTML page of a result.

    Args:
        result: Result as `BenchmarkResult.to_dict` returns it.
    """
    style = files("llmopt.benchmark").joinpath("page.css").read_text(encoding="utf-8")
    body = "\n".join(_body(result))
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    data = json.dumps(result, sort_keys=True).replace("<", "\\u003c")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>llmopt bench: {escape(result['workload'])}</title>\n"
        f"<style>\n{style}</style>\n</head>\n<body>\n{body}\n"
        f'<script type="application/json" id="result">{data}</script>\n</body>\n</html>\n'
    )


def _body(result: Json) -> Iterator[str]:
    machine = result["machine"]
    yield "<h1>llmopt bench</h1>"
    yield f"<p><code>{escape(result['workload'])}</code>, {_data(result['threads'])} threads, "
    yield f"{escape(machine['processor'])}</p>"
    yield from (f'<p class="notice">{text}</p>' for text in _notices(result))
    yield from _distributions(result["artifacts"])
    yield from _roofline(result)
    yield from _profiles(result["artifacts"])
    yield from _compiled(result["artifacts"])
    yield from _machine(result)


def figure(value: float | None, unit: str = "", factor: float = 1.0) -> str:
    """Return a ``data`` element with a rounded number and its unit."""
    if value is None:
        return "unknown"
    text = rounded(value * factor)
    return f"{_data(value, text)}{' ' + unit if unit else ''}"


def rounded(value: float) -> str:
    """Return a number with at least three digits and no exponent.

    >>> rounded(1234.5), rounded(12.345), rounded(0.00123456), rounded(64)
    ('1234', '12.3', '0.00123', '64')
    """
    if isinstance(value, int) or value == 0 or abs(value) >= 1000:
        return f"{value:.0f}"
    decimals = 2
    size = abs(value)
    while size < 1:
        size, decimals = size * 10, decimals + 1
    while size >= 10:
        size, decimals = size / 10, decimals - 1
    return f"{value:.{decimals}f}"


def _data(value: float, text: str = "") -> str:
    return f'<data value="{json.dumps(value)}">{text or value}</data>'


def _notices(result: Json) -> Iterator[str]:
    if result["steady"] is False:
        yield (
            "The samples still show a trend: warm-up may be incomplete, or the machine's clock "
            "changed meanwhile."
        )
    load, cores = result["load_average"], result["machine"]["cores"]
    if load is not None and load > _BUSY * cores:
        yield f"The machine was busy before: load average {figure(load)} on {_data(cores)} cores."


def _table(
    header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()
) -> str:
    """Return a table of HTML cells, with the columns ``numbers`` aligned to the right."""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = (' class="number"' if i in numbers else "" for i in range(len(cells)))
        return "".join(f"<{tag}{k}>{c}</{tag}>" for c, k in zip(cells, kinds, strict=True))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    head = f"<thead><tr>{line(header, 'th')}</tr></thead>"
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'


def _named(artifact: Json) -> str:
    scheme = f" <small>{escape(artifact['precision'])}</small>" if artifact["precision"] else ""
    return f'<span><span class="name">{escape(artifact["path"])}</span>{scheme}</span>'


# --- measurements -------------------------------------------------------------------------------


def _distributions(artifacts: Sequence[Json]) -> Iterator[str]:
    yield "<h2>Measured</h2>"
    yield (
        "<p class=faint>Dots are samples, the bar is their median, the band its 95 % confidence "
        "interval; rings are outliers, which are included.</p>"
    )
    for name, (heading, unit, factor) in _METRICS.items():
        measured = [(a, a["metrics"][name]) for a in artifacts if name in a["metrics"]]
        if not measured:
            continue
        samples = [sample for _, metric in measured for sample in metric["samples"]]
        low, high = min(samples), max(samples)
        yield f'<section class="card"><h3>{heading}</h3>'
        for artifact, metric in measured:
            yield f'<div class="row"><header>{_named(artifact)}'
            yield f"<span>{_middle(metric, unit, factor)}</span></header>"
            yield f"{charts.strip(metric, low, high)}</div>"
        ends = (f"<span>{figure(value, unit, factor)}</span>" for value in (low, high))
        yield f'<div class="ends faint">{"".join(ends)}</div></section>'


def _middle(metric: Json, unit: str, factor: float) -> str:
    """Return the median of a metric, its interval and the percentiles with enough samples."""
    text = f"<strong>{figure(metric['median'], unit, factor)}</strong>"
    if metric["interval_95"]:
        low, high = (figure(end, "", factor) for end in metric["interval_95"])
        text += f" <small>[{low}, {high}]</small>"
    for percent in ("p90", "p99"):
        if metric[percent] is not None:
            text += f" <small>{percent} {figure(metric[percent], '', factor)}</small>"
    return text


# --- roofline -----------------------------------------------------------------------------------


def _roofline(result: Json) -> Iterator[str]:
    ceilings = result["ceilings"]
    phases = [(a, phase) for a in result["artifacts"] for phase in a["roofline"]]
    if not ceilings or not phases:
        return
    yield "<h2>Against the machine's limits</h2>"
    yield '<section class="card">'
    points, rows = [], []
    for number, (artifact, phase) in enumerate(phases, start=1):
        macs = sum(phase["macs"].values())
        colour = f"p{result['artifacts'].index(artifact) % charts.COLOURS}"
        intensity, rate = macs / phase["read_bytes"], macs / phase["seconds"]
        points.append(charts.Point(str(number), intensity, rate, colour))
        rows.append([str(number), *_reached(phase), _named(artifact)])
    yield charts.roofline(points, ceilings["read_bytes_per_s"], ceilings["macs_per_s"])
    header = ["", "phase", "of the limit", "bound by", "time", "memory", "compute", "artifact"]
    yield _table(header, rows, numbers=(2, 4, 5, 6))
    yield f"<p class=faint>{_limits(ceilings)}</p>"
    if any(phase["in_cache"] for _, phase in phases):
        yield (
            "<p class=faint>* The weights fit in the last-level cache, which is faster than "
            "memory, so more than 100 % is possible.</p>"
        )
    yield "</section>"


def _reached(phase: Json) -> list[str]:
    star = "*" if phase["in_cache"] and phase["bound"] == "memory" else ""
    return [
        phase["phase"],
        f"<strong>{figure(phase['fraction'], '%', 100)}</strong>{star}",
        phase["bound"],
        figure(phase["seconds"], "ms", 1e3),
        f"{figure(phase['read_s'], 'ms', 1e3)} ({figure(phase['read_bytes'], 'MB', 1e-6)})",
        figure(phase["multiply_s"], "ms", 1e3),
    ]


def _limits(ceilings: Json) -> str:
    rates = (
        f"multiplies {figure(rate, 'G', 1e-9)} {escape(dtype)} pairs per second"
        f" ({escape(ceilings['by'][dtype])})"
        for dtype, rate in ceilings["macs_per_s"].items()
    )
    reads = f"This machine reads {figure(ceilings['read_bytes_per_s'], 'GB/s', 1e-9)}"
    return f"{reads} and {', '.join(rates)}, measured with {_data(ceilings['threads'])} threads."


# --- profile ------------------------------------------------------------------------------------


def _profiles(artifacts: Sequence[Json]) -> Iterator[str]:
    if not any(artifact["profile"] for artifact in artifacts):
        return
    yield "<h2>Where the time goes</h2>"
    for artifact in artifacts:
        if not artifact["profile"]:
            continue
        parts: dict[str, float] = {}
        for phase in artifact["profile"]:
            for part, seconds in phase["by_part"].items():
                parts[part] = max(parts.get(part, 0.0), seconds / phase["seconds"])
        classes = charts.colours(parts)
        yield f"<h3>{_named(artifact)}</h3>"
        for phase in artifact["profile"]:
            yield from _profile(phase, classes)


def _profile(phase: Json, classes: Mapping[str, str]) -> Iterator[str]:
    yield f'<section class="card"><h3>{escape(phase["phase"])}, '
    yield f"{figure(phase['seconds'], 'ms', 1e3)} per profiled run</h3>"
    yield charts.bar(phase["by_part"], classes)
    yield '<ul class="legend">'
    for part, seconds in phase["by_part"].items():
        yield f'<li><i class="{classes[part]}"></i><span class="name">'
        yield f"{escape(part or 'no module')}</span>{figure(seconds, 'ms', 1e3)}</li>"
    outside = figure(phase["outside_s"], "ms", 1e3)
    yield f'<li><i></i><span class="faint">outside operators</span>{outside}</li></ul>'
    if len(phase["by_layer"]) > 1:
        yield f"<figure>{charts.columns(phase['by_layer'], classes)}"
        yield "<figcaption>One column per layer, from first to last.</figcaption></figure>"
    rows = [
        [
            f"<code>{escape(each['module'] or '-')}</code>",
            escape(each["op"]),
            figure(each["calls"]),
            figure(each["seconds"], "ms", 1e3),
        ]
        for each in phase["operators"][:_ROWS]
    ]
    yield "<details><summary>Operators by time</summary>"
    yield _table(["module", "operator", "calls", "time"], rows, numbers=(2, 3))
    share = figure(phase["attributed"], "%", 100)
    yield f"<p class=faint>{share} of the time belongs to modules of the source.</p>"
    yield "</details></section>"


# --- compilation and machine --------------------------------------------------------------------


def _compiled(artifacts: Sequence[Json]) -> Iterator[str]:
    with_passes = [artifact for artifact in artifacts if artifact["compiled"]]
    if with_passes:
        yield "<h2>Compilation</h2>"
    for artifact in with_passes:
        compiled = artifact["compiled"]
        yield f'<section class="card"><h3>{_named(artifact)}</h3>'
        if compiled.get("fusion"):
            rows = [
                [escape(kind), _count(fused["expected"]), _count(fused["fused"])]
                for kind, fused in compiled["fusion"].items()
            ]
            yield _table(["fusion", "expected", "fused"], rows, numbers=(1, 2))
        rows = [
            [
                f"<code>{escape(each['name'])}</code>",
                *map(_count, (each["applied"], each["missed"])),
            ]
            for each in compiled.get("passes", ())
        ]
        yield "<details><summary>Passes</summary>"
        yield _table(["pass", "applied", "declined"], rows, numbers=(1, 2))
        yield "</details></section>"


def _count(value: int | None) -> str:
    return "unknown" if value is None else _data(value)


def _machine(result: Json) -> Iterator[str]:
    machine = result["machine"]
    show: Mapping[str, Callable[[], str]] = {
        "CPU": lambda: escape(machine["processor"]),
        "architecture": lambda: escape(machine["architecture"]),
        "cores": lambda: _data(machine["cores"]),
        "features": lambda: escape(", ".join(machine["features"])),
        "memory": lambda: figure(machine["memory_bytes"], "GB", 1e-9),
        "system": lambda: escape(machine["system"]),
        "versions": lambda: escape(", ".join(f"{k} {v}" for k, v in machine["versions"].items())),
        "load average": lambda: figure(result["load_average"]),
        "fingerprint": lambda: f"<code>{machine['fingerprint']}</code>",
        "warm-up": lambda: f"{_data(result['warmups'])} repetitions discarded",
    }
    yield "<h2>Machine</h2>"
    yield _table(["", ""], [[name, cell()] for name, cell in show.items()])
