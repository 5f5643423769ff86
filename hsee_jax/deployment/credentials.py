"""Credentials of gRPC from the folders that `hsee enroll` writes.

Both sides show a certificate of the same CA (mutual TLS). The server learns the id of
a client from the client's certificate, and never from a message.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import grpc

from hsee_jax.core.errors import UserError

CA, CERTIFICATE, KEY = "ca.pem", "certificate.pem", "key.pem"  # in each folder
CLIENT = re.compile(rb"client-(0|[1-9][0-9]{0,8})")


def server_credentials(folder: Path) -> grpc.ServerCredentials:
    """Return the credentials of a server that requires a certificate of each client.

    Args:
      folder: the server's, such as ``keys/server``.

    Raises:
      UserError: a file is missing or is not valid.
    """
    ca, certificate, key = _read(folder)
    return grpc.ssl_server_credentials(
        [(key, certificate)], root_certificates=ca, require_client_auth=True
    )


def channel_credentials(folder: Path) -> grpc.ChannelCredentials:
    """Return the credentials with which a client connects to the server.

    Args:
      folder: the client's, such as ``keys/client-0``.

    Raises:
      UserError: a file is missing or is not valid.
    """
    ca, certificate, key = _read(folder)
    return grpc.ssl_channel_credentials(ca, key, certificate)


def client_id(auth_context: Mapping[str, Sequence[bytes]]) -> int:
    """Return the id of the client that its certificate names.

    Args:
      auth_context: of the call, `grpc.ServicerContext.auth_context`.

    Raises:
      PermissionError: the peer has no certificate, or it names no client.
    """
    names = auth_context.get("x509_common_name", ())
    found = CLIENT.fullmatch(names[0]) if len(names) == 1 else None
    if found is None:
        raise PermissionError("the certificate of the peer names no client")
    return int(found[1])


def _read(folder: Path) -> tuple[bytes, bytes, bytes]:
    """Return the CA's certificate, the own certificate and its key, as PEM."""
    from hsee_jax.deployment.certificates import check_pair  # only where there are keys

    ca = _read_pem(folder / CA, b"CERTIFICATE")
    certificate = _read_pem(folder / CERTIFICATE, b"CERTIFICATE")
    key = _read_pem(folder / KEY, b"PRIVATE KEY")
    try:
        check_pair(certificate, key)
    except ValueError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"keys: {folder / KEY} is not the key of {CERTIFICATE}: {reason}; allowed "
            "is a folder that `hsee enroll` wrote"
        ) from error
    return ca, certificate, key


def _read_pem(path: Path, label: bytes) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"keys: {path} cannot be read: {error.strerror}; allowed is a folder that "
            "`hsee enroll` wrote, such as keys/server or keys/client-0"
        ) from error
    if b"-----BEGIN " + label + b"-----" not in content:
        raise UserError(
            f"keys: {path} holds no {label.decode().lower()}; allowed is a file that "
            "`hsee enroll` wrote"
        )
    return content
