"""The command ``hsee gate``."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from hsee_jax.cli.arguments import add_figures, parse_run, run_parser
from hsee_jax.cli.flags import Parser, import_plugins_of
from hsee_jax.cli.terminal import show, text_table
from hsee_jax.core.errors import UserError
from hsee_jax.inference.client_study import Figures, Target
from hsee_jax.inference.criteria import CRITERIA
from hsee_jax.inference.study import Study, study
from hsee_jax.report import gate as gate_report
from hsee_jax.runs.folder import check_writable

_TARGETS = {
    "offload": "at most this share of the samples goes to the server",
    "accuracy": "at least this accuracy, at the lowest offload",
    "bytes": "at most this many bytes of features leave the client, mean of a sample",
}


def gate(words: Sequence[str]) -> None:
    """Study the gate of a run; print and write the curve and the thresholds."""
    given = parse_run(_parser(), words)
    target = _target(given)
    out = given.run / "gate" if given.out is None else given.out
    check_writable(out)
    found = study(
        given.run,
        criterion=given.criterion,
        which=given.checkpoint,
        data_dir=given.data_dir,
        batch_size=given.batch_size,
    )
    curve = found.curve()
    thresholds = None if target is None else _thresholds(found, target, curve, out)
    gate_report.write(curve, thresholds, out)
    if given.json:
        print(json.dumps({"curve": curve, "thresholds": thresholds}, indent=2))
        return
    for table in gate_report.tables(curve, thresholds):
        show(text_table(*table))


def _parser() -> Parser:
    parser = run_parser("gate")
    add_figures(parser, file="curve.json")
    parser.add_argument(
        "--criterion",
        default="entropy",
        help="measure of how unsure an exit is (entropy): "
        + "; ".join(f"{entry.name}: {entry.summary}" for entry in CRITERIA.values()),
    )
    one = parser.add_argument_group(
        "a target",
        "each client gets a threshold that meets the target on the samples held out by "
        "--validation-share in training; thresholds.json keeps the thresholds. Without "
        "a target there is only the curve",
    ).add_mutually_exclusive_group()
    for name, meaning in _TARGETS.items():
        one.add_argument(f"--target-{name}", type=float, help=meaning)
    parser.add_argument(
        "--batch-size",
        type=int,
        help="samples in a batch of the inference, at most the test set (the run's "
        "eval_batch_size)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the files, which are replaced (RUN/gate); hsee export reads "
        "the thresholds in RUN/gate alone",
    )
    return parser


def _thresholds(found: Study, target: Target, curve: Figures, out: Path) -> Figures:
    """Return the thresholds for a target; if there are none, write the curve alone."""
    try:
        return found.thresholds(target)
    except UserError as error:
        gate_report.write(curve, None, out)
        raise UserError(f"{error}; {out / 'curve.md'} has the whole curve") from error


def _target(given: argparse.Namespace) -> Target | None:
    """Check the flags of the study and return its target, if there is one.

    Raises:
      UserError: the criterion is unknown, or the target is not allowed.
    """
    import_plugins_of(given.run / "config.json")  # they may bring the criterion
    CRITERIA.entry(given.criterion)
    values = {name: vars(given)[f"target_{name}"] for name in _TARGETS}
    targets = (Target(*item) for item in values.items() if item[1] is not None)
    return next(targets, None)
