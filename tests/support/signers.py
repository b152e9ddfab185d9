"""Keys and certificates of people who sign: made anew, so that none lies about."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Signer:
    """Files of one who signs.

    Args:
        private: The private key.
        public: The public key.
        certificate: That of the key, by the root.
        root: The root's own certificate.
    """

    private: Path
    public: Path
    certificate: Path
    root: Path


def signer(folder: Path, name: str) -> Signer:
    """Write the keys and certificates of somebody, with a root of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = _certificate(f"root of {name}", root_key, f"root of {name}", root_key, ca=True)
    own = _certificate(name, key, f"root of {name}", root_key, ca=False)
    made = Signer(*(folder / f"{name}.{kind}" for kind in ("pem", "pub", "crt", "root.crt")))
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    made.private.write_bytes(private)
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    made.public.write_bytes(public)
    made.certificate.write_bytes(own.public_bytes(Encoding.PEM))
    made.root.write_bytes(root.public_bytes(Encoding.PEM))
    return made


def _certificate(
    subject: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: str,
    issuer_key: ec.EllipticCurvePrivateKey,
    *,
    ca: bool,
) -> x509.Certificate:
    start = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    names = [
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in (subject, issuer)
    ]
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "crl_sign",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(names[0])
        .issuer_name(names[1])
        .public_key(key.public_key())
        .serial_number(7 if ca else 8)
        .not_valid_before(start)
        .not_valid_after(start + dt.timedelta(days=36500))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=not ca, key_cert_sign=ca, **usage), critical=True
        )
        .sign(issuer_key, hashes.SHA256())
    )
