"""llmopt bundle: from artifacts to a file and back, and every other command on such a file."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.signers import Signer, signer
from support.tiny_artifacts import TinyDecoder, rewrite_manifest


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def alice(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return signer(tmp_path_factory.mktemp("keys"), "alice")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Artifacts of one model for x86-64 and arm64."""
    root = tmp_path_factory.mktemp("pair")
    folders = [TinyDecoder().write(root / name) for name in ("x86", "arm")]
    rewrite_manifest(folders[1], target="onnxruntime-arm64")
    return folders


@pytest.fixture(scope="module")
def made(llmopt: Any, pair: list[Path]) -> Path:
    """A bundle of both."""
    path = pair[0].parent / "tiny.llmopt"
    result = llmopt("bundle", "create", *pair, "-o", path, "--license", "MIT")
    assert result.exit_code == 0, result.stderr
    return path


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copyfile(made, tmp_path / made.name))


def test_create_tells_what_it_made(llmopt: Any, pair: list[Path], tmp_path: Path) -> None:
    line = ["bundle", "create", *pair, "-o", tmp_path / "x.llmopt"]
    shown = llmopt(*line)
    data = json.loads(llmopt(*line, "--json", "--force").stdout)

    assert "variants  onnxruntime-cpu, onnxruntime-arm64" in shown.stdout
    assert " shared" in shown.stdout
    assert "no licence is named for the model" in shown.stderr
    assert "Next: llmopt bundle sign" in shown.stderr
    assert [each["name"] for each in data["variants"]] == ["onnxruntime-cpu", "onnxruntime-arm64"]
    assert data["size_bytes"] == (tmp_path / "x.llmopt").stat().st_size


def test_every_command_takes_a_bundle(llmopt: Any, bundle: Path, pair: list[Path]) -> None:
    line = ["--prompt", "ab", "--max-new-tokens", 4]
    from_bundle, from_artifact = (llmopt("run", path, *line) for path in (bundle, pair[0]))
    assert from_bundle.exit_code == 0, from_bundle.stderr
    assert from_bundle.stdout == from_artifact.stdout

    found = llmopt(
        "bench", bundle, "--json", "--repetitions", 1, "--workload", "prefill=2,decode=2"
    )
    assert found.exit_code == 0, found.stderr
    assert json.loads(found.stdout)["artifacts"][0]["path"] == str(bundle)

    found = llmopt("evaluate", bundle, "--reference", bundle, "--json")
    assert found.exit_code == 0, found.stderr
    assert json.loads(found.stdout)["top1"]["value"] == 1

    assert llmopt("inspect", bundle).stdout == llmopt("bundle", "inspect", bundle).stdout


def test_inspect_shows_needs_and_what_suits_this_machine(llmopt: Any, bundle: Path) -> None:
    shown = llmopt("bundle", "inspect", bundle).stdout
    data = json.loads(llmopt("bundle", "inspect", bundle, "--json").stdout)

    lines = [line.split() for line in shown.splitlines()]
    assert lines.count(["here", "fits", "this", "machine,", "chosen"]) == 1
    assert lines.count(["here", "fits", "this", "machine"]) == 1
    assert ["licence", "MIT"] in lines
    assert data["kind"] == "bundle"
    assert data["obstacles"] == {"onnxruntime-cpu": None, "onnxruntime-arm64": None}
    assert data["taken"] in data["obstacles"]
    assert data["contents"]["licenses"] == ["MIT"]
    bom = json.loads(llmopt("bundle", "inspect", bundle, "--bom").stdout)
    assert bom["bomFormat"] == "CycloneDX"


def test_what_is_signed_is_verified_and_runs(llmopt: Any, bundle: Path, alice: Signer) -> None:
    signed = llmopt("bundle", "sign", bundle, "--private-key", alice.private)
    assert signed.exit_code == 0, signed.stderr
    shown = llmopt("bundle", "verify", bundle, "--key", alice.public)
    assert f"signed    by {alice.public}" in shown.stdout
    assert json.loads(llmopt("bundle", "verify", bundle, "--json").stdout)["signed"] is False
    assert llmopt("run", bundle, "--key", alice.public, "--prompt", "ab").exit_code == 0


def test_certificates_work_as_keys_do(llmopt: Any, bundle: Path, alice: Signer) -> None:
    line = ["--private-key", alice.private, "--certificate", alice.certificate]
    signature = bundle.with_name("other.sig")
    chain = ["--certificate-chain", alice.root]
    assert llmopt("bundle", "sign", bundle, *line, *chain, "-o", signature).exit_code == 0
    found = llmopt("bundle", "verify", bundle, *chain, "--signature", signature, "--json")
    assert json.loads(found.stdout)["signed"] is True


@pytest.mark.parametrize(
    "command",
    [
        ["bundle", "verify"],
        ["bundle", "inspect"],
        ["bundle", "unpack", "-o", "out"],
        ["bundle", "selftest"],
        ["run", "--prompt", "ab"],
        ["evaluate", "--reference", "x"],
        ["bench"],
        ["check", "--baseline", "tiny.llmopt"],
    ],
)
def test_a_signature_that_is_missing_stops_every_command(
    llmopt: Any, bundle: Path, alice: Signer, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bundle.parent)
    result = llmopt(*command, bundle, "--key", alice.public)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "not signed" in result.stderr
    assert not Path("out").exists()


