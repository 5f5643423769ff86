"""Enrol the server and the clients of a deployment: certificates and private keys.

A folder ``keys`` holds ``ca.pem`` and ``ca-key.pem``, and one folder for the server and
for each client with all that it needs: ``ca.pem``, ``certificate.pem`` and ``key.pem``.
A client's certificate has the subject ``CN=client-ID``. Only the owner of the files can
read the private keys.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from cryptography import x509

from hsee_jax.core.errors import UserError
from hsee_jax.core.options import Option, at_least
from hsee_jax.deployment.certificates import (
    Identity,
    days_left,
    host_name,
    hosts_of,
    issue,
    new_authority,
    new_key,
    pem,
    pem_key,
    read_key,
    validity,
)
from hsee_jax.deployment.credentials import CLIENT

LOCAL = ("localhost", "127.0.0.1")
_CA_DAYS = 3650


def enroll(
    folder: str | os.PathLike[str],
    *,
    clients: int,
    hosts: Sequence[str] = (),
    days: int = 365,
    renew: bool = False,
) -> list[Path]:
    """Write the certificates and private keys that a folder lacks.

    Args:
      folder: the folder of the keys. The CA that it holds signs; without one there, a
        new CA is made.
      clients: the number of clients; their ids begin at 0.
      hosts: names and addresses by which clients reach the server; without any, those
        of the certificate that the server has, or else localhost and 127.0.0.1.
      days: how many days the new certificates are valid.
      renew: replace certificates and keys that are there; the CA stays.

    Returns:
      The folders that were written, of the server and of clients.

    Raises:
      UserError: an argument is not allowed, the CA cannot sign, or a file cannot be
        read or written.
    """
    for name, value in (("clients", clients), ("days", days)):
        Option(name, int, None, rules=(at_least(1),)).checked(value)
    names = [host_name(host) for host in dict.fromkeys(hosts)]
    place = Path(folder)
    try:
        names = _hosts(place / "server", names, renew=renew)
        authority = _authority(place, days)
        subjects = ["server", *(f"client-{i}" for i in range(clients))]
        if renew:  # those of more clients, too
            older = sorted(path.name for path in place.glob("client-*/"))
            older = [name for name in older if CLIENT.fullmatch(name.encode())]
            subjects += [name for name in older if name not in subjects]
        todo = [name for name in subjects if renew or not (place / name).exists()]
        for subject in todo:
            own = names if subject == "server" else ()
            identity = issue(authority, subject, validity(days), own)
            _replace(place / subject, _files(authority, identity))
    except OSError as error:
        raise UserError(
            f"keys: {error.filename or place} cannot be read or written: "
            f"{error.strerror or error}"
        ) from error
    return [place / subject for subject in todo]


def _hosts(
    server: Path, wanted: list[x509.GeneralName], *, renew: bool
) -> list[x509.GeneralName]:
    """Return the hosts of the server's certificate, and refuse to change them."""
    if not server.exists():
        return wanted or [host_name(host) for host in LOCAL]
    path = server / "certificate.pem"
    try:
        known = hosts_of(_read_certificate(path))
    except x509.ExtensionNotFound as error:
        raise UserError(
            f"keys: {path} names no host, so it is not the certificate of a server"
        ) from error
    if wanted and set(wanted) != set(known) and not renew:
        shown = " ".join(str(name.value) for name in known)
        raise UserError(
            f"host: {server} has a certificate for {shown}; allowed are these, or "
            "--renew to replace all certificates"
        )
    return wanted or known


def _authority(folder: Path, days: int) -> Identity:
    """Read the CA of a folder; make what is missing of it, if it can sign for days."""
    path, key_path = folder / "ca.pem", folder / "ca-key.pem"
    if not path.exists() and (folder / "server").exists():
        raise UserError(
            f"keys: {path} is missing; allowed is a folder with its CA, or a new folder"
        )
    is_new = not path.exists() and not key_path.exists()
    try:
        key = new_key() if is_new else read_key(key_path.read_bytes())
    except ValueError as error:
        raise UserError(f"keys: {key_path} holds no private key: {error}") from error
    own = _read_certificate(path) if path.exists() else None
    certificate = own or new_authority(key, validity(_CA_DAYS))
    if key.public_key() != certificate.public_key():
        raise UserError(f"keys: {key_path} is not the key of {path}")
    _check_days(certificate, days)
    if is_new:
        folder.mkdir(parents=True, exist_ok=True)
        _write(key_path, pem_key(key))
    if own is None:
        _write(path, pem(certificate))
    return Identity(certificate, key)


def _check_days(ca: x509.Certificate, days: int) -> None:
    left = days_left(ca)
    end = f"{ca.not_valid_after_utc:%Y-%m-%d}"
    if left < 1:
        raise UserError(f"keys: the CA expires on {end}; allowed is a new folder")
    if days > left:
        raise UserError(
            f"days: {days} is not allowed, as the CA expires on {end}; allowed are "
            f"1..{left}"
        )


def _read_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError as error:
        raise UserError(f"keys: {path} holds no certificate: {error}") from error


def _files(authority: Identity, identity: Identity) -> Mapping[str, bytes]:
    return {
        "ca.pem": pem(authority.certificate),
        "certificate.pem": pem(identity.certificate),
        "key.pem": pem_key(identity.key),
    }


def _replace(place: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder, so that a kill leaves all of the files or none."""
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".new-") as scratch:
        new = Path(scratch, "new")
        new.mkdir(mode=0o700)
        for name, content in files.items():
            _write(new / name, content)
        if place.exists():
            place.rename(Path(scratch, "old"))
        new.rename(place)


def _write(path: Path, content: bytes) -> None:
    """Write a file that is complete as soon as it is there, readable by its owner."""
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=".new-", delete=False
    ) as file:
        file.write(content)
    Path(file.name).rename(path)
