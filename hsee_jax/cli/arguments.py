"""The flags that several commands share."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hsee_jax.cli.commands import COMMANDS
from hsee_jax.cli.flags import (
    Parser,
    add_cache,
    add_options,
    find_plugins,
    use_cache,
)
from hsee_jax.cli.terminal import results_table, show, show_log
from hsee_jax.config import PRESETS
from hsee_jax.parallel.processes import check_devices
from hsee_jax.report.tables import EQUAL_SERVERS
from hsee_jax.runs.folder import check_name
from hsee_jax.runs.one_network import is_one_network
from hsee_jax.runs.records import Scores


def parser_of(command: str, **options: Any) -> Parser:
    """Return the parser of a command, without flags."""
    return Parser(
        prog=f"hsee {command}",
        description=COMMANDS[command].description,
        allow_abbrev=False,
        **options,
    )


def config_parser(command: str, words: Sequence[str]) -> Parser:
    """Return the parser of a command that takes a configuration.

    A flag that is not given is not among the parsed values.

    Args:
      command: the command.
      words: the words to parse; the plugins that they name may add flags.
    """
    find_plugins(words)
    parser = parser_of(
        command,
        argument_default=argparse.SUPPRESS,
        epilog="[ours]: the paper leaves this choice open. (demo: X): the value of the "
        "preset demo. (a, b): only the networks, strategies ... of these names read "
        "the flag.",
    )
    parser.add_argument(
        "preset", nargs="?", help=f"{', '.join(PRESETS)}; demo by default"
    )
    add_cache(parser)
    add_options(parser)
    return parser


def add_run(parser: Parser, *, name: str, resume: str) -> None:
    """Add the flags of a command that trains a run in a folder.

    Args:
      parser: the command's parser.
      name: the folder's name in ``runs`` without ``--out``, for the help.
      resume: the help of ``--resume``.
    """
    parser.add_argument(
        "--config", type=Path, help="config.json to start from, instead of a preset"
    )
    parser.add_argument("--out", type=Path, help=f"folder of the run (runs/{name})")
    parser.add_argument("--resume", action="store_true", help=resume)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the run in --out"
    )


def run_parser(command: str) -> Parser:
    """Return the parser of a command that reads a run."""
    parser = parser_of(command)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument(
        "--checkpoint",
        default="latest",
        help="latest, best by mean server accuracy on the test set, or a round whose "
        "checkpoint the run has kept",
    )
    add_cache(parser)
    return parser


def add_figures(parser: Parser, *, file: str) -> None:
    """Add the flags of a command that computes figures of a run from its data."""
    parser.add_argument(
        "--data-dir", help="folder of the data, if they have moved since training"
    )
    parser.add_argument(
        "--json", action="store_true", help=f"print all digits, as in {file}"
    )


def parse_run(parser: Parser, words: Sequence[str]) -> argparse.Namespace:
    """Parse the flags of `run_parser`, set the compilation cache, and show the log.

    Raises:
      UserError: a flag is not allowed, or JAX finds no device.
    """
    given = parser.parse(words)
    check_name(given.run)
    use_cache(vars(given))
    check_devices()
    show_log()
    return given


def print_figures(rounds: int, scores: Scores, folder: Path, *, as_json: bool) -> None:
    """Print what the clients of a run score, as a table or as JSON.

    Args:
      rounds: the number of finished rounds.
      scores: the scores of the clients.
      folder: the run's folder.
      as_json: whether to print JSON.
    """
    if as_json:
        print(json.dumps({"rounds": rounds} | scores.to_json(), indent=2))
        return
    title = f"{folder}: test accuracy after {rounds} rounds"
    show(results_table(scores, title=title))
    if is_one_network(folder, scores):
        print(EQUAL_SERVERS)
