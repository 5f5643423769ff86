"""The command ``hsee interactions``."""

import json
from collections.abc import Sequence
from pathlib import Path

from hsee_jax.cli.arguments import add_figures, parse_run, run_parser
from hsee_jax.cli.terminal import show, text_table
from hsee_jax.inference.interactions import find_interactions
from hsee_jax.nn.interactions import check_limits
from hsee_jax.report import interactions as report
from hsee_jax.runs.folder import check_writable


def interactions(words: Sequence[str]) -> None:
    """Find the interactions in a client's network; print, draw and write them."""
    parser = run_parser("interactions")
    add_figures(parser, file="interactions.json")
    parser.add_argument(
        "--client",
        type=int,
        default=0,
        metavar="ID",
        help="id of the client whose network and samples give the scores (%(default)s)",
    )
    parser.add_argument(
        "--max-order",
        type=int,
        default=2,
        help="most columns in an interaction (%(default)s)",
    )
    parser.add_argument(
        "--count",
        type=int,
        default=10,
        help="interactions of each order to choose, the strongest (%(default)s)",
    )
    parser.add_argument(
        "--max-samples",
        type=int,
        default=500,
        help="samples to score with, at most (%(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the files, which are replaced (RUN/interactions)",
    )
    given = parse_run(parser, words)
    check_limits(given.max_order, given.count)
    out = given.run / "interactions" if given.out is None else given.out
    check_writable(out)
    found = find_interactions(
        given.run,
        given.client,
        max_order=given.max_order,
        count=given.count,
        max_samples=given.max_samples,
        which=given.checkpoint,
        data_dir=given.data_dir,
    )
    path = report.write(found, out)
    if given.json:
        print(json.dumps(found.to_json(), indent=2))
        return
    show(text_table(*report.table(found)))
    print(path)
