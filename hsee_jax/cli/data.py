"""``hsee data``."""

import dataclasses
from collections.abc import Sequence

from hsee_jax.cli.arguments import parser_of
from hsee_jax.cli.terminal import download_bar
from hsee_jax.config import DataConfig
from hsee_jax.data import prepare


def data(words: Sequence[str]) -> None:
    """Find or download a dataset and print what was found."""
    parser = parser_of("data")
    fields = {item.name: item for item in dataclasses.fields(DataConfig)}
    names = ", ".join(fields["dataset"].metadata["choices"])
    parser.add_argument("dataset", help=names)
    parser.add_argument("--data-dir", help=fields["data_dir"].metadata["help"])
    config = DataConfig(**vars(parser.parse(words)))
    with download_bar() as on_bytes:
        print(prepare(config, on_bytes))
