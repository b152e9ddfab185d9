"""Detached signatures of bundles, in the format of OpenSSF's model-signing, without a network.

The signature of ``x.llmopt`` is ``x.llmopt.sig`` next to it: a Sigstore bundle whose in-toto
statement has the sha256 of the entire file. ``model_signing verify key x.llmopt`` reads it too.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from llmopt.artifact.writer import check_destination, staged_file
from llmopt.errors import BackendUnavailableError, SignatureError, UsageError

AnyPath = str | os.PathLike[str]
SUFFIX: Final = ".sig"
_INSTALL: Final = "it is not installed; pip install 'llmopt[sign]'"
_BAD_FILE: Final = (ValueError, TypeError, KeyError, IndexError, AttributeError)
"""Exceptions of the library for an invalid key, certificate or signature."""

_LONGEST: Final = 160


@dataclass(frozen=True)
class Trust:
    """The signer that a bundle must have.

    Args:
        key: Public key, PEM, on the curve P-256, P-384 or P-521.
        certificate_chain: Certificates, PEM, that the signer's must chain to; excludes ``key``.
        signature: Path of the signature; next to the bundle by default.

    Raises:
        UsageError: There are both or neither, or a file does not exist.
    """

    key: Path | None = None
    certificate_chain: tuple[Path, ...] = ()
    signature: Path | None = None

    def __post_init__(self) -> None:
        """Check that there is a key or a chain, and that their files exist."""
        if (self.key is None) == (not self.certificate_chain):
            raise UsageError("verify a signature with either a key or a certificate chain")
        require_files(*filter(None, [self.key]), *self.certificate_chain)


def trust_of(
    key: AnyPath | None,
    certificate_chain: Sequence[AnyPath] = (),
    signature: AnyPath | None = None,
) -> Trust | None:
    """Return the required signer; None if no signature is required.

    Raises:
        UsageError: A signature has no key or chain to verify it, or a file does not exist.
    """
    if key is None and not certificate_chain and signature is None:
        return None
    return Trust(
        None if key is None else Path(key),
        tuple(map(Path, certificate_chain)),
        None if signature is None else Path(signature),
    )


def signature_of(bundle: Path) -> Path:
    """Return the default path of the signature of a bundle.

    >>> signature_of(Path("model.llmopt")).name
    'model.llmopt.sig'
    """
    return bundle.with_name(bundle.name + SUFFIX)


def require_signed(bundle: Path, sha256: str, trust: Trust) -> None:
    """Raise unless the required signer has signed a bundle with this digest.

    The bundle is not read: the digest is what is verified.

    Args:
        bundle: Path of the bundle.
        sha256: Digest of the entire file, in hex.
        trust: Required signer.

    Raises:
        SignatureError: The signature is missing, by another signer, or of another file.
        UsageError: The key or the certificates are unusable.
        BackendUnavailableError: The library for signatures is not installed.
    """
    signature = trust.signature or signature_of(bundle)
    if not signature.is_file():
        raise SignatureError(bundle, f"not signed: {signature} does not exist")
    verifying = _library().verifying.Config()
    with _usage(trust.key or trust.certificate_chain[0]):
        if trust.key is not None:
            verifying.use_elliptic_key_verifier(public_key=trust.key)
        else:
            verifying.use_certificate_verifier(certificate_chain=trust.certificate_chain)
    verifying.set_hashing_config(_KnownDigest(sha256))
    from cryptography.exceptions import InvalidSignature
    from OpenSSL.crypto import Error, X509StoreContextError

    try:
        with contextlib.redirect_stdout(sys.stderr):  # the library prints warnings
            verifying.verify(bundle, signature)
    except (InvalidSignature, X509StoreContextError, Error) as error:
        why = str(error) or "wrong signature"
        raise SignatureError(
            bundle, f"{signature} is not by the expected signer ({why})"
        ) from error
    except (*_BAD_FILE, OSError, RecursionError) as error:
        raise SignatureError(bundle, f"{signature} {_problem(error)}") from error


def sign(
    bundle: Path,
    signature: Path,
    private_key: Path,
    certificates: Sequence[Path] = (),
    *,
    force: bool = False,
) -> None:
    """Write the signature of a bundle.

    Args:
        bundle: Path of the bundle.
        signature: Path of the signature.
        private_key: Private key on the curve P-256, P-384 or P-521, PEM, not encrypted.
        certificates: Certificate chain from the signer's to the root; none to sign with the key
            alone.
        force: Whether to replace an existing signature.

    Raises:
        UsageError: The key or a certificate is invalid, or they do not belong together.
        OutputExistsError: The signature exists, and ``force`` is off.
        StorageError: The signature cannot be written.
        BackendUnavailableError: The library for signatures is not installed.
    """
    check_destination(signature, force=force)
    require_files(private_key, *certificates)
    signing = _library().signing.Config()
    with _usage(private_key):
        if certificates:
            own, *chain = certificates
            signing.use_certificate_signer(
                private_key=private_key, signing_certificate=own, certificate_chain=chain
            )
        else:
            signing.use_elliptic_key_signer(private_key=private_key)
    with staged_file(signature, force=force) as staging:
        signing.sign(bundle, staging)


def require_files(*paths: Path) -> None:
    """Raise unless each path is a file.

    Raises:
        UsageError: A path is not a file.
    """
    for path in paths:
        if not path.is_file():
            raise UsageError(f"{path}: file not found; give a key or certificate in PEM")


class _KnownDigest:
    """Replacement for the library's hashing of files, with a known digest."""

    def __init__(self, sha256: str) -> None:
        self._sha256 = sha256

    def hash(self, model_path: Path, *, files_to_hash: object = None) -> Any:
        """Return the library's manifest of one file with this digest."""
        del files_to_hash
        library = _library()
        kind = library.manifest.SerializationType.from_args(
            {"method": "files", "hash_type": "sha256", "allow_symlinks": False}
        )
        digest = library.digest("sha256", bytes.fromhex(self._sha256))
        return library.manifest.Manifest(model_path.name, [kind.new_item(".", digest)], kind)

    def add_ignored_paths(self, *, model_path: Path, paths: object) -> None:
        """Do nothing: there is only one file."""


@dataclass(frozen=True)
class _ModelSigning:
    """The parts of model-signing that are used."""

    signing: Any
    verifying: Any
    manifest: Any
    digest: Any


def _library() -> _ModelSigning:
    if find_spec("model_signing") is None:
        raise BackendUnavailableError("model-signing", _INSTALL)
    try:
        from model_signing import manifest, signing, verifying
        from model_signing._hashing.hashing import Digest
    except ImportError as error:
        raise BackendUnavailableError("model-signing", f"{_line(error)}; {_INSTALL}") from error
    return _ModelSigning(signing, verifying, manifest, Digest)


@contextlib.contextmanager
def _usage(path: Path) -> Iterator[None]:
    """Turn the library's errors about keys and certificates into `UsageError`."""
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        yield
    except (*_BAD_FILE, UnsupportedAlgorithm) as error:
        raise UsageError(
            f"{path}: unusable ({_line(error)}); give an unencrypted key on P-256, P-384 or P-521, "
            "or certificates, in PEM"
        ) from error


def _problem(error: BaseException) -> str:
    """Return the problem of a signature, shorter than the library words it."""
    text = _line(error)
    if text.startswith("Signature mismatch"):
        return "is the signature of another file, or of this one before a change"
    if text.startswith("Key mismatch"):
        return "was made with another key"
    return f"is unusable ({text[:_LONGEST]})"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
