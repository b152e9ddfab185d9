"""Generated parts of the pages: passes, rules, schemes, targets, errors, commands.

cog runs these functions where a page calls them, and ``make check`` compares. Each prints
Markdown; nothing here is written by hand twice.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

import llmopt.backends
import llmopt.passes
from llmopt import errors
from llmopt.passes.base import Pass
from llmopt.quantization.schemes import SCHEMES
from llmopt.spelling import options_of, spell_value

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results.json"
CONFORMANCE = ROOT / "bench" / "conformance.json"
GATE = ROOT / "bench" / "gate"
MATRIX = ROOT / "bench" / "matrix.json"
_LABELS = "Rewrites|Needs|Numerics|Scope|Leaves|Source|Args|Raises|Returns"
_LABEL = re.compile(rf"(?:^|(?<=[.)] ))({_LABELS}): ?", re.MULTILINE)


def modules(package: Any) -> Iterator[Any]:
    """Yield a package and every module in it, by name."""
    yield package
    names = [
        found.name for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ]
    yield from map(importlib.import_module, sorted(names))


def all_passes() -> list[type[Pass]]:
    """Return every pass of llmopt: those of the default pipeline first, in its order."""
    found = {
        value.name: value
        for package in (llmopt.passes, llmopt.backends)
        for module in modules(package)
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Pass) and hasattr(value, "name")
    }
    order = list(dict.fromkeys([*llmopt.passes.DEFAULT, *sorted(found)]))
    return [found[name] for name in order]


def default_pipeline() -> None:
    """Print the default passes in order."""
    names = "\n".join(f"{i}. {name}" for i, name in enumerate(llmopt.passes.DEFAULT, 1))
    print(f"\n```text\n{names}\n```")


def passes() -> None:
    """Print one section a pass: what it rewrites, its numerics, scope, limits and options."""
    shown: dict[str, str] = {}
    for cls in all_passes():
        print(f"\n## {cls.name}\n")
        summary, sections = parts(inspect.getdoc(cls) or "")
        print(f"{summary}\n\n{position(cls)}".strip())
        text = rewrites(inspect.getmodule(cls))
        first = shown.setdefault(text, cls.name)
        if text and first == cls.name:
            print(f"\n```text\n{text}\n```")
        elif text:
            print(f"\nWhat it rewrites is shown at [{first}](#{first}).")
        definitions(sections)
        options(cls)


def position(cls: type[Pass]) -> str:
    """Return the position of a pass in a pipeline, in words."""
    if cls.lowers:
        return "*Lowering: its backend runs it last.*"
    if cls.name in llmopt.passes.DEFAULT:
        return ""
    return "*Not in the default pipeline: `--quantize` adds it.*" if "quantize" in cls.name else ""


def rules() -> None:
    """Print one section a rewrite rule."""
    import llmopt.passes.rules

    for module in modules(llmopt.passes.rules):
        summary, sections = parts(inspect.getdoc(module) or "")
        if "Needs" in sections:
            print(f"\n### {module.__name__.rpartition('.')[2]}\n\n{summary}")
            print(f"\n```text\n{rewrites(module)}\n```")
            definitions(sections)


def rewrites(module: Any) -> str:
    """Return the before and after of a module's docstring, unindented."""
    doc = inspect.getdoc(module) or ""
    found = re.search(r"^Rewrites[^\n]*::\n\n((?:    [^\n]*\n?|\n)+)", doc, re.MULTILINE)
    return textwrap.dedent(found[1]).rstrip() if found else ""


def parts(doc: str) -> tuple[str, dict[str, str]]:
    """Return the text before the first label, and the text of each."""
    doc = re.sub(r"^Rewrites[^\n]*::\n\n((?:    [^\n]*\n?|\n)+)", "", doc, flags=re.MULTILINE)
    head, *labelled = _LABEL.split(doc)
    texts = dict(zip(labelled[::2], map(str.strip, labelled[1::2]), strict=True))
    return markdown(head), texts


def markdown(text: str) -> str:
    """Return the prose of a docstring as Markdown."""
    return re.sub(r"``(.+?)``", r"`\1`", text.strip())


def definitions(sections: dict[str, str]) -> None:
    """Print what a docstring says under its labels."""
    for label in ("Needs", "Numerics", "Scope", "Leaves", "Source"):
        if text := sections.get(label):
            flat = re.sub(r"(https?://[^\s,;]+[^\s,;.])", r"<\1>", markdown(text))
            print(f"\n{label}\n: {' '.join(flat.split())}")


