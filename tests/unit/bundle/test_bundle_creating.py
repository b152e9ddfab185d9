"""Bundles of artifacts: the same bytes, shared files once, and a bill of what is in them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from support.bundles import VERSION, write_artifact

from llmopt.artifact.manifest import Manifest
from llmopt.bundle.bom import bill_of_materials
from llmopt.bundle.contents import BOM, Contents, Runtime, Variant
from llmopt.bundle.creating import Licensing, create
from llmopt.bundle.needs import needs_of
from llmopt.bundle.opened import open_bundle
from llmopt.errors import ArtifactError, OutputExistsError, StorageError, UsageError
from llmopt.interface.facts import ModelFacts, SourceRecord
from llmopt.interface.signature import Port, Role, Signature

FULL = Manifest(
    target="tvm-cpu{mcpu=znver4}",
    entry="model.so",
    task="generate",
    versions={"tvm": "0.27.0.post1", "llmopt": VERSION},
    source=SourceRecord("SmolLM2", "gguf", "ab" * 32),
    precision={"weights": "w4"},
    signature=Signature(
        (Port("input_ids", Role.TOKENS, "int64", ("B", "S")),),
        (Port("logits", Role.LOGITS, "float32", ("B", "K", "V")),),
    ),
    model=ModelFacts("llama", 2),
    verification={"status": "passed", "worst_error_rel": 1e-6, "cases": 9},
    quality={"kl_mean": 0.001, "text": "its own"},
    requires={"machine": "x86_64", "cpu_features": ["avx2"], "batch": 8},
)


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    """Two artifacts with equal weights and different tokens."""
    first = write_artifact(tmp_path / "a")
    return [first, write_artifact(tmp_path / "b", "onnxruntime-arm64", tokens=b"{1}")]


def contents_of(path: Path) -> Contents:
    with open_bundle(path) as opening:
        return opening.contents


def test_the_same_artifacts_are_the_same_bytes(pair: list[Path], tmp_path: Path) -> None:
    licensing = Licensing(("MIT",))
    for name in ("1", "2"):
        create(pair, tmp_path / f"{name}.llmopt", licensing, version=VERSION)
        (pair[0] / "build-report.json").write_text("another time")
        os.utime(pair[0] / "model.bin", (1, 1))
        (pair[0] / "model.bin").chmod(0o755)
    assert (tmp_path / "1.llmopt").read_bytes() == (tmp_path / "2.llmopt").read_bytes()


def test_unpacked_and_bundled_again_it_is_the_same_bytes(pair: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "1.llmopt"
    names = [each.name for each in create(pair, path, version=VERSION).variants]
    places = {name: tmp_path / "out" / name for name in names}
    with open_bundle(path) as opening:
        opening.unpack(places)
    create(list(places.values()), tmp_path / "2.llmopt", version=VERSION)
    assert path.read_bytes() == (tmp_path / "2.llmopt").read_bytes()


def test_files_that_variants_share_are_stored_once(pair: list[Path], tmp_path: Path) -> None:
    found = create(pair, tmp_path / "x.llmopt", version=VERSION)

    first, second = found.variants
    assert (first.name, second.name) == ("onnxruntime-cpu", "onnxruntime-arm64")
    assert first.files["model.bin"] == second.files["model.bin"] == "onnxruntime-cpu/model.bin"
    assert first.files["tokens.bin"] != second.files["tokens.bin"]
    paths = [record.path for record in found.members]
    assert "onnxruntime-arm64/model.bin" not in paths
    assert len(paths) == len(set(paths)) == 6


def test_one_variant_unpacks_though_another_stores_its_files(
    pair: list[Path], tmp_path: Path
) -> None:
    create(pair, tmp_path / "x.llmopt", version=VERSION)
    with open_bundle(tmp_path / "x.llmopt") as opening:
        opening.unpack({"onnxruntime-arm64": tmp_path / "out"})
    Manifest.read(tmp_path / "out").verify_files(tmp_path / "out")
    assert (tmp_path / "out/manifest.json").read_bytes() == (pair[1] / "manifest.json").read_bytes()


def test_equal_targets_get_different_names(tmp_path: Path) -> None:
    folders = [
        write_artifact(tmp_path / name, "tvm-cpu{mcpu=x}", tokens=name.encode()) for name in "ab"
    ]
    found = create(folders, tmp_path / "x.llmopt", version=VERSION)
    assert [each.name for each in found.variants] == ["tvm-cpu-mcpu-x", "tvm-cpu-mcpu-x-2"]


def test_licences_are_named_and_their_texts_put_in(pair: list[Path], tmp_path: Path) -> None:
    for name in ("NOTICE", "LICENSE"):
        (tmp_path / name).write_text(name)
    texts = (tmp_path / "NOTICE", tmp_path / "LICENSE")
    create(pair, tmp_path / "x.llmopt", Licensing(("Apache-2.0", "MIT"), texts), version=VERSION)

    with open_bundle(tmp_path / "x.llmopt") as opening:
        assert opening.contents.licenses == ("Apache-2.0", "MIT")
        assert opening.member("licenses/LICENSE") == b"LICENSE"
        assert opening.contents.members[1].path == "licenses/LICENSE"


@pytest.mark.parametrize(
    "given",
    [(("no such <name>",), ()), ((), (Path("none"),)), ((), (Path(__file__), Path(__file__)))],
)
def test_licences_that_are_none_are_refused(given: Any) -> None:
    with pytest.raises(UsageError):
        Licensing(*given)


def test_a_damaged_artifact_is_not_bundled(pair: list[Path], tmp_path: Path) -> None:
    (pair[1] / "model.bin").write_bytes(b"x" * (1 << 16))
    with pytest.raises(ArtifactError, match=r"model\.bin has sha256"):
        create(pair, tmp_path / "x.llmopt", version=VERSION)
    with pytest.raises(ArtifactError, match="no manifest"):
        create([tmp_path], tmp_path / "x.llmopt", version=VERSION)
    with pytest.raises(UsageError, match="no artifact"):
        create([], tmp_path / "x.llmopt", version=VERSION)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_paths_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = write_artifact(tmp_path / "a", **{"x" * 100: b""})
    with pytest.raises(UsageError, match="too long a path"):
        create([folder], tmp_path / "x.llmopt", version=VERSION)


def test_what_is_there_is_kept(pair: list[Path], tmp_path: Path) -> None:
    place = tmp_path / "x.llmopt"
    place.write_text("mine")
    with pytest.raises(OutputExistsError):
        create(pair, place, version=VERSION)
    assert place.read_text() == "mine"
    create(pair, place, version=VERSION, force=True)
    assert contents_of(place).name == "onnxruntime-cpu"


def test_a_full_disk_leaves_nothing(pair: list[Path], tmp_path: Path) -> None:
    code = textwrap.dedent(f"""
        import resource, signal
        from pathlib import Path
        from llmopt.bundle.creating import create
        from llmopt.errors import StorageError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        try:
            create([Path({str(pair[0])!r})], Path({str(tmp_path / "x.llmopt")!r}), version="1")
        except StorageError as error:
            print(error)
        """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "cannot be written (File too large)" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    write_artifact(tmp_path / "a", large=os.urandom(1 << 26))
    code = textwrap.dedent("""
        import signal
        from pathlib import Path
        from llmopt.bundle.creating import create
        signal.signal(signal.SIGINT, signal.default_int_handler)  # else not in the background
        while True:
            create([Path("a")], Path("x.llmopt"), version="1", force=Path("x.llmopt").exists())
        """)
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.DEVNULL
    ) as child:
        while not list(tmp_path.glob(".x.llmopt.*")):
            assert child.poll() is None
            time.sleep(0.01)
        child.send_signal(number)
        assert child.wait(60) != 0
    assert {path.name for path in tmp_path.iterdir()} <= {"a", "x.llmopt"}


def test_the_manifest_tells_what_a_machine_must_have() -> None:
    needs = needs_of(FULL)
    assert str(needs.runtime) == "apache-tvm>=0.27,<0.28"
    assert (needs.machines, needs.cpu_features) == (("x86_64",), ("avx2",))

    def runtime(target: str, **versions: str) -> Runtime:
        return needs_of(Manifest(target=target, entry="", task="", versions=versions)).runtime

    assert str(runtime("onnxruntime-arm64", onnxruntime="1.32.0")) == "onnxruntime>=1.32"
    rtx = runtime("tensorrt-rtx", tensorrt_rtx="1.7.1.116")
    assert str(rtx) == "tensorrt-rtx-cu13-bindings>=1.7.1.116,<1.7.1.117"
    assert runtime("onnxruntime-cpu", onnxruntime="absent") == Runtime("onnxruntime")
    assert runtime("somebody-else-s") == Runtime()
    openvino = needs_of(
        Manifest(target="onnxruntime-cpu{ep=auto}", entry="", task="", requires={"ep": "openvino"})
    )
    assert (openvino.plugins, openvino.machines) == (("onnxruntime-ep-openvino",), ("x86_64",))


@pytest.mark.parametrize("licenses", [[], ["Apache-2.0"], ["MIT", "Llama 3 licence"]])
def test_the_bill_of_materials_is_valid_cyclonedx(licenses: list[str]) -> None:
    variant = Variant("tvm-cpu-w4", FULL.target, FULL.task, needs_of(FULL), {})
    other = Variant(
        "raw", "other", "raw", needs_of(Manifest(target="other", entry="", task="")), {}
    )
    parts = [(variant, FULL), (other, Manifest(target="other", entry="m", task="raw"))]
    text = bill_of_materials("SmolLM2", parts, licenses, VERSION)

    bom = json.loads(text)
    assert list(schema_problems(bom)) == []
    [model, *_] = bom["components"]
    assert model["modelCard"]["modelParameters"]["task"] == "text-generation"
    assert {"type": "quality:kl_mean", "value": "0.001"} in model["modelCard"][
        "quantitativeAnalysis"
    ]["performanceMetrics"]
    assert model["pedigree"]["ancestors"][0]["hashes"][0]["content"] == "ab" * 32
    refs = [each["bom-ref"] for each in bom["components"]] + ["bundle"]
    assert sorted(each["ref"] for each in bom["dependencies"]) == sorted(refs)
    assert bill_of_materials("SmolLM2", parts, licenses, VERSION) == text
    bom["components"][0]["type"] = "poem"
    assert list(schema_problems(bom)) != []


def test_every_bundle_carries_its_bill(pair: list[Path], tmp_path: Path) -> None:
    create(pair, tmp_path / "x.llmopt", version=VERSION)
    with open_bundle(tmp_path / "x.llmopt") as opening:
        bom = json.loads(opening.member(BOM))
    files = {
        each["name"]: each["hashes"][0]["content"] for each in bom["components"][0]["components"]
    }
    assert files == {r.path: r.sha256 for r in Manifest.read(pair[0]).files}
    assert list(schema_problems(bom)) == []


def schema_problems(bom: dict[str, Any]) -> list[str]:
    """Return what CycloneDX's own schema finds wrong."""
    from jsonschema import Draft7Validator
    from referencing import Registry
    from referencing.jsonschema import DRAFT7

    folder = resources.files("cyclonedx.schema._res")
    schemas = {
        name: json.loads((folder / f"{name}.SNAPSHOT.schema.json").read_text("utf-8"))
        for name in ("bom-1.6", "spdx", "jsf-0.82")
    }
    found = [
        (f"http://cyclonedx.org/schema/{name}.SNAPSHOT.schema.json", DRAFT7.create_resource(schema))
        for name, schema in schemas.items()
    ]
    validator = Draft7Validator(schemas["bom-1.6"], registry=Registry().with_resources(found))
    return [error.message for error in validator.iter_errors(bom)]


def test_a_storage_error_names_the_place(pair: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        create(pair, tmp_path / "file" / "x.llmopt", version=VERSION)
