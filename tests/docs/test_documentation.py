"""What the code offers is in the documentation, and what the documentation shows works."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click
import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

import llmopt
from llmopt.backends import ALIASES, BACKENDS
from llmopt.backends.base import Demand
from llmopt.cli import app
from llmopt.errors import FusionError
from llmopt.fusion import fusion_report, require
from llmopt.ir import graph as g
from llmopt.ir.program import Program
from llmopt.passes.pipeline import Pipeline, Ran
from llmopt.passes.plugins import load_plugin
from llmopt.quantization.schemes import SCHEMES

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLES = DOCS / "examples"
README = DOCS.parent / "README.md"


@pytest.fixture(scope="module")
def catalogue() -> Iterator[ModuleType]:
    """The module that the pages are generated with."""
    sys.path.insert(0, str(DOCS))
    yield importlib.import_module("catalogue")
    sys.path.remove(str(DOCS))


@pytest.fixture(scope="module")
def encoder() -> llmopt.Program:
    """The tutorial's module, traced."""
    module = load("encoder").make()
    return llmopt.trace(module)


def load(name: str) -> ModuleType:
    """Return an example as a module of its own."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text()


def test_every_pass_has_a_section_with_numerics_and_limits(catalogue: ModuleType) -> None:
    sections = dict(re.findall(r"^## (\S+)\n((?:(?!^## ).*\n)*)", page("passes"), re.MULTILINE))
    for cls in catalogue.all_passes():
        assert cls.name in sections, f"{cls.name} is missing: run `make docs`"
        for label in ("Numerics", "Scope", "Leaves"):
            assert f"\n{label}\n: " in sections[cls.name], (
                f"{cls.name}: no {label} in its docstring"
            )


def test_every_option_of_a_pass_is_described() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `[^`]*` \| (.*) \|$", page("passes"), re.MULTILINE)
    assert {name for name, text in rows} >= {"bits", "block", "symmetric", "accuracy_level"}
    assert all(text for _, text in rows)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_described(scheme: str) -> None:
    assert f"| `{scheme}` |" in page("numerics")
    assert re.search(rf"^## .*`{scheme}`", page("numerics"), re.MULTILINE)


@pytest.mark.parametrize("target", [*BACKENDS, *ALIASES])
def test_every_target_is_described(target: str) -> None:
    assert f"`{target}`" in page("targets")


@pytest.mark.parametrize("target", BACKENDS)
def test_every_target_has_a_section(target: str) -> None:
    assert f"\n## {target}\n" in page("targets")


def test_every_error_is_described_with_its_exit_code(catalogue: ModuleType) -> None:
    for cls in catalogue.error_classes():
        assert f"| `{cls.__name__}` | {cls.exit_code} |" in page("errors")


def test_every_option_of_the_command_line_is_described(catalogue: ModuleType) -> None:
    sections = dict(re.findall(r"^## (.+)\n((?:(?!^## ).*\n)*)", page("cli"), re.MULTILINE))
    for name, context in catalogue.commands().items():
        for parameter in context.command.get_params(context):
            if isinstance(parameter, click.Option) and not parameter.hidden:
                assert max(parameter.opts, key=len) in sections[name], f"{name}: run `make docs`"


def test_every_page_is_current(catalogue: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    catalogue.help_pages()
    assert capsys.readouterr().out.strip() in page("cli"), "run `make docs`"


def test_every_role_at_the_edge_is_in_the_dialect() -> None:
    for name in ("input_ids", "attention_mask", "position_ids", "logits_to_keep", "logits"):
        assert f"`{name}`" in page("dialect")


def test_every_operator_with_an_invariant_is_in_the_dialect() -> None:
    from llmopt.ir.dialect import INVARIANTS

    headings = " ".join(re.findall(r"^## (.*)$", page("dialect"), re.MULTILINE))
    assert all(operator in headings for operator in INVARIANTS)


def test_every_package_and_module_is_listed_in_the_readme() -> None:
    tree = README.read_text().partition("## Where things are")[2]
    for path in Path(llmopt.__file__).parent.iterdir():
        if not path.name.startswith("_") and (
            path.suffix == ".py" or (path / "__init__.py").exists()
        ):
            name = path.name if path.is_file() else f"{path.name}/"
            assert re.search(rf"^  {re.escape(name)} ", tree, re.MULTILINE), name


def test_every_layer_of_the_import_contract_is_in_the_architecture() -> None:
    project = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())
    (contract,) = (c for c in project["tool"]["importlinter"]["contracts"] if c["id"] == "layers")
    table = page("architecture").partition("## Layers")[2]
    rows = re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
    layers = [set(layer.split(" | ")) for layer in contract["layers"] if layer != "__main__"]
    listed = [set(re.findall(r"`(\w+)`", row)) for row in rows]
    assert [layer - names for layer, names in zip(layers, listed, strict=True)] == [set()] * len(
        rows
    )


def test_links_between_pages_lead_somewhere() -> None:
    for file in [*DOCS.rglob("*.md"), README]:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", file.read_text()):
            assert (file.parent / link).exists(), f"{file.name}: {link}"


def test_the_page_of_custom_passes_shows_what_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("tiny.ir", "clamp_logits.py", "count_flops.py"):
        text = (EXAMPLES / name).read_text(encoding="utf-8")
        assert text.strip() in page("custom-passes"), "run `make docs`"
        assert sum(bool(line.strip()) for line in text.splitlines()) <= 25
        (tmp_path / name).write_text(text, encoding="utf-8")
    blocks = re.findall(r"```console\n(.*?)```", page("custom-passes"), re.DOTALL)
    shown = [part for block in blocks for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
    assert len(shown) == 9
    for part in shown:
        command, _, output = part.partition("\n")
        words = shlex.split(command)
        assert words[0] == "llmopt"

        result = CliRunner().invoke(app, words[1:], prog_name="llmopt")

        wanted = ".*".join(map(re.escape, output.split("…")))
        assert re.fullmatch(wanted, result.output, re.DOTALL), f"{command}\n{result.output}"


def test_examples_are_shown_as_they_are() -> None:
    for name, where in {
        "encoder": "tutorial",
        "means": "tutorial",
        "evaluator": "adding-a-backend",
    }.items():
        text = (EXAMPLES / f"{name}.py").read_text()
        assert text.strip() in page(where), "run `make docs`"


def test_the_pass_of_the_tutorial_fuses_what_was_missed(encoder: Program) -> None:
    known = {**llmopt.passes.known_passes(), **load_plugin(str(EXAMPLES / "means.py"))}
    reports = {}
    for text in ("default", "fuse-means,default"):
        program = encoder.clone()
        ran: list[Ran] = []
        Pipeline.parse(text, known=known).run(program, lambda *told: ran.append(told[-1]))  # noqa: B023
        reports[text] = fusion_report(program, ran)

    assert {text: report["norm"].fused for text, report in reports.items()} == {
        "default": 0,
        "fuse-means,default": 4,
    }
    with pytest.raises(FusionError, match="0 of 4"):
        require(reports["default"], ["norm=all"])


def test_the_pass_of_the_tutorial_leaves_what_is_no_mean(encoder: Program) -> None:
    program = encoder.clone()
    fuse = load_plugin(str(EXAMPLES / "means.py"))["fuse-means"]()
    for value in program.graph.initializers.values():
        if g.scalar(value) == 64.0:  # what sums are divided by
            value.const_value = ir.tensor(np.asarray(128, np.float32), name=value.name)

    outcome = fuse.run(program)

    assert "128 is not the length of the axis" in {miss.reason for miss in outcome.missed}


def test_the_module_of_the_tutorial_compiles_as_shown(tmp_path: Path) -> None:
    artifact = llmopt.compile(
        f"{EXAMPLES / 'encoder.py'}:make",
        output=tmp_path / "encoder",
        plugins=[str(EXAMPLES / "means.py")],
        passes="fuse-means,default",
        require=["norm=all", "attention=all"],
    )

    assert {kind: fused.fused for kind, fused in artifact.fusion.items()} == {
        "attention": 2,
        "norm": 4,
        "activation": 2,
    }


def test_the_backend_of_the_documentation_runs_what_it_wrote(
    encoder: Program, tmp_path: Path
) -> None:
    backend = load("evaluator").Evaluator()
    ids = np.arange(10, dtype=np.int64).reshape(2, 5)
    module = load("encoder").make()

    assert backend.check(encoder) == []
    run = backend.open(tmp_path / backend.write(encoder.clone(), tmp_path, Demand()).entry)
    found = run({"input_ids": ids, "attention_mask": np.ones_like(ids)})

    import torch

    with torch.inference_mode():
        wanted = module(torch.from_numpy(ids), torch.ones(2, 5, dtype=torch.int64)).numpy()
    np.testing.assert_allclose(next(iter(found.values())), wanted, rtol=0, atol=1e-5)
