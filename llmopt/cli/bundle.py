"""``llmopt bundle``: one file for a device, that proves itself there."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmopt.cli.artifacts import opened, require_there, trust, trust_options
from llmopt.cli.progress import Progress
from llmopt.cli.text import echo_json, fields, size, table
from llmopt.errors import LlmoptError, UnknownNameError, UsageError
from llmopt.version import __version__

if TYPE_CHECKING:
    from llmopt.bundle.contents import Contents, Variant
    from llmopt.bundle.opened import Bundle

SCHEMA = 1
_path = click.Path(path_type=Path)
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
_force = click.option("--force", is_flag=True, help="Replace the output if it exists.")


@click.group("bundle")
def bundle_group() -> None:
    """Make one file of artifacts for devices, and verify it there.

    `llmopt run`, `bench`, `evaluate` and `inspect` take a bundle as they take an artifact.
    """


@bundle_group.command("create")
@click.argument("artifacts", nargs=-1, required=True, type=_path, metavar="ARTIFACT...")
@click.option(
    "-o", "--output", type=_path, required=True, metavar="FILE.llmopt", help="Where it goes."
)
@click.option(
    "--license",
    "licenses",
    multiple=True,
    metavar="SPDX",
    help="A licence of the model, as Apache-2.0. Repeatable.",
)
@click.option(
    "--license-file",
    "license_files",
    multiple=True,
    type=_path,
    metavar="FILE",
    help="The text of a licence, or a notice, to be put in. Repeatable.",
)
@_force
@_json
def create_command(artifacts: tuple[Path, ...], output: Path, **options: Any) -> None:
    """Make a bundle of one artifact or several.

    The first ARTIFACT is preferred where several suit a machine. Files that several have are
    stored once. The same artifacts are the same bytes.
    """
    if output.suffix != ".llmopt":
        raise UsageError(f"{output}: a bundle's name ends in .llmopt; choose another with -o")
    require_there(*artifacts)
    with Progress() as progress:
        progress("bundling")
        from llmopt.bundle.creating import Licensing, create

        licensing = Licensing(options["licenses"], options["license_files"])
        version = __version__
        contents = create(artifacts, output, licensing, version=version, force=options["force"])
    if options["as_json"]:
        echo_json({"schema": SCHEMA, "bundle": str(output), **_sizes(output, contents)})
    else:
        click.echo(_summary(output, contents))
    if not contents.licenses:
        click.echo("Note: it names no licence of the model; give it with --license", err=True)
    quoted = shlex.quote(str(output))
    click.echo(f"Next: llmopt bundle sign {quoted} --private-key FILE", err=True)


@bundle_group.command("verify")
@click.argument("bundle", type=_path)
@trust_options
@_json
def verify_command(bundle: Path, as_json: bool, **options: Any) -> None:  # noqa: FBT001 - click
    """Compare a bundle with its digests, and with its signature if --key is given.

    The signature comes first: nothing of a file that is not signed is parsed or decompressed.
    """
    require_there(bundle)
    asked = trust(options)
    from llmopt.bundle.opened import open_bundle

    with open_bundle(bundle, asked) as opening:
        opening.check()
        data = {"schema": SCHEMA, "bundle": str(bundle), "sha256": opening.seal.sha256}
        data |= {"signed": asked is not None, **_sizes(bundle, opening.contents)}
    if as_json:
        echo_json(data)
        return
    signed = "not looked at; give --key or --certificate-chain"
    if asked is not None:
        signed = f"by {asked.key or ', '.join(map(str, asked.certificate_chain))}"
    pairs = [("sha256", str(data["sha256"])), ("signed", signed)]
    click.echo(_summary(bundle, opening.contents, pairs))


@bundle_group.command("sign")
@click.argument("bundle", type=_path)
@click.option(
    "--private-key",
    type=_path,
    required=True,
    metavar="FILE",
    help="A key of the curve P-256, P-384 or P-521, in PEM.",
)
@click.option(
    "--certificate", type=_path, metavar="FILE", help="The certificate of that key, in PEM."
)
@click.option(
    "--certificate-chain",
    type=_path,
    multiple=True,
    metavar="FILE",
    help="Certificates between it and the root. Repeatable.",
)
@click.option("-o", "--output", type=_path, metavar="FILE", help="[default: BUNDLE.sig]")
@_force
def sign_command(bundle: Path, private_key: Path, **options: Any) -> None:
    """Write the signature of a bundle, in the format of OpenSSF's model-signing. Offline."""
    require_there(bundle)
    certificate, chain = options["certificate"], options["certificate_chain"]
    if chain and certificate is None:
        raise UsageError("--certificate-chain leads from a certificate: give --certificate too")
    from llmopt.bundle.opened import open_bundle
    from llmopt.bundle.signing import sign, signature_of

    output = options["output"] or signature_of(bundle)
    certificates = () if certificate is None else (certificate, *chain)
    with open_bundle(bundle) as opening:
        opening.check()  # what is damaged is not to be signed
    sign(bundle, output, private_key, certificates, force=options["force"])
    click.echo(f"signed {bundle}: {output}", err=True)


@bundle_group.command("unpack")
@click.argument("bundle", type=_path)
@click.option("-o", "--output", type=_path, metavar="DIR", help="[default: BUNDLE's name.VARIANT]")
@click.option("--variant", metavar="NAME", help="This one.  [default: what suits this machine]")
@click.option("--all", "every", is_flag=True, help="Every one, each in a folder in DIR.")
@trust_options
@_force
def unpack_command(bundle: Path, output: Path | None, **options: Any) -> None:
    """Make artifacts of a bundle again."""
    require_there(bundle)
    if options["every"] and options["variant"] is not None:
        raise UsageError("--all and --variant exclude each other; give one of them")
    asked = trust(options)
    from llmopt.artifact.writer import staged_folder
    from llmopt.bundle.opened import open_bundle

    with open_bundle(bundle, asked) as opening:
        chosen = _chosen(opening, options)
        names = [variant.name for variant in chosen]
        stem = bundle.with_suffix("").name
        place = output or Path(stem if options["every"] else f"{stem}.{names[0]}")
        with staged_folder(place, force=options["force"]) as staging:
            single = {names[0]: staging}
            many = {name: staging / name for name in names}
            opening.unpack(many if options["every"] else single)
    click.echo(f"unpacked {', '.join(names)} to {place}", err=True)


