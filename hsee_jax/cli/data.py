"""The command ``hsee data``."""

from collections.abc import Sequence

from hsee_jax.cli.arguments import parser_of
from hsee_jax.cli.terminal import download_bar
from hsee_jax.config import DataConfig
from hsee_jax.data import prepare


def data(words: Sequence[str]) -> None:
    """Find or download a dataset, and print a line about it."""
    parser, fields = parser_of("data"), DataConfig.fields()
    parser.add_argument("dataset", help=", ".join(fields["dataset"].choices))
    parser.add_argument("--data-dir", help=fields["data_dir"].help)
    parser.add_argument("--labels", default="refuse", help=fields["labels"].help)
    given = parser.parse(words)
    for name in ("dataset", "labels"):
        fields[name].checked(vars(given)[name])
    with download_bar() as on_bytes:
        line = prepare(
            given.dataset,
            folder=given.data_dir,
            labels=given.labels,
            on_bytes=on_bytes,
        )
    print(line)
