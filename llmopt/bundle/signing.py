"""Signatures of bundles: detached, in the format of OpenSSF's model-signing, made and read offline.

The signature of ``x.llmopt`` is ``x.llmopt.sig`` beside it: a Sigstore bundle whose in-toto
statement names the sha256 of the whole file. ``model_signing verify key x.llmopt`` reads it too.
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
"""What the library raises for a key, a certificate or a signature that is none."""

_LONGEST: Final = 160


@dataclass(frozen=True)
class Trust:
    """Whose signature a bundle has to have.

    Args:
        key: A public key, PEM, of one of the curves P-256, P-384 and P-521.
        certificate_chain: Certificates, PEM, that the signer's own has to lead to; or a key.
        signature: The signature; beside the bundle if not given.

    Raises:
        UsageError: Neither or both are given, or a file is not there.
    """

    key: Path | None = None
    certificate_chain: tuple[Path, ...] = ()
    signature: Path | None = None

    def __post_init__(self) -> None:
        """Check that it says one thing."""
        if (self.key is None) == (not self.certificate_chain):
            raise UsageError("a signature is verified with a key, or else with a certificate chain")
        require_files(*filter(None, [self.key]), *self.certificate_chain)


def trust_of(
    key: AnyPath | None,
    certificate_chain: Sequence[AnyPath] = (),
    signature: AnyPath | None = None,
) -> Trust | None:
    """Return whose signature is asked for; None if nobody's.

    Raises:
        UsageError: A signature is given and nothing to verify it with, or a file is not there.
    """
    if key is None and not certificate_chain and signature is None:
        return None
    return Trust(
        None if key is None else Path(key),
        tuple(map(Path, certificate_chain)),
        None if signature is None else Path(signature),
    )


def signature_of(bundle: Path) -> Path:
    """Return where the signature of a bundle is, if nobody says otherwise.

    >>> signature_of(Path("model.llmopt")).name
    'model.llmopt.sig'
    """
    return bundle.with_name(bundle.name + SUFFIX)


def require_signed(bundle: Path, sha256: str, trust: Trust) -> None:
    """Raise unless a bundle with this digest is signed by whom it should be.

    Nothing of the bundle is read: what has this digest is what is verified.

    Args:
        bundle: The file.
        sha256: The digest of all of it, in hex.
        trust: Required signer.

    Raises:
        SignatureError: It has no signature, another one, or that of something else.
        UsageError: The key or the certificates cannot be used.
        BackendUnavailableError: What verifies signatures is not installed.
    """
    signature = trust.signature or signature_of(bundle)
    if not signature.is_file():
        raise SignatureError(bundle, f"not signed: there is no {signature}")
    verifying = _library().verifying.Config()
    with _usage(trust.key or trust.certificate_chain[0]):
        if trust.key is not None:
            verifying.use_elliptic_key_verifier(public_key=trust.key)
        else:
            verifying.use_certificate_verifier(certificate_chain=trust.certificate_chain)
    verifying.set_hashing_config(_Digested(sha256))
    from cryptography.exceptions import InvalidSignature
    from OpenSSL.crypto import Error, X509StoreContextError

    try:
        with contextlib.redirect_stdout(sys.stderr):  # the library prints warnings
            verifying.verify(bundle, signature)
    except (InvalidSignature, X509StoreContextError, Error) as error:
        why = str(error) or "the signature is wrong"
        raise SignatureError(bundle, f"{signature} is not by whom it should be ({why})") from error
    except (*_BAD_FILE, OSError, RecursionError) as error:
        raise SignatureError(bundle, f"{signature} {_why(error)}") from error


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
        bundle: The file.
        signature: Path of the signature.
        private_key: Private key on one of the curves P-256, P-384 and P-521, PEM, not encrypted.
        certificates: The signer's own and those that lead from it to the root; none to sign with
            the key alone.
        force: Replace a signature that is there.

    Raises:
        UsageError: The key or a certificate is not one, or they do not belong together.
        OutputExistsError: A signature is there, and ``force`` is off.
        StorageError: It could not be written.
        BackendUnavailableError: What signs is not installed.
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
    """Raise unless each is a file.

    Raises:
        UsageError: One is not.
    """
    for path in paths:
        if not path.is_file():
            raise UsageError(f"{path}: no such file; give a key or certificate in PEM")


class _Digested:
    """Stands for the library's hashing of files: the digest is known, of the bytes to be read."""

    def __init__(self, sha256: str) -> None:
        self._sha256 = sha256

    def hash(self, model_path: Path, *, files_to_hash: object = None) -> Any:
        """Return the library's manifest of one file with this digest."""
        del files_to_hash
        library = _library()
        made = library.manifest.SerializationType.from_args(
            {"method": "files", "hash_type": "sha256", "allow_symlinks": False}
        )
        digest = library.digest("sha256", bytes.fromhex(self._sha256))
        return library.manifest.Manifest(model_path.name, [made.new_item(".", digest)], made)

    def add_ignored_paths(self, *, model_path: Path, paths: object) -> None:
        """Do nothing: one file has nothing in it to be ignored."""


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
    """Turn what the library says of keys and certificates into an error of the request."""
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        yield
    except (*_BAD_FILE, UnsupportedAlgorithm) as error:
        raise UsageError(
            f"{path}: cannot be used ({_line(error)}); give keys of the curves P-256, P-384 or "
            "P-521, not encrypted, and certificates, all in PEM"
        ) from error


def _why(error: BaseException) -> str:
    """Return what is wrong with a signature; the library says it at length."""
    said = _line(error)
    if said.startswith("Signature mismatch"):
        return "is the signature of another file, or of this one before it was changed"
    if said.startswith("Key mismatch"):
        return "was made with another key"
    return f"cannot be used ({said[:_LONGEST]})"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
