"""The command ``hsee export``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hsee_jax.cli.arguments import parse_run, run_parser
from hsee_jax.cli.flags import add_plugin
from hsee_jax.core.errors import UserError
from hsee_jax.deployment.box import is_device
from hsee_jax.deployment.export import export_client, export_device
from hsee_jax.nn.gates import WIDTHS


def export(words: Sequence[str]) -> None:
    """Export a client of a run, and print the folder."""
    parser = run_parser("export")
    parser.add_argument(
        "--client",
        type=int,
        metavar="ID",
        help="id of the client; not needed for the folder of a device (--state of hsee "
        "join), which has one client",
    )
    add_plugin(parser, "modules that the run of a device needs")
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
    parser.add_argument(
        "--width",
        choices=WIDTHS,
        default="dense",
        help="in a run with --width-target: dense has all channels, gated only the "
        "channels whose gates are open (dense)",
    )
    given = parse_run(parser, words)
    if is_device(given.run):
        _check_device(given)
        place = export_device(
            given.run, out=given.out, onnx=given.onnx, plugins=given.plugin
        )
    elif given.client is None:
        raise UserError("client: missing; allowed is the id of a client of the run")
    elif given.plugin:
        raise UserError("plugin: has no effect on a run, whose configuration names it")
    else:
        place = export_client(
            given.run,
            given.client,
            which=given.checkpoint,
            out=given.out,
            onnx=given.onnx,
            width=given.width,
        )
    print(place)


def _check_device(given: argparse.Namespace) -> None:
    """Refuse flags that cannot be used with the folder of a device.

    Raises:
      UserError: such a flag is given.
    """
    if given.client is not None:
        raise UserError("client: is not allowed for the folder of a device")
    for name, allowed in (("width", "dense"), ("checkpoint", "latest")):
        value = getattr(given, name)
        if value != allowed:
            raise UserError(
                f"{name}: {value} is not allowed for the folder of a device; allowed "
                f"is {allowed}"
            )
