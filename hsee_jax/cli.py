"""The command line: ``hsee train | eval | gate | export | info | report | data``.

Every field of `Config` is a flag. Errors are one line on standard error and exit status
2, divergence is one line and status 3. A training that SIGTERM or Ctrl-C stops ends
between two steps with a checkpoint, and status 128 + the signal's number.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from hsee_jax.base import DivergenceError, Stopped, UserError
from hsee_jax.config import PRESETS, DataConfig
from hsee_jax.fields import unknown
from hsee_jax.flags import (
    Parser,
    add_cache,
    add_options,
    config_from,
    use_cache,
)
from hsee_jax.terminal import (
    Progress,
    cost_table,
    download_bar,
    results_table,
    show,
    show_log,
    text_table,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if not words:
            raise UserError(f"command: none given; allowed are {', '.join(COMMANDS)}")
        if words[0] in ("-h", "--help"):
            print("usage: hsee COMMAND ...; hsee COMMAND --help tells its flags\n")
            for name, command in COMMANDS.items():
                print(f"  {name:8}{command.__doc__}")
            return 0
        if words[0] not in COMMANDS:
            raise unknown("command", words[0], tuple(COMMANDS))
        return COMMANDS[words[0]](words[1:]) or 0
    except UserError as error:
        print(f"hsee: {error}", file=sys.stderr)
        return 2
    except DivergenceError as error:
        print(f"hsee: {error}", file=sys.stderr)
        return 3


def _train(words: Sequence[str]) -> int | None:
    """Train a federation and write a run folder."""
    parser = Parser(
        prog="hsee train",
        description=_train.__doc__,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "preset", nargs="?", help=f"{', '.join(PRESETS)}; without one, demo"
    )
    parser.add_argument(
        "--config", type=Path, help="a config.json to start from, in place of a preset"
    )
    parser.add_argument(
        "--out", type=Path, help="the run's folder; without one, runs/PRESET-DATE"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out; --rounds may be raised, which stretches the "
        "schedule of the learning rate",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the run in --out"
    )
    several = parser.add_argument_group(
        "several processes", "found by themselves on TPU pods and in Slurm steps"
    )
    several.add_argument(
        "--coordinator", metavar="HOST:PORT", help="of the first; or auto"
    )
    several.add_argument("--num-processes", type=int, help="how many there are")
    several.add_argument("--process-id", type=int, help="which one this is, from 0")
    add_cache(parser)
    add_options(parser)
    given = vars(parser.parse(words))
    resume, overwrite = given.pop("resume", False), given.pop("overwrite", False)
    if resume and "out" not in given:
        raise UserError("out: missing; --resume needs the folder of the run")
    out = given.pop("out", None)
    name = given.get("preset", "run" if "config" in given else "demo")
    config = config_from(given, stored=out if resume else None)

    from hsee_jax import processes

    processes.join(*map(given.get, ("coordinator", "num_processes", "process_id")))
    use_cache(given)
    if out is None:
        if jax.process_count() > 1:
            raise UserError("out: missing; several processes need a folder they share")
        out = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"

    from hsee_jax import runs

    if processes.is_first():
        show_log()
    with Progress(config.run.rounds) as progress, processes.StopSignals() as signals:
        try:
            summary = runs.train(
                config,
                out,
                resume=resume,
                overwrite=overwrite,
                on_round=progress.show if processes.is_first() else lambda record: None,
                stop=signals,
            )
        except Stopped as stopped:
            print(f"hsee: {stopped}; --resume --out {out} goes on", file=sys.stderr)
            return 128 + signals.received
    if processes.is_first():
        _print_results(summary, out)
    return None


def _evaluate(words: Sequence[str]) -> None:
    """Restore a run and evaluate it on its test set."""
    parser = _run_parser("hsee eval", _evaluate.__doc__)
    _add_figures(parser, file="summary.json")
    given = _parse_run(parser, words)

    from hsee_jax import runs

    show_log()
    figures = runs.evaluate(given.run, given.checkpoint, data_dir=given.data_dir)
    if given.json:
        print(json.dumps(figures, indent=2))
    else:
        _print_results(figures, given.run)


def _gate(words: Sequence[str]) -> None:
    """Find thresholds for early exits and what they give."""
    parser = _run_parser("hsee gate", _gate.__doc__)
    _add_figures(parser, file="curve.json")
    parser.add_argument(
        "--criterion",
        default="entropy",
        help="how unsure an exit is: entropy (the default), confidence (1 minus the "
        "highest probability) or margin (1 minus its lead over the second)",
    )
    targets = {
        "offload": "at most this share is sent to the server",
        "accuracy": "at least this accuracy, at the lowest offload",
        "bytes": "at most so many bytes of features are sent, mean of a sample",
    }
    one = parser.add_argument_group(
        "a target",
        "each client's threshold meets it on the samples held out by "
        "--validation-share in training and is kept in thresholds.json; without a "
        "target there is only the curve",
    ).add_mutually_exclusive_group()
    for name, meaning in targets.items():
        one.add_argument(f"--target-{name}", type=float, help=meaning)
    parser.add_argument(
        "--batch-size", type=int, help="of the inference; the run's eval_batch_size"
    )
    parser.add_argument(
        "--out", type=Path, help="folder for the files, which are replaced; RUN/gate"
    )
    given = _parse_run(parser, words)

    from hsee_jax import gate_report, gating
    from hsee_jax.folder import check_writable
    from hsee_jax.inference import CRITERIA

    if given.criterion not in CRITERIA:
        raise unknown("criterion", given.criterion, tuple(CRITERIA))
    if given.batch_size is not None and given.batch_size < 1:
        raise UserError(
            f"batch_size: {given.batch_size} is not allowed; allowed is 1 or more"
        )
    values = {name: vars(given)[f"target_{name}"] for name in targets}
    chosen = [gating.Target(*item) for item in values.items() if item[1] is not None]
    out = given.run / "gate" if given.out is None else given.out
    check_writable(out)
    study = gating.study(
        given.run,
        criterion=given.criterion,
        which=given.checkpoint,
        data_dir=given.data_dir,
        batch_size=given.batch_size,
    )
    curve = study.curve()
    thresholds = study.thresholds(chosen[0]) if chosen else None
    gate_report.write(curve, thresholds, out)
    if given.json:
        print(json.dumps({"curve": curve, "thresholds": thresholds}, indent=2))
    else:
        for table in gate_report.tables(curve, thresholds):
            show(text_table(*table))


def _export(words: Sequence[str]) -> None:
    """Write a client's layers and exit as a folder that stands alone."""
    parser = _run_parser("hsee export", _export.__doc__)
    parser.add_argument(
        "--client", type=int, required=True, metavar="ID", help="which client"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the files; an earlier export there is replaced; "
        "RUN/export/client-ID",
    )
    given = _parse_run(parser, words)

    from hsee_jax.export import export_client

    print(export_client(given.run, given.client, which=given.checkpoint, out=given.out))