def options(cls: type[Any]) -> None:
    """Print the options of a pass as a table."""
    known = options_of(cls)
    if not known:
        return
    print("\n| option | default | |\n| --- | --- | --- |")
    for option in known:
        print(f"| `{option.name}` | `{spell_value(option.default)}` | {option.text} |")


def schemes() -> None:
    """Print the schemes and the targets that have kernels for them."""
    backends = llmopt.backends.known_backends().values()
    print("\n| scheme | description | targets |\n| --- | --- | --- |")
    for name, summary in SCHEMES.items():
        targets = ", ".join(f"`{b.name}`" for b in backends if name in b.schemes)
        print(f"| `{name}` | {summary} | {targets or 'none yet'} |")


def targets() -> None:
    """Print the targets with their aliases."""
    print("\n| target | alias | artifact | schemes |\n| --- | --- | --- | --- |")
    for name, backend in llmopt.backends.known_backends().items():
        also = ", ".join(f"`{a}`" for a, of in llmopt.backends.ALIASES.items() if of == name)
        schemes_ = ", ".join(f"`{scheme}`" for scheme in sorted(backend.schemes))
        print(f"| `{name}` | {also} | {backend.summary} | {schemes_} |")


def error_classes() -> list[type[errors.LlmoptError]]:
    """Return every class of the tree, as ``errors.py`` orders them."""
    found = [v for v in vars(errors).values() if isinstance(v, type)]
    return [v for v in found if issubclass(v, errors.LlmoptError)]


def error_table() -> None:
    """Print every error with its exit code and meaning."""
    print("\n| error | exit code | meaning |\n| --- | --- | --- |")
    for cls in error_classes():
        first = (inspect.getdoc(cls) or "").partition("\n")[0]
        print(f"| `{cls.__name__}` | {cls.exit_code} | {markdown(first)} |")


def families() -> None:
    """Print the model families by their ``model_type``."""
    from llmopt.models.decoder_families import DECODERS
    from llmopt.models.encoder_decoder_families import ENCODER_DECODERS
    from llmopt.models.encoder_families import ENCODERS

    print(f"\n- decoders: {', '.join(f'`{name}`' for name in DECODERS)}")
    print(f"- encoders: {', '.join(f'`{name}`' for name in ENCODERS)}")
    both = ", ".join(f"`{name}`" for name in ENCODER_DECODERS)
    targets = "`onnxruntime-cpu`, `onnxruntime-arm64`, `reference`"
    print(f"- encoder-decoder models (for {targets}): {both}")


def commands() -> dict[str, click.Context]:
    """Return the command line and each of its commands, by what a user types."""
    from llmopt.cli import app

    wide: dict[str, Any] = {"terminal_width": 78, "max_content_width": 78}
    root = click.Context(app, info_name="llmopt", **{**app.context_settings, **wide})
    contexts = {"llmopt": root}
    _add_commands(root, wide, contexts)
    return contexts


def _add_commands(
    group: click.Context, wide: dict[str, Any], contexts: dict[str, click.Context]
) -> None:
    """Add the commands of a group, and those of the groups among them."""
    assert isinstance(group.command, click.Group)
    for name in group.command.list_commands(group):
        command = group.command.get_command(group, name)
        assert command is not None
        settings = {**command.context_settings, **wide}
        context = click.Context(command, group, info_name=name, **settings)
        contexts[context.command_path] = context
        if isinstance(command, click.Group):
            _add_commands(context, wide, contexts)


def help_text(context: click.Context) -> str:
    """Return what ``--help`` prints in a terminal of 80 columns."""
    return "\n".join(line.rstrip() for line in context.get_help().splitlines())


def help_pages() -> None:
    """Print one section a command: its ``--help``."""
    for name, context in commands().items():
        print(f"\n## {name}\n\n```text\n$ {name} --help\n{help_text(context)}\n```")


def example(name: str, language: str = "python") -> None:
    """Print a file of ``docs/examples``."""
    text = (ROOT / "docs" / "examples" / name).read_text().rstrip()
    print(f"```{language}\n{text}\n```")


def results() -> None:
    """Print the table of models and targets from the last measured results."""
    rows = json.loads(RESULTS.read_text())["rows"]
    print("\n| model | target | scheme | size | error | quality | prefill or encode | decode |")
    print("| --- | --- | --- | ---: | ---: | --- | ---: | ---: |")
    for row in rows:
        cells = [row["model"], f"`{row['target']}`", row["scheme"], f"{row['size_mb']} MB"]
        cells += [f"{row['error_rel']:.0e}", row["quality"], row["prefill"], row["decode"]]
        print("| " + " | ".join(cells) + " |")
    workloads = list(dict.fromkeys(f"`{row['workload']}`" for row in rows))
    load = max(row["load_average"] for row in rows)
    also = f", while the machine also did other work (load average {load})" if load > 2.5 else ""
    print(f"\nTokens per second, {rows[0]['machine']}, {' and '.join(workloads)}{also}.")


