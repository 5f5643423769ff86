"""X.509 certificates of a CA, and of the server and the clients that it signs for.

All keys are of the curve P-256, which gRPC supports everywhere.
"""

import datetime
import ipaddress
from collections.abc import Sequence
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hsee_jax.core.errors import UserError

_SKEW = datetime.timedelta(hours=1)  # by which the clock of a device may be slow
_USES = (
    "digital_signature content_commitment key_encipherment data_encipherment "
    "key_agreement key_cert_sign crl_sign encipher_only decipher_only"
).split()


class Identity(NamedTuple):
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


class Validity(NamedTuple):
    """The time in which a certificate is valid, both ends included."""

    begin: datetime.datetime
    end: datetime.datetime


def validity(days: int) -> Validity:
    """Return the validity of a certificate from now on, with room for slow clocks."""
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    return Validity(now - _SKEW, now + datetime.timedelta(days=days))


def days_left(certificate: x509.Certificate) -> int:
    """Return how many whole days a certificate is still valid, or a number below 0."""
    return (certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)).days


def new_key() -> ec.EllipticCurvePrivateKey:
    """Draw a private key."""
    return ec.generate_private_key(ec.SECP256R1())


def new_authority(
    key: ec.EllipticCurvePrivateKey, period: Validity
) -> x509.Certificate:
    """Return the certificate of a CA, signed with the CA's own key."""
    name = _name("hsee_jax CA")
    builder = _builder(name, name, key.public_key(), period)
    return (
        builder.add_extension(x509.BasicConstraints(True, 0), critical=True)
        .add_extension(_only("key_cert_sign", "crl_sign"), critical=True)
        .sign(key, hashes.SHA256())
    )


def issue(
    authority: Identity,
    subject: str,
    period: Validity,
    hosts: Sequence[x509.GeneralName] = (),
) -> Identity:
    """Issue a certificate, with a new key.

    Args:
      authority: the CA, which signs.
      subject: the common name.
      period: when the certificate is valid.
      hosts: names and addresses of a server; the certificate of a client has none, and
        cannot be used by a server.
    """
    key, signer = new_key(), authority.key.public_key()
    use = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
    issuer = authority.certificate.subject
    builder = _builder(_name(subject), issuer, key.public_key(), period)
    builder = (
        builder.add_extension(x509.BasicConstraints(False, None), critical=True)
        .add_extension(_only("digital_signature"), critical=True)
        .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False
        )
    )
    if hosts:
        names = x509.SubjectAlternativeName(hosts)
        builder = builder.add_extension(names, critical=False)
    return Identity(builder.sign(authority.key, hashes.SHA256()), key)


def host_name(host: str) -> x509.GeneralName:
    """Return a host's name or address in the form of a certificate.

    Raises:
      UserError: the text is neither a name nor an address.
    """
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    labels = host.removeprefix("*.").split(".")
    if host.isascii() and all(
        label.replace("-", "").replace("_", "").isalnum() for label in labels
    ):
        return x509.DNSName(host)
    raise UserError(
        f"host: {host!r} is not allowed; allowed is a name such as server.example.org "
        "or an address such as 192.0.2.7, without a port"
    )


def hosts_of(certificate: x509.Certificate) -> list[x509.GeneralName]:
    """Return the names and addresses in the certificate of a server.

    Raises:
      x509.ExtensionNotFound: the certificate names no host.
    """
    extension = certificate.extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    return list(extension.value)


def pem(certificate: x509.Certificate) -> bytes:
    """Return a certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def pem_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key as PEM, without a password."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def check_pair(certificate: bytes, key: bytes) -> None:
    """Refuse a key in PEM that is not the one of a certificate in PEM.

    Raises:
      ValueError: it is another key, or one of the two cannot be read.
    """
    try:
        own = serialization.load_pem_private_key(key, None)
    except TypeError as error:  # it has a password
        raise ValueError(str(error)) from error
    if x509.load_pem_x509_certificate(certificate).public_key() != own.public_key():
        raise ValueError("the key is not that of the certificate")


def read_key(content: bytes) -> ec.EllipticCurvePrivateKey:
    """Read a private key from PEM.

    Raises:
      ValueError: it is not a private key of an elliptic curve, or has a password.
    """
    try:
        key = serialization.load_pem_private_key(content, None)
    except TypeError as error:
        raise ValueError(str(error)) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("not a key of an elliptic curve")
    return key


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    period: Validity,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(period.begin)
        .not_valid_after(period.end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _only(*uses: str) -> x509.KeyUsage:
    """Allow some uses of a key, and no others."""
    return x509.KeyUsage(**{use: use in uses for use in _USES})
