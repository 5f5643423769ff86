"""The command ``hsee refit``."""

import json
from collections.abc import Sequence
from pathlib import Path

from hsee_jax.cli.arguments import add_figures, parse_run, run_parser
from hsee_jax.cli.terminal import show, text_table
from hsee_jax.federation.ridge import RIDGE
from hsee_jax.runs.refit import Refit
from hsee_jax.runs.refit import refit as refit_run

_COLUMNS = (
    "client",
    "cut",
    "fitted to clients",
    "samples",
    "accuracy",
    "after",
    "loss",
    "after",
)


def refit(words: Sequence[str]) -> None:
    """Fit the exits of a run; print what they score before and after."""
    parser = run_parser("refit")
    add_figures(parser, file="refit.json")
    parser.add_argument(
        "--ridge",
        type=float,
        default=RIDGE,
        help="penalty on the weights, relative to the mean variance of a feature "
        "(%(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="new folder for the run with the new exits (RUN/refit); RUN itself stays "
        "as it is",
    )
    given = parse_run(parser, words)
    out = given.run / "refit" if given.out is None else given.out
    found = refit_run(
        given.run,
        out,
        ridge=given.ridge,
        which=given.checkpoint,
        data_dir=given.data_dir,
    )
    if given.json:
        print(json.dumps(found.to_json(), indent=2))
        return
    _print(found, out)


def _print(found: Refit, out: Path) -> None:
    """Print a row for each client, the means, the bytes and the folder."""
    fits = {i: fit for fit in found.exits for i in fit.clients}
    rows = []
    for old, new in zip(found.before.clients, found.after.clients, strict=True):
        fit = fits.get(old.id)
        rows.append(
            [
                str(old.id),
                str(old.cut),
                "0" if fit is None else str(len(fit.senders)),
                "0" if fit is None else f"{fit.samples:,}",
                f"{old.exit_accuracy:.4f}",
                f"{new.exit_accuracy:.4f}",
                f"{old.exit_loss:.3f}",
                f"{new.exit_loss:.3f}",
            ]
        )
    means = found.before.mean_exit_accuracy, found.after.mean_exit_accuracy
    rows.append(["mean", "", "", "", *(f"{mean:.4f}" for mean in means), "", ""])
    show(text_table("exits on the test samples, before and after", _COLUMNS, rows))
    up, down = found.link
    print(f"bytes sent once: {up:,} up, {down:,} down, over all clients")
    print(out)
