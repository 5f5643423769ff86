"""The command ``hsee enroll``."""

from collections.abc import Sequence
from pathlib import Path

from hsee_jax.cli.arguments import parser_of
from hsee_jax.cli.flags import Parser
from hsee_jax.core.errors import no_package
from hsee_jax.core.paths import expand_home


def enroll(words: Sequence[str]) -> None:
    """Write the certificates that are missing, and print their folders."""
    given = _parser().parse(words)
    try:
        from hsee_jax.deployment.enroll import enroll as write_keys
    except ImportError as error:
        raise no_package("enroll", "grpc") from error
    folders = write_keys(
        expand_home(given.keys, "keys"),
        clients=given.clients,
        hosts=given.host,
        days=given.days,
        renew=given.renew,
    )
    lines = list(map(str, folders)) or [f"{given.keys} lacks nothing"]
    print(*lines, sep="\n")


def _parser() -> Parser:
    parser = parser_of("enroll")
    parser.add_argument(
        "keys", type=Path, help="the folder of the keys; what it lacks is added"
    )
    parser.add_argument(
        "--clients", type=int, required=True, metavar="INT", help="number of clients"
    )
    parser.add_argument(
        "--host",
        nargs="+",
        default=(),
        metavar="NAME",
        help="names and addresses by which clients reach the server (localhost "
        "127.0.0.1)",
    )
    parser.add_argument(
        "--days",
        type=int,
        default=365,
        metavar="INT",
        help="how long new certificates are valid (365)",
    )
    parser.add_argument(
        "--renew",
        action="store_true",
        help="replace the certificates and private keys that are there, except the CA",
    )
    return parser