def test_what_is_measured_is_what_was_signed(llmopt: Any, bundle: Path, alice: Signer) -> None:
    assert llmopt("bundle", "sign", bundle, "--private-key", alice.private).exit_code == 0
    other = bundle.with_name("other.llmopt")
    shutil.copyfile(bundle, other)
    key, quick = ["--key", alice.public], ["--workload", "prefill=2,decode=2"]

    found = llmopt("bench", bundle, *key, *quick, "--repetitions", 1, "--json")
    assert found.exit_code == 0, found.stderr
    assert json.loads(found.stdout)["artifacts"][0]["path"] == str(bundle)
    counted = ["check", bundle, *key, "--proxies", "only"]
    same = llmopt(*counted, "--baseline", bundle)
    assert same.exit_code == 0, same.stderr

    lines = (
        ["bench", bundle, other, *quick],
        [*counted, "--baseline", other, *quick],
        ["evaluate", bundle, "--reference", other],
    )
    for line in lines:
        refused = llmopt(*line, *key)
        assert refused.exit_code == 1, refused.stderr
        assert "other.llmopt: not signed" in refused.stderr
    one = llmopt("bench", bundle, other, *key, "--signature", f"{bundle}.sig")
    assert one.exit_code == 2
    assert "applies to a single bundle" in one.stderr


def test_unpack_takes_what_suits_or_is_named_or_all(
    llmopt: Any, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert llmopt("bundle", "unpack", bundle).exit_code == 0
    assert (tmp_path / "tiny.onnxruntime-cpu" / "manifest.json").is_file()
    assert llmopt("bundle", "unpack", bundle, "--variant", "onnxruntime-arm64").exit_code == 0
    assert (tmp_path / "tiny.onnxruntime-arm64" / "model.onnx").is_file()
    assert llmopt("bundle", "unpack", bundle, "--all", "-o", "both").exit_code == 0
    again = ["both/onnxruntime-cpu", "both/onnxruntime-arm64"]
    llmopt("bundle", "create", *again, "-o", "again.llmopt", "--license", "MIT")
    assert (tmp_path / "again.llmopt").read_bytes() == bundle.read_bytes()


def test_what_cannot_be_done_is_said(llmopt: Any, bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for line, code, words in (
        (["create", bundle, "-o", "x.zip"], 2, "a bundle's name ends in .llmopt"),
        (["create", tmp_path / "none", "-o", "x.llmopt"], 2, "not found"),
        (["create", bundle, "-o", "x.llmopt"], 1, "neither an artifact"),
        (["verify", tmp_path / "none.llmopt"], 2, "not found"),
        (["verify", tmp_path], 1, "Is a directory"),
        (["verify", bundle, "--signature", bundle], 2, "with either a key or a certificate chain"),
        (["sign", bundle, "--private-key", tmp_path / "none"], 2, "file not found"),
        (
            ["sign", bundle, "--private-key", bundle, "--certificate-chain", bundle],
            2,
            "needs --certificate, the signer's own",
        ),
        (["unpack", bundle, "-o", out, "--all", "--variant", "x"], 2, "mutually exclusive"),
        (["unpack", bundle, "-o", out, "--variant", "onnxruntime-cpv"], 2, "did you mean"),
        (["unpack", bundle, "-o", tmp_path], 2, "exists already"),
    ):
        result = llmopt("bundle", *line)
        assert (result.exit_code, words in result.stderr) == (code, True), result.stderr
        assert result.stderr.count("\n") == 1 or line[0] == "create"
    assert not out.exists()


def test_a_damaged_bundle_is_an_error_of_one_line(llmopt: Any, bundle: Path) -> None:
    data = bytearray(bundle.read_bytes())
    data[len(data) // 2] ^= 1
    bundle.write_bytes(data)
    for line in (
        ["bundle", "verify", bundle],
        ["run", bundle, "--prompt", "x"],
        ["inspect", bundle],
    ):
        result = llmopt(*line)
        assert result.exit_code == 1
        assert result.stderr.count("\n") == 1
        assert "damaged" in result.stderr


def test_a_selftest_that_cannot_be_carried_out_says_so_in_every_form(
    llmopt: Any, bundle: Path, alice: Signer
) -> None:
    for line, code, words in (
        ([bundle], 1, "carries no example"),
        ([bundle, "--key", alice.public], 1, "not signed"),
        ([bundle, "--key", bundle.with_name("none")], 2, "file not found"),
        ([bundle.with_name("none.llmopt")], 2, "not found"),
    ):
        result = llmopt("bundle", "selftest", *line)
        assert (result.exit_code, result.stdout) == (code, "")
        assert words in result.stderr
        asked = llmopt("bundle", "selftest", *line, "--json")
        said = json.loads(asked.stdout)
        assert (asked.exit_code, asked.stderr) == (code, result.stderr)
        assert (said["passed"], said["artifact"]) == (False, str(line[0]))
        assert words in said["error"]


def test_the_recipe_makes_the_same_bundle_again(
    llmopt: Any, bigram: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["compile", bigram, "--target", "cpu", "--quantize", "w8", "--passes", "default"]
    assert llmopt(*line, "--max-length", 32, "-o", "first").exit_code == 0
    llmopt("bundle", "create", "first", "-o", "first.llmopt")
    data = json.loads(llmopt("inspect", "first.llmopt", "--json").stdout)

    recipe = data["contents"]["variants"][0]["recipe"]
    assert (
        recipe["source"]["sha256"]
        == json.loads(Path("first/manifest.json").read_text())["source"]["digest"]
    )
    program, compile_, name, *options = shlex.split(recipe["command"])
    assert (program, compile_, name) == ("llmopt", "compile", "bigram")
    assert options[:2] == ["--target", "onnxruntime-cpu"]
    assert llmopt("compile", bigram, *options, "-o", "second").exit_code == 0
    llmopt("bundle", "create", "second", "-o", "second.llmopt")
    assert Path("first.llmopt").read_bytes() == Path("second.llmopt").read_bytes()