def _run_parser(prog: str, description: str | None) -> Parser:
    """The flags of a command that reads a run."""
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument(
        "--checkpoint",
        default="latest",
        help="latest, or best by mean server accuracy",
    )
    add_cache(parser)
    return parser


def _add_figures(parser: Parser, *, file: str) -> None:
    """The flags of a command that computes figures of a run from its data."""
    parser.add_argument("--data-dir", help="where the data are, if not where they were")
    parser.add_argument(
        "--json", action="store_true", help=f"print all digits, as in {file}"
    )


def _parse_run(parser: Parser, words: Sequence[str]) -> argparse.Namespace:
    given = parser.parse(words)
    use_cache(vars(given))
    if given.checkpoint not in ("latest", "best"):
        raise unknown("checkpoint", given.checkpoint, ("latest", "best"))
    return given


def _info(words: Sequence[str]) -> None:
    """What each layer of a configuration's network costs."""
    parser = Parser(
        prog="hsee info",
        description=_info.__doc__,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "preset", nargs="?", help=f"{', '.join(PRESETS)}; without one, demo"
    )
    add_cache(parser)
    add_options(parser)
    # FLOPs of the convolution itself, unless one of its other forms is asked for.
    given = {"conv": "grouped"} | vars(parser.parse(words))
    config = config_from(given)
    use_cache(given)

    from hsee_jax.experiment import build_federation, build_strategy, dataset_info_of
    from hsee_jax.model import layer_costs, layer_inputs
    from hsee_jax.traffic import sample_bytes

    federation = build_federation(config, dataset_info_of(config.data))
    boundary = build_strategy(config, federation).boundary
    crossing = [
        sample_bytes(features, federation.link, boundary)
        for features in layer_inputs(federation.model)[1:]
    ]
    show(cost_table(layer_costs(federation.model), crossing))


def _report(words: Sequence[str]) -> None:
    """Draw runs, and compare them, on one page."""
    parser = Parser(
        prog="hsee report",
        description=_report.__doc__,
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a run's folder; runs that differ in their seeds alone become one curve",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the page, the pictures and the Markdown; without one, "
        "RUN/report for one run and report for several",
    )
    parser.add_argument(
        "--tensorboard",
        type=Path,
        metavar="FOLDER",
        help="write the figures of each round there too, for TensorBoard",
    )
    given = parser.parse(words)

    from hsee_jax import report
    from hsee_jax.curves import read_curves
    from hsee_jax.tables import markdown

    curves = read_curves(given.runs)
    if given.tensorboard is not None:
        report.write_events(curves, given.tensorboard)
    alone = len(given.runs) == 1
    out = given.out or (given.runs[0] / "report" if alone else Path("report"))
    page = report.write_report(curves, out)
    print(markdown(report.results(curves)))
    print(page)


def _data(words: Sequence[str]) -> None:
    """Look for a dataset and, if it is not there, download it."""
    parser = Parser(prog="hsee data", description=_data.__doc__, allow_abbrev=False)
    fields = {item.name: item for item in dataclasses.fields(DataConfig)}
    names = ", ".join(fields["dataset"].metadata["choices"])
    parser.add_argument("dataset", help=names)
    parser.add_argument("--data-dir", help=fields["data_dir"].metadata["help"])
    parser.add_argument(
        "--labels", default="refuse", help=fields["labels"].metadata["help"]
    )
    config = DataConfig(**vars(parser.parse(words)))

    from hsee_jax.data import prepare

    with download_bar() as on_bytes:
        print(
            prepare(
                config.dataset,
                folder=config.data_dir,
                labels=config.labels,
                on_bytes=on_bytes,
            )
        )


def _print_results(figures: dict[str, Any], folder: Path) -> None:
    title = f"{folder}: test accuracy after {figures['rounds']} rounds"
    show(results_table(figures, title=title))


COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "train": _train,
    "eval": _evaluate,
    "gate": _gate,
    "export": _export,
    "info": _info,
    "report": _report,
    "data": _data,
}


def console_main() -> None:
    """The entry point of the ``hsee`` command."""
    try:
        status = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = 130
        print(
            "hsee: stopped; train --resume goes on from the last checkpoint, data from "
            "what it has",
            file=sys.stderr,
        )
    except BrokenPipeError:  # the reader of a pipe has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    raise SystemExit(status)


if __name__ == "__main__":
    console_main()
