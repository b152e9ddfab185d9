"""Signatures: by whom they should be, of these bytes, and looked at before anything else."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.bundles import forged, members_of, small_bundle, with_contents
from support.signers import Signer, signer

from llmopt.bundle import opened, signing
from llmopt.bundle.opened import open_bundle
from llmopt.bundle.signing import Trust, sign, signature_of, trust_of
from llmopt.errors import (
    BackendUnavailableError,
    BundleError,
    OutputExistsError,
    SignatureError,
    UsageError,
)


@pytest.fixture(scope="module")
def alice(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return signer(tmp_path_factory.mktemp("keys"), "alice")


@pytest.fixture(scope="module")
def mallory(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return signer(tmp_path_factory.mktemp("keys"), "mallory")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, alice: Signer) -> Path:
    """A bundle with alice's signature beside it."""
    path = small_bundle(tmp_path_factory.mktemp("signed"))
    sign(path, signature_of(path), alice.private)
    return path


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoiled."""
    for path in (made, signature_of(made)):
        shutil.copyfile(path, tmp_path / path.name)
    return tmp_path / made.name


@pytest.fixture
def sealed_lips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make it a failure to parse or decompress anything."""

    def archive(*_: Any) -> None:
        pytest.fail("something was decompressed before its signature was verified")

    monkeypatch.setattr(opened, "Archive", archive)


def verify(path: Path, trust: Trust) -> None:
    with open_bundle(path, trust):
        pass


def test_a_signed_bundle_opens_with_the_key_and_wherever_it_is_moved(
    bundle: Path, alice: Signer
) -> None:
    verify(bundle, Trust(alice.public))
    moved = bundle.rename(bundle.with_name("moved.llmopt"))
    verify(moved, Trust(alice.public, signature=signature_of(bundle)))


def test_the_library_s_own_verifier_takes_it(bundle: Path, alice: Signer) -> None:
    import model_signing

    config = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=alice.public)
    config.verify(bundle, signature_of(bundle))


@pytest.mark.usefixtures("sealed_lips")
def test_another_key_is_refused(bundle: Path, mallory: Signer) -> None:
    with pytest.raises(SignatureError, match="was made with another key"):
        verify(bundle, Trust(mallory.public))


@pytest.mark.usefixtures("sealed_lips")
def test_a_stripped_signature_is_refused(bundle: Path, alice: Signer) -> None:
    signature_of(bundle).unlink()
    with pytest.raises(SignatureError, match=r"not signed: .*small\.llmopt\.sig does not exist"):
        verify(bundle, Trust(alice.public))


@pytest.mark.usefixtures("sealed_lips")
def test_one_s_own_signature_with_another_s_name_on_it_is_refused(
    bundle: Path, alice: Signer, mallory: Signer
) -> None:
    signature = signature_of(bundle)
    hint = json.loads(signature.read_text())["verificationMaterial"]
    sign(bundle, signature, mallory.private, force=True)
    data = json.loads(signature.read_text()) | {"verificationMaterial": hint}
    signature.write_text(json.dumps(data))
    with pytest.raises(SignatureError, match="not by the expected signer"):
        verify(bundle, Trust(alice.public))


@pytest.mark.usefixtures("sealed_lips")
def test_an_edited_statement_is_refused(bundle: Path, alice: Signer) -> None:
    data = json.loads(signature_of(bundle).read_text())
    statement = json.loads(base64.b64decode(data["dsseEnvelope"]["payload"]))
    statement["predicate"]["resources"][0]["digest"] = "0" * 64
    payload = base64.b64encode(json.dumps(statement).encode()).decode()
    data["dsseEnvelope"]["payload"] = payload
    signature_of(bundle).write_text(json.dumps(data))
    with pytest.raises(SignatureError, match="not by the expected signer"):
        verify(bundle, Trust(alice.public))


