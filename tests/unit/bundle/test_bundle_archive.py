"""The archive: one form, read back as it was written, and nothing else is accepted."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from backports.zstd import CompressionParameter, ZstdCompressor, compress
from support.bundles import (
    Member,
    forged,
    members_of,
    recorded,
    sealed,
    small_bundle,
    with_contents,
)

from llmopt.bundle.archive import ArchiveMember, write_archive
from llmopt.bundle.opened import open_bundle
from llmopt.errors import BundleError, LlmoptError, StorageError

Forge = Callable[[list[Member]], list[Member]]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def members(bundle: Path) -> list[Member]:
    """Those of a good bundle: contents, bill of materials, manifest, model, tokens."""
    return members_of(bundle)


def read(path: Path, place: Path) -> None:
    """Unpack every variant."""
    with open_bundle(path) as opening:
        opening.unpack({each.name: place / each.name for each in opening.contents.variants})


def refusal(path: Path, place: Path) -> str:
    """Return why a bundle is refused, whether it is checked or unpacked; one line."""
    with pytest.raises(BundleError) as unpacking:
        read(path, place)
    with pytest.raises(BundleError) as checking, open_bundle(path) as opening:
        opening.check()
    assert str(checking.value) == str(unpacking.value)
    assert "\n" not in str(unpacking.value)
    assert str(path) in str(unpacking.value)
    return unpacking.value.problem


def test_a_bundle_is_what_its_digest_says_and_unpacks(bundle: Path, tmp_path: Path) -> None:
    read(bundle, tmp_path)

    unpacked = tmp_path / "onnxruntime-cpu"
    there = {path.name: path.read_bytes() for path in unpacked.iterdir()}
    here = {path.name: path.read_bytes() for path in (bundle.parent / "artifact").iterdir()}
    del here["build-report.json"]
    assert there == here


@pytest.mark.skipif(shutil.which("zstd") is None, reason="no zstd on this machine")
def test_other_tools_read_it(bundle: Path, tmp_path: Path) -> None:
    subprocess.run(["tar", "--zstd", "-xf", bundle, "-C", tmp_path], check=True)

    assert (tmp_path / "onnxruntime-cpu" / "manifest.json").is_file()


def test_members_have_no_owner_time_or_extra_rights(bundle: Path) -> None:
    from backports.zstd import decompress

    with tarfile.open(fileobj=io.BytesIO(decompress(bundle.read_bytes()))) as tar:
        for info in tar:
            assert (info.uid, info.gid, info.mtime, info.mode) == (0, 0, 0, 0o644)
            assert (info.uname, info.gname) == ("", "")


def test_what_was_forged_without_a_change_is_accepted(
    members: list[Member], tmp_path: Path
) -> None:
    read(forged(tmp_path / "same.llmopt", members), tmp_path / "out")  # or the rest shows nothing


def instead(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> Forge:
    """Return what puts another member in the place of the last."""
    return lambda members: [*members[:-1], Member(name, members[-1].content, kind, link)]


def only(member: Member) -> Forge:
    """Return what leaves nothing else."""
    return lambda _: [member]


def a_lie(name: str) -> Forge:
    """Return what gives the last member another name, everywhere."""

    def forge(members: list[Member]) -> list[Member]:
        renamed = [*members[:-1], replace(members[-1], name=name)]
        data = json.loads(members[0].content)
        data["variants"][0]["files"]["tokens.bin"] = name
        data["members"] = recorded(renamed)
        return with_contents(renamed, **data)

    return forge


@pytest.mark.parametrize(
    ("forge", "problem"),
    [
        (instead("../out"), "expected 'onnxruntime-cpu/tokens.bin', not a file '../out'"),
        (instead("/etc/passwd"), "not a file '/etc/passwd'"),
        (instead("onnxruntime-cpu/tokens.bin", tarfile.SYMTYPE, "/etc/passwd"), "a symbolic link"),
        (instead("onnxruntime-cpu/tokens.bin", tarfile.LNKTYPE, "bundle.json"), "a link"),
        (instead("onnxruntime-cpu/tokens.bin", tarfile.CHRTYPE), "a device"),
        (instead("onnxruntime-cpu/tokens.bin", tarfile.FIFOTYPE), "a pipe"),
        (instead("onnxruntime-cpu/tokens.bin", tarfile.DIRTYPE), "a folder"),
        (instead("onnxruntime-cpu/tokens.bin", tarfile.XHDTYPE), "a member of another kind"),
        (lambda m: [*m[:-2], m[-1], m[-2]], "expected 'onnxruntime-cpu/model.bin', not"),
        (lambda m: [*m[:-1], m[-2]], "not a file 'onnxruntime-cpu/model.bin'"),
        (lambda m: [*m, m[-1]], "data follows its last member"),
        (lambda m: m[:-1], "a header is not a tar header"),
        (lambda m: m[1:], "expected 'bundle.json', not a file 'bundle.cdx.json'"),
        (lambda m: [*m[:-1], replace(m[-1], content=b"[]")], "does not match its digest"),
        (
            lambda m: [*m[:-1], replace(m[-1], content=b"[,]")],
            "has 3 bytes, not 2 as in the manifest",
        ),
        (lambda m: [*m[:-1], replace(m[-1], mode=0o4755)], "has an unexpected owner, mode or time"),
        (a_lie("../tokens.bin"), "bundle.json: members[3].path should be a path inside"),
        (a_lie("/root/tokens.bin"), "].path should be a path inside the artifact"),
        (a_lie("onnxruntime-cpu/./tokens.bin"), "tokens.bin' is not a member"),
        (a_lie("onnxruntime-cpu/model.bin"), "paths without duplicates"),
        (a_lie("onnxruntime-cpu/model.bin/x"), "paths without duplicates"),
        (a_lie("x" * 101), "short, normalized, relative paths"),
        (a_lie("a\x00b"), "a path inside the artifact"),
        (a_lie(""), "a path inside the artifact"),
        (
            lambda m: with_contents(m, members=[{"path": "a", "size_bytes": -1, "sha256": ""}]),
            "sizes and digests",
        ),
        (lambda m: with_contents(m, schema=2), "schema should be 1, the one this llmopt reads"),
        (lambda m: with_contents(m, variants=[]), "one or more, with different names"),
        (lambda m: with_contents(m, members=[]), "made of members"),
        (lambda m: [replace(m[0], content=b"[" * 100_000), *m[1:]], "not JSON"),
        (lambda m: [replace(m[0], content=b"\xff"), *m[1:]], "not UTF-8"),
        (
            lambda m: [*m[:-1], replace(m[-1], content=b"{}x", claimed=2)],
            "unexpected data in the padding",
        ),
        (only(Member("bundle.json", claimed=1 << 40)), "has 1099511627776 bytes"),
        (only(Member("bundle.json", claimed=1 << 20)), "the archive ends early"),
    ],
)
def test_nothing_but_what_the_manifest_says_is_accepted(
    members: list[Member], tmp_path: Path, forge: Forge, problem: str
) -> None:
    path = forged(tmp_path / "forged.llmopt", forge(members))

    assert problem in refusal(path, tmp_path / "deep" / "out")
    outside = {entry.name for entry in tmp_path.iterdir()} | {
        entry.name for entry in (tmp_path / "deep").glob("*")
    }
    assert outside <= {"forged.llmopt", "deep", "out"}


@pytest.mark.parametrize("name", ["..", ".hidden", "a/b", "", "a" * 62, "variant name"])
def test_a_variant_has_a_name_that_a_folder_can_have(
    members: list[Member], tmp_path: Path, name: str
) -> None:
    [variant] = json.loads(members[0].content)["variants"]
    path = forged(
        tmp_path / "x.llmopt", with_contents(members, variants=[variant | {"name": name}])
    )
    assert "name should be" in refusal(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({}, "the files of an artifact, with manifest.json"),
        ({"../../x": "onnxruntime-cpu/model.bin"}, "a path inside the artifact"),
        ({"a": "onnxruntime-cpu/model.bin", "a/b": "bundle.cdx.json"}, "paths without duplicates"),
        ({"model.bin": "bundle.cdx.json"}, "'model.bin' does not match its manifest"),
        ({"manifest.json": "bundle.cdx.json"}, "schema is missing"),
        ({"manifest.json": 3}, "should be a string"),
    ],
)
def test_a_variant_is_made_of_what_its_own_manifest_lists(
    members: list[Member], tmp_path: Path, files: dict[str, str], problem: str
) -> None:
    [variant] = json.loads(members[0].content)["variants"]
    changed = variant | {"files": variant["files"] | files if files else {}}
    path = forged(tmp_path / "x.llmopt", with_contents(members, variants=[changed]))
    assert problem in refusal(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda _: b"", "the archive ends early"),
        (lambda _: b"no zstd at all", "cannot be decompressed"),
        (lambda body: body[:-3], "the archive ends early"),
        (lambda body: body + body, "data follows its last member"),
        (lambda body: body + b"\0", "data follows its last member"),
        (lambda _: compress(bytes(4096)), "a header is not a tar header"),
    ],
)
def test_a_body_that_is_no_archive_is_refused(
    bundle: Path, tmp_path: Path, spoil: Callable[[bytes], bytes], problem: str
) -> None:
    path = sealed(tmp_path / "x.llmopt", spoil(bundle.read_bytes()[:-56]))
    assert problem in refusal(path, tmp_path / "out")


def test_decompressing_never_takes_a_large_window(tmp_path: Path) -> None:
    options: dict[int, int] = {CompressionParameter.window_log: 27}
    compressor = ZstdCompressor(options=options)
    body = compressor.compress(bytes(1 << 28), mode=ZstdCompressor.FLUSH_FRAME)

    assert "cannot be decompressed" in refusal(sealed(tmp_path / "x.llmopt", body), tmp_path / "o")


def test_sizes_that_would_fill_a_disk_are_refused(members: list[Member], tmp_path: Path) -> None:
    data = json.loads(members[0].content)
    data["members"][-1]["size_bytes"] = 1 << 50
    path = forged(tmp_path / "x.llmopt", with_contents(members, **data))

    assert "bytes claim to expand to" in refusal(path, tmp_path / "out")


def test_a_disk_without_room_is_found_out_before_anything_is_written(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(StorageError, match="bytes needed, 0 free"):
        read(bundle, tmp_path / "out")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 100])
def test_what_has_no_seal_is_no_bundle(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.llmopt").write_bytes(content)
    assert "not a bundle" in refusal(tmp_path / "x.llmopt", tmp_path / "out")


def test_what_is_not_there_or_no_file_is_an_error(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        assert words in refusal(path, tmp_path / "out")


def test_an_edited_body_does_not_have_the_digest_at_its_end(bundle: Path, tmp_path: Path) -> None:
    data = bytearray(bundle.read_bytes())
    data[100] ^= 1
    (tmp_path / "x.llmopt").write_bytes(data)
    assert "damaged: its sha256 is not" in refusal(tmp_path / "x.llmopt", tmp_path / "out")


def test_a_file_that_changes_while_it_is_bundled_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    entry = replace(ArchiveMember.of("a", b"abd"), source=tmp_path / "a")
    with pytest.raises(LlmoptError, match="changed while it was read"):
        write_archive(io.BytesIO(), [entry])


def test_a_bundle_that_changes_while_it_is_unpacked_is_noticed(
    bundle: Path, members: list[Member], tmp_path: Path
) -> None:
    """Somebody who may write to the file swaps it after its digest was compared."""
    path = tmp_path / "x.llmopt"
    shutil.copyfile(bundle, path)
    other = forged(tmp_path / "y.llmopt", members).read_bytes()  # the same in other bytes
    with open_bundle(path) as opening:
        assert hashlib.sha256(other).digest() != hashlib.sha256(path.read_bytes()).digest()
        path.write_bytes(other)
        with pytest.raises(BundleError):
            opening.unpack({"onnxruntime-cpu": tmp_path / "out"})
