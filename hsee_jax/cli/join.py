"""The command ``hsee join``."""

import argparse
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hsee_jax.cli.arguments import parser_of
from hsee_jax.cli.flags import Parser, add_cache, add_plugin, find_plugins, use_cache
from hsee_jax.cli.signals import StopSignals
from hsee_jax.cli.terminal import show_log
from hsee_jax.core.errors import Stopped, UserError, no_package
from hsee_jax.core.options import Option, at_least
from hsee_jax.core.paths import expand_home
from hsee_jax.parallel.processes import check_devices
from hsee_jax.runs.folder import sole_writer


def join(words: Sequence[str]) -> int | None:
    """Take part in a run as a device; return the status of a stop by a signal."""
    given = _parser(words).parse(words)
    if given.end_with_input:
        threading.Thread(target=_end_with_input, daemon=True).start()
    use_cache({name: v for name, v in vars(given).items() if v is not None})
    if given.keys is None and given.client is None:
        raise UserError("client: missing; allowed is --client ID, or --keys FOLDER")
    if given.keys is not None and given.client is not None:
        raise UserError(
            "client: is not allowed with --keys, whose certificate names the client"
        )
    try:
        from hsee_jax.deployment.rpc import connect
    except ImportError as error:
        raise no_package("join", "grpc") from error
    from hsee_jax.deployment.take_part import take_part

    patience = Option("patience", float, None, rules=(at_least(0),))
    patience.checked(given.patience)
    check_devices()
    show_log()
    state = expand_home(given.state, "state")
    keys = None if given.keys is None else expand_home(given.keys, "keys")
    data = None if given.data is None else expand_home(given.data, "data")
    with StopSignals() as signals:
        try:
            with (
                connect(
                    given.server,
                    keys,
                    given.client,
                    patience_s=given.patience,
                    stop=signals,
                ) as call,
                sole_writer(state, "state"),
            ):
                ended = take_part(
                    call,
                    state,
                    data,
                    given.plugin,
                    signals,
                    data_dir=given.data_dir,
                    private=given.keep_layers_private,
                )
        except Stopped:
            ended = False
    if ended:
        return None
    print("hsee: stopped; the same command goes on", file=sys.stderr)
    return 128 + signals.received


def _end_with_input() -> NoReturn:
    """End this process with its standard input, a pipe of the process that started it.

    However that process ends, nobody then keeps the folder of the device locked.
    """
    while os.read(0, 1024):
        pass
    print("hsee: ended with the server", file=sys.stderr, flush=True)
    os._exit(1)


def _parser(words: Sequence[str]) -> Parser:
    find_plugins(words)
    parser = parser_of("join")
    parser.add_argument("server", metavar="HOST:PORT", help="address of the server")
    parser.add_argument(
        "--state",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="where the device keeps its layers; the same command goes on from there",
    )
    parser.add_argument(
        "--keys", type=Path, metavar="FOLDER", help="keys/client-ID of hsee enroll"
    )
    parser.add_argument(
        "--client", type=int, metavar="ID", help="id of the client, without --keys"
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="the device's own samples: an npz with x and y, labels 0..K-1; without "
        "it, the device reads the run's dataset and takes its share",
    )
    parser.add_argument(
        "--data-dir",
        metavar="FOLDER",
        help="folder of the run's dataset on the device; by default $TFDS_DATA_DIR, or "
        "~/tensorflow_datasets",
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="how long to call a server that does not answer (600)",
    )
    parser.add_argument(
        "--keep-layers-private",
        action="store_true",
        help="refuse a run in which this device sends its layers to the server",
    )
    add_plugin(parser, "modules that the run may need")
    parser.add_argument(  # for `hsee serve --local`
        "--end-with-input", action="store_true", help=argparse.SUPPRESS
    )
    add_cache(parser)
    return parser