@bundle_group.command("inspect")
@click.argument("bundle", type=_path)
@click.option("--bom", is_flag=True, help="Print its bill of materials, CycloneDX, instead.")
@trust_options
@_json
def inspect_command(bundle: Path, bom: bool, as_json: bool, **options: Any) -> None:  # noqa: FBT001 - click
    """Show the variants of a bundle, what each needs, and what suits this machine."""
    require_there(bundle)
    asked = trust(options)
    if not bom:
        show(bundle, asked, as_json=as_json)
        return
    from llmopt.bundle.contents import BOM
    from llmopt.bundle.opened import open_bundle

    with open_bundle(bundle, asked) as opening:
        click.echo(opening.member(BOM).decode("utf-8"), nl=False)


@bundle_group.command("selftest")
@click.argument("bundle", type=_path)
@click.option("--threads", type=int, metavar="N", help="Threads.  [default: every usable core]")
@trust_options
@_json
def selftest_command(bundle: Path, threads: int | None, as_json: bool, **options: Any) -> None:  # noqa: FBT001 - click
    """Run a bundle, or an artifact, on the example that it carries and compare."""
    from llmopt.runtime.selftest import failure, selftest

    try:
        result = selftest(opened(bundle, options), threads)
    except LlmoptError as error:
        if as_json:
            echo_json(failure(bundle, error))
        raise
    if as_json:
        echo_json(result.to_json())
    else:
        click.echo(str(result))
    if not result.passed:
        raise click.exceptions.Exit(1)


def show(path: Path, asked: Any = None, *, as_json: bool) -> None:
    """Print what a bundle holds."""
    from llmopt.bundle.opened import open_bundle
    from llmopt.runtime.variants import Machine, best_of, obstacle

    with open_bundle(path, asked) as opening:
        contents, digest = opening.contents, opening.seal.sha256
    machine = Machine.here()
    why = {each.name: obstacle(each.needs, machine) for each in contents.variants}
    best = best_of(contents, machine)
    if as_json:
        about = {"schema": SCHEMA, "kind": "bundle", "path": str(path), "sha256": digest}
        taken = None if best is None else best.name
        held = {"contents": dataclasses.asdict(contents), "obstacles": why, "taken": taken}
        echo_json(about | _sizes(path, contents) | held)
        return
    licenses = ", ".join(contents.licenses) or "none named"
    click.echo(_summary(path, contents, [("licence", licenses), ("sha256", digest)]))
    for variant in contents.variants:
        here = why[variant.name] or f"suits this machine{', and is taken' * (variant is best)}"
        click.echo("\n" + fields(_described(contents, variant, here)))
    rows = [[record.path, size(record.size_bytes)] for record in contents.members]
    click.echo("\n" + table(["member", "size"], rows))


def _described(contents: Contents, variant: Variant, here: str) -> list[tuple[str, str]]:
    needs, source = variant.needs, variant.recipe.get("source", {})
    pairs = [
        ("variant", variant.name),
        ("target", variant.target),
        ("size", size(contents.size_bytes(variant))),
        ("runs on", ", ".join(needs.machines) or "any processor"),
        ("features", " ".join(needs.cpu_features)),
        ("runtime", ", ".join(filter(None, [str(needs.runtime), *needs.plugins]))),
        ("memory", f"{size(needs.memory_bytes)} at most, estimated"),
        ("here", here),
        ("made by", str(variant.recipe.get("command", ""))),
        ("made from", f"{source.get('name', '')} (sha256 {source.get('sha256', '')[:16]}…)"),
    ]
    return [pair for pair in pairs if pair[1]]


def _chosen(opening: Bundle, options: dict[str, Any]) -> list[Variant]:
    """Return the variants to unpack."""
    from llmopt.runtime.variants import Machine, choose

    contents, name = opening.contents, options["variant"]
    if options["every"] or (len(contents.variants) == 1 and name is None):
        return list(contents.variants)
    if name is None:
        return [choose(contents, Machine.here(), opening.path)]
    found = contents.variant(name)
    if found is None:
        raise UnknownNameError("variant", name, [each.name for each in contents.variants])
    return [found]


def _summary(path: Path, contents: Contents, more: list[tuple[str, str]] | None = None) -> str:
    sizes = _sizes(path, contents)
    whole = sum(contents.size_bytes(variant) for variant in contents.variants)
    shared = whole - sum(
        record.size_bytes
        for record in contents.members
        if record.path in {member for each in contents.variants for member in each.files.values()}
    )
    stored = f"{size(sizes['size_bytes'])}, of {size(whole)} unpacked"
    pairs = [
        ("bundle", str(path)),
        ("model", contents.name),
        ("size", stored + (f"; {size(shared)} shared" if shared else "")),
        ("variants", ", ".join(variant.name for variant in contents.variants)),
    ]
    return fields([*pairs, *(more or [])])


def _sizes(path: Path, contents: Contents) -> dict[str, Any]:
    return {
        "size_bytes": path.stat().st_size,
        "variants": [
            {"name": each.name, "target": each.target, "size_bytes": contents.size_bytes(each)}
            for each in contents.variants
        ],
        "members": len(contents.members),
    }
