"""``llmopt bundle``: artifacts in a single file for devices, verifiable there."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import llmopt
from llmopt.cli.artifacts import artifact_folder, require_exists, trust, trust_options
from llmopt.cli.progress import Progress
from llmopt.cli.text import echo_json, fields, size, table
from llmopt.errors import LlmoptError, UnknownNameError, UsageError

if TYPE_CHECKING:
    from llmopt.bundle.contents import Contents, Variant
    from llmopt.bundle.opened import Bundle

SCHEMA = 1
_path = click.Path(path_type=Path)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
_force = click.option("--force", is_flag=True, help="Overwrite an existing output.")


@click.group("bundle")
def bundle_group() -> None:
    """Pack artifacts into one file for devices, and verify it there.

    `llmopt run`, `bench`, `check`, `evaluate` and `inspect` accept a bundle wherever they accept
    an artifact.
    """


@bundle_group.command("create")
@click.argument("artifacts", nargs=-1, required=True, type=_path, metavar="ARTIFACT...")
@click.option(
    "-o", "--output", type=_path, required=True, metavar="FILE.llmopt", help="Bundle to write."
)
@click.option(
    "--license",
    "licenses",
    multiple=True,
    metavar="SPDX",
    help="SPDX identifier of the model's licence, such as Apache-2.0. Repeatable.",
)
@click.option(
    "--license-file",
    "license_files",
    multiple=True,
    type=_path,
    metavar="FILE",
    help="Licence or notice file to include. Repeatable.",
)
@_force
@_json
def create_command(artifacts: tuple[Path, ...], output: Path, **options: Any) -> None:
    """Create a bundle from one or more artifacts.

    If several fit a machine, the first ARTIFACT is preferred. Shared files are stored once.
    Bundles are reproducible: the same artifacts give the same bytes.
    """
    if output.suffix != ".llmopt":
        raise UsageError(f"{output}: a bundle's name ends in .llmopt; choose another with -o")
    require_exists(*artifacts)
    with Progress() as progress:
        progress("bundling")
        from llmopt.bundle.creating import Licensing, create

        licensing = Licensing(options["licenses"], options["license_files"])
        version = llmopt.__version__
        contents = create(artifacts, output, licensing, version=version, force=options["force"])
    if options["as_json"]:
        echo_json({"schema": SCHEMA, "bundle": str(output), **_sizes(output, contents)})
    else:
        click.echo(_summary(output, contents))
    if not contents.licenses:
        click.echo("Note: no licence is named for the model; add one with --license", err=True)
    quoted = shlex.quote(str(output))
    click.echo(f"Next: llmopt bundle sign {quoted} --private-key FILE", err=True)


@bundle_group.command("verify")
@click.argument("bundle", type=_path)
@trust_options
@_json
def verify_command(bundle: Path, as_json: bool, **options: Any) -> None:  # noqa: FBT001 - click
    """Verify the digests of a bundle, and its signature if --key is given.

    The signature is verified first, before anything is parsed or decompressed.
    """
    require_exists(bundle)
    signer = trust(options)
    from llmopt.bundle.opened import open_bundle

    with open_bundle(bundle, signer) as opening:
        opening.check()
        data = {"schema": SCHEMA, "bundle": str(bundle), "sha256": opening.seal.sha256}
        data |= {"signed": signer is not None, **_sizes(bundle, opening.contents)}
    if as_json:
        echo_json(data)
        return
    signed = "not verified; give --key or --certificate-chain"
    if signer is not None:
        signed = f"by {signer.key or ', '.join(map(str, signer.certificate_chain))}"
    pairs = [("sha256", str(data["sha256"])), ("signed", signed)]
    click.echo(_summary(bundle, opening.contents, pairs))


@bundle_group.command("sign")
@click.argument("bundle", type=_path)
@click.option(
    "--private-key",
    type=_path,
    required=True,
    metavar="FILE",
    help="Private key on the curve P-256, P-384 or P-521, as PEM.",
)
@click.option("--certificate", type=_path, metavar="FILE", help="Certificate of that key, as PEM.")
@click.option(
    "--certificate-chain",
    type=_path,
    multiple=True,
    metavar="FILE",
    help="Intermediate certificates up to the root. Repeatable.",
)
@click.option("-o", "--output", type=_path, metavar="FILE", help="Output.  [default: BUNDLE.sig]")
@_force
def sign_command(bundle: Path, private_key: Path, **options: Any) -> None:
    """Sign a bundle offline, in the format of OpenSSF's model-signing."""
    require_exists(bundle)
    certificate, chain = options["certificate"], options["certificate_chain"]
    if chain and certificate is None:
        raise UsageError("--certificate-chain needs --certificate, the signer's own")
    from llmopt.bundle.opened import open_bundle
    from llmopt.bundle.signing import sign, signature_of

    output = options["output"] or signature_of(bundle)
    certificates = () if certificate is None else (certificate, *chain)
    with open_bundle(bundle) as opening:
        opening.check()  # never sign a damaged bundle
    sign(bundle, output, private_key, certificates, force=options["force"])
    click.echo(f"signed {bundle}: {output}", err=True)