def conformance() -> None:
    """Print the error of each target: one table each, with a row for each model."""
    rows = json.loads(CONFORMANCE.read_text())["rows"]
    for target in dict.fromkeys(row["target"] for row in rows):
        of = [row for row in rows if row["target"] == target]
        print(f"\n## {target}\n")
        schemes_ = list(dict.fromkeys(row["scheme"] for row in of))
        print(f"| model | {' | '.join(f'`{scheme}`' for scheme in schemes_)} |")
        print(f"| --- |{' ---: |' * len(schemes_)}")
        for model in dict.fromkeys(row["model"] for row in of):
            cells = {r["scheme"]: _held(r) for r in of if r["model"] == model}
            print(f"| {model} | {' | '.join(cells.get(scheme, '') for scheme in schemes_)} |")


def gate() -> None:
    """Print how often the gate was right on recorded sessions, and how often live."""
    found = json.loads((GATE / "decisions.json").read_text())
    lines = [json.loads(line) for line in (GATE / "live.jsonl").read_text().splitlines()]
    goals = found["goals"]
    print("\n| case | right | goal | wrong, at most | inconclusive | median | live |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for goal in goals:
        live = [line["right"] for line in lines if line["goal"] == goal["goal"]]
        cells = [
            *(goal["goal"], f"{goal['right']:.2%}", f"{goal['wanted']:.0%}"),
            f"{goal['wrong_at_most']:.2%} / {goal['wrong_at_most_by_sessions']:.1%}",
            f"{goal['inconclusive']:.2%}",
            *(f"{goal['median_time_s']:.0f} s", f"{sum(live)} of {len(live)}"),
        ]
        print(f"| {' | '.join(cells)} |")
    machines = ", ".join(found["machines"])
    print(f"\n{goals[0]['decisions']} decisions each on {found['sessions']} sessions, {machines}.")


def matrix() -> None:
    """Print one row for each family, and the reason of every miss."""
    results = json.loads(MATRIX.read_text())
    rows = results["rows"]
    fused = [row["fused"]["attention"] for row in rows if "attention" in row.get("fused", {})]
    expected, found = sum(e for e, _ in fused), sum(min(pair) for pair in fused)
    traced = sum(row["traced"] for row in rows)
    print(
        f"\n{traced} of {len(rows)} families are traced; {found} of the {expected} attentions in "
        f"them are fused ({found / expected:.0%}).\n"
    )
    if results["missing"]:
        print(f"Not measured yet: {', '.join(results['missing'])}.\n")
    print("| family | cache | attention | norm | rotary | reference | onnxruntime-cpu | s |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        errors = [_errors(row, target) for target in ("reference", "onnxruntime-cpu")]
        counts = [_counted(row, kind) for kind in ("attention", "norm", "rotary")]
        seconds = f"{row.get('seconds', {}).get('all', 0):.0f}"
        cells = [row["family"], row.get("cache", "").split(":")[0], *counts, *errors, seconds]
        print(f"| {' | '.join(cells)} |")
    reasons = [(row["family"], reason) for row in rows for reason in _reasons(row)]
    if reasons:
        print("\n## What is missed, and why\n")
    for family, reason in reasons:
        print(f"- {family}: {reason}")


def _counted(row: dict[str, Any], kind: str) -> str:
    expected, found = row.get("fused", {}).get(kind, (0, 0))
    return f"{found} of {expected}" if expected else ""


def _errors(row: dict[str, Any], target: str) -> str:
    """Return the worst error in float32 and with ``w8``."""
    found = row.get("errors", {}).get(target, {})
    return " / ".join(f"{e:.0e}" if isinstance(e, float) else "failed" for e in found.values())


def _reasons(row: dict[str, Any]) -> list[str]:
    """Return the reason of every failure and miss, each once."""
    errors = [e for of in row.get("errors", {}).values() for e in of.values()]
    found = [
        row.get("reason", ""),
        *(e for e in errors if isinstance(e, str)),
        *row.get("misses", ()),
    ]
    if ":" in row.get("cache", ""):
        found.append(row["cache"])
    return [
        " ".join(str(reason).split()).replace("|", "\\|")
        for reason in dict.fromkeys(found)
        if reason
    ]


def _held(row: dict[str, Any]) -> str:
    """Return the worst error of a case and its tolerance."""
    if "failed" in row:
        return "failed"
    return f"{max(row['errors'].values()):.0e} of {row['tolerance']:.0e}"
