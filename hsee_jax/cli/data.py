"""The command ``hsee data``."""

import argparse
from collections.abc import Sequence

from hsee_jax.cli.arguments import parser_of
from hsee_jax.cli.flags import add_option, add_plugin, find_plugins
from hsee_jax.cli.terminal import download_bar
from hsee_jax.config import DataConfig
from hsee_jax.data import DATASETS, prepare


def data(words: Sequence[str]) -> None:
    """Find or download a dataset, and print a line about it."""
    find_plugins(words)
    parser = parser_of("data", argument_default=argparse.SUPPRESS)
    parser.add_argument("dataset", help=", ".join(DATASETS))
    parser.add_argument("--data-dir", help=DataConfig.fields()["data_dir"].help)
    add_plugin(parser, "modules that register datasets")
    for option in DATASETS.options().values():
        readers = ", ".join(DATASETS.readers(option.name))
        add_option(parser, option, f"{option.help} ({readers})")
    given = vars(parser.parse(words))
    given.pop("plugin")
    name, folder = given.pop("dataset"), given.pop("data_dir", None)
    with download_bar() as on_bytes:
        line = prepare(name, folder=folder, on_bytes=on_bytes, **given)
    print(line)