@bundle_group.command("unpack")
@click.argument("bundle", type=_path)
@click.option(
    "-o", "--output", type=_path, metavar="DIR", help="Output.  [default: BUNDLE.VARIANT]"
)
@click.option("--variant", metavar="NAME", help="Variant.  [default: the best for this machine]")
@click.option("--all", "every", is_flag=True, help="Every variant, each in a subfolder of DIR.")
@trust_options
@_force
def unpack_command(bundle: Path, output: Path | None, **options: Any) -> None:
    """Unpack a bundle into artifacts."""
    require_exists(bundle)
    if options["every"] and options["variant"] is not None:
        raise UsageError("--all and --variant are mutually exclusive")
    signer = trust(options)
    from llmopt.artifact.writer import staged_folder
    from llmopt.bundle.opened import open_bundle

    with open_bundle(bundle, signer) as opening:
        chosen = _chosen(opening, options)
        names = [variant.name for variant in chosen]
        stem = bundle.with_suffix("").name
        target = output or Path(stem if options["every"] else f"{stem}.{names[0]}")
        with staged_folder(target, force=options["force"]) as staging:
            single = {names[0]: staging}
            each = {name: staging / name for name in names}
            opening.unpack(each if options["every"] else single)
    click.echo(f"unpacked {', '.join(names)} to {target}", err=True)


@bundle_group.command("inspect")
@click.argument("bundle", type=_path)
@click.option("--bom", is_flag=True, help="Print its bill of materials (CycloneDX) instead.")
@trust_options
@_json
def inspect_command(bundle: Path, bom: bool, as_json: bool, **options: Any) -> None:  # noqa: FBT001 - click
    """Show the variants of a bundle, their requirements, and the one for this machine."""
    require_exists(bundle)
    signer = trust(options)
    if not bom:
        show(bundle, signer, as_json=as_json)
        return
    from llmopt.bundle.contents import BOM
    from llmopt.bundle.opened import open_bundle

    with open_bundle(bundle, signer) as opening:
        click.echo(opening.member(BOM).decode("utf-8"), nl=False)


@bundle_group.command("selftest")
@click.argument("bundle", type=_path)
@click.option("--threads", type=int, metavar="N", help="Threads.  [default: all usable cores]")
@trust_options
@_json
def selftest_command(bundle: Path, threads: int | None, as_json: bool, **options: Any) -> None:  # noqa: FBT001 - click
    """Run a bundle or an artifact on its built-in example and compare the result."""
    from llmopt.runtime.selftest import failure, selftest

    try:
        result = selftest(artifact_folder(bundle, options), threads)
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


def show(path: Path, signer: Any = None, *, as_json: bool) -> None:
    """Print the contents of a bundle."""
    from llmopt.bundle.opened import open_bundle
    from llmopt.runtime.variants import Machine, best_of, obstacle

    with open_bundle(path, signer) as opening:
        contents, digest = opening.contents, opening.seal.sha256
    machine = Machine.here()
    obstacles = {each.name: obstacle(each.needs, machine) for each in contents.variants}
    best = best_of(contents, machine)
    if as_json:
        about = {"schema": SCHEMA, "kind": "bundle", "path": str(path), "sha256": digest}
        choice = {"obstacles": obstacles, "taken": None if best is None else best.name}
        listed = {"contents": dataclasses.asdict(contents)} | choice
        echo_json(about | _sizes(path, contents) | listed)
        return
    licenses = ", ".join(contents.licenses) or "none stated"
    click.echo(_summary(path, contents, [("licence", licenses), ("sha256", digest)]))
    for variant in contents.variants:
        here = obstacles[variant.name] or f"fits this machine{', chosen' * (variant is best)}"
        click.echo("\n" + fields(_described(contents, variant, here)))
    rows = [[record.path, size(record.size_bytes)] for record in contents.members]
    click.echo("\n" + table(["member", "size"], rows))


def _described(contents: Contents, variant: Variant, here: str) -> list[tuple[str, str]]:
    needs, source = variant.needs, variant.recipe.get("source", {})
    pairs = [
        ("variant", variant.name),
        ("target", variant.target),
        ("size", size(contents.size_bytes(variant))),
        ("runs on", ", ".join(needs.machines) or "any CPU"),
        ("features", " ".join(needs.cpu_features)),
        ("runtime", ", ".join(filter(None, [str(needs.runtime), *needs.plugins]))),
        ("memory", f"{size(needs.memory_bytes)} at most, estimated"),
        ("here", here),
        ("command", str(variant.recipe.get("command", ""))),
        ("compiled from", f"{source.get('name', '')} (sha256 {source.get('sha256', '')[:16]}…)"),
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
    variant = contents.variant(name)
    if variant is None:
        raise UnknownNameError("variant", name, [each.name for each in contents.variants])
    return [variant]


def _summary(path: Path, contents: Contents, more: list[tuple[str, str]] | None = None) -> str:
    sizes = _sizes(path, contents)
    unpacked = sum(contents.size_bytes(variant) for variant in contents.variants)
    shared = unpacked - sum(
        record.size_bytes
        for record in contents.members
        if record.path in {member for each in contents.variants for member in each.files.values()}
    )
    stored = f"{size(sizes['size_bytes'])}, of {size(unpacked)} unpacked"
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
