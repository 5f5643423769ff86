"""``hsee export``."""

from collections.abc import Sequence
from pathlib import Path

from hsee_jax.cli.arguments import parse_run, run_parser
from hsee_jax.deployment.export import export_client


def export(words: Sequence[str]) -> None:
    """Export a client of a run and print the folder."""
    parser = run_parser("export")
    parser.add_argument(
        "--client", type=int, required=True, metavar="ID", help="which client"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the files, RUN/export/client-ID by default; replaces an "
        "earlier export there",
    )
    given = parse_run(parser, words)
    print(export_client(given.run, given.client, which=given.checkpoint, out=given.out))
