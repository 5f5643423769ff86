"""The command ``hsee export``."""

from collections.abc import Sequence
from pathlib import Path

from hsee_jax.cli.arguments import parse_run, run_parser
from hsee_jax.deployment.export import export_client


def export(words: Sequence[str]) -> None:
    """Export a client of a run, and print the folder."""
    parser = run_parser("export")
    parser.add_argument(
        "--client", type=int, required=True, metavar="ID", help="id of the client"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder to write (RUN/export/client-ID); an earlier export there is "
        "replaced",
    )
    parser.add_argument(
        "--onnx",
        action="store_true",
        help="write segment.onnx, too, and a program that takes part in a run with it "
        "on a device without JAX",
    )
    given = parse_run(parser, words)
    folder = export_client(
        given.run,
        given.client,
        which=given.checkpoint,
        out=given.out,
        onnx=given.onnx,
    )
    print(folder)