@pytest.mark.parametrize("keep_seal", [True, False])
@pytest.mark.usefixtures("sealed_lips")
def test_an_edited_bundle_is_refused_even_if_its_digests_fit(
    bundle: Path, alice: Signer, keep_seal: bool
) -> None:
    if keep_seal:
        data = bytearray(bundle.read_bytes())
        data[40] ^= 1
        bundle.write_bytes(data)
    else:
        forged(bundle, with_contents(members_of(bundle), name="another"))
    with pytest.raises(SignatureError, match="of another file, or of this one before"):
        verify(bundle, Trust(alice.public))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[]",
        "nonsense",
        "[" * 100_000,
        '{"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json"}',
    ],
)
@pytest.mark.usefixtures("sealed_lips")
def test_a_signature_that_is_none_is_refused(bundle: Path, alice: Signer, content: str) -> None:
    signature_of(bundle).write_text(content)
    for trust in (Trust(alice.public), Trust(certificate_chain=(alice.root,))):
        with pytest.raises(SignatureError) as refused:
            verify(bundle, trust)
        assert "\n" not in str(refused.value)


def test_a_certificate_that_leads_to_the_root_is_accepted(bundle: Path, alice: Signer) -> None:
    chain = [alice.certificate, alice.root]
    sign(bundle, signature_of(bundle), alice.private, chain, force=True)
    verify(bundle, Trust(certificate_chain=(alice.root,)))


@pytest.mark.usefixtures("sealed_lips")
def test_a_certificate_of_another_root_is_refused(
    bundle: Path, alice: Signer, mallory: Signer
) -> None:
    chain = [mallory.certificate, mallory.root]
    sign(bundle, signature_of(bundle), mallory.private, chain, force=True)
    with pytest.raises(SignatureError, match="not by the expected signer"):
        verify(bundle, Trust(certificate_chain=(alice.root,)))


def test_a_key_is_signed_with_once(bundle: Path, alice: Signer) -> None:
    with pytest.raises(OutputExistsError):
        sign(bundle, signature_of(bundle), alice.private)


def test_keys_that_cannot_be_used_are_errors_of_the_request(
    bundle: Path, alice: Signer, mallory: Signer, tmp_path: Path
) -> None:
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    rsa_key = rsa.generate_private_key(65537, 2048).public_key()
    bad = tmp_path / "bad.pub"
    for content in (
        b"",
        b"no key",
        rsa_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    ):
        bad.write_bytes(content)
        with pytest.raises(UsageError, match=r"bad\.pub: unusable"):
            verify(bundle, Trust(bad))
    place = tmp_path / "new.sig"
    for key, chain in (
        (alice.public, []),
        (alice.private, [mallory.certificate]),
        (alice.private, [alice.private]),
    ):
        with pytest.raises(UsageError, match="unusable"):
            sign(bundle, place, key, chain)
    assert not place.exists()


def test_what_is_asked_for_has_to_make_sense(alice: Signer, tmp_path: Path) -> None:
    assert trust_of(None) is None
    wrong: list[tuple[Path | None, tuple[Path, ...], Path | None]] = [
        (None, (), tmp_path / "x.sig"),
        (alice.public, (alice.root,), None),
        (tmp_path / "none.pub", (), None),
        (None, (tmp_path / "none.crt",), None),
    ]
    for given in wrong:
        with pytest.raises(UsageError):
            trust_of(*given)


def test_without_the_library_nothing_is_taken_on_trust(
    bundle: Path, alice: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signing, "find_spec", lambda _: None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'llmopt\[sign\]'"):
        verify(bundle, Trust(alice.public))
    with open_bundle(bundle):
        pass


def test_a_damaged_bundle_that_was_signed_is_still_damaged(bundle: Path, alice: Signer) -> None:
    data = bytearray(bundle.read_bytes())
    data[40] ^= 1
    bundle.write_bytes(data)
    sign(bundle, signature_of(bundle), alice.private, force=True)
    with pytest.raises(BundleError, match="its sha256 is not the one at its end"):
        verify(bundle, Trust(alice.public))
