"""The command ``hsee train``."""

import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from hsee_jax.cli.arguments import add_run, config_parser, print_figures
from hsee_jax.cli.flags import Parser, use_cache
from hsee_jax.cli.link_rates import add_link_rates, config_with_link_rates
from hsee_jax.cli.plan_file import AUTO, config_with_plan, plan_now
from hsee_jax.cli.signals import StopSignals
from hsee_jax.cli.terminal import ProgressBar, show_log
from hsee_jax.core.errors import Stopped, UserError
from hsee_jax.parallel import processes
from hsee_jax.runs.callbacks import Callback
from hsee_jax.runs.folder import new_folder
from hsee_jax.runs.train import train as train_run
from hsee_jax.tracking import TRACKERS


def train(words: Sequence[str]) -> int | None:
    """Train a federation; return the exit status of a run that a signal stopped."""
    given = vars(_parser(words).parse(words))
    how = {name: given.pop(name, False) for name in ("resume", "overwrite")}
    out = given.pop("out", None)
    if how["resume"] and out is None:
        raise UserError("out: missing; --resume needs the folder of the run")
    config = config_with_plan(given, stored=out if how["resume"] else None)
    config = config_with_link_rates(config, given)
    processes.join(*map(given.get, ("coordinator", "num_processes", "process_id")))
    processes.check_devices()
    use_cache(given)
    if given.get("cuts") == AUTO:
        own = (given.get(name) for name in ("replan_every", "availability"))
        config = plan_now(config, given["devices"], *own)
    is_first = processes.is_first()
    if is_first:
        show_log()
    callbacks: list[Callback] = []
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_folder(out, given))
        rounds, names = config.run.rounds, given.get("track", ())
        processes.in_first(lambda: callbacks.extend(_callbacks(rounds, names, folder)))
        signals = stack.enter_context(StopSignals())
        try:
            summary = train_run(
                config,
                folder,
                **how,
                devices=given.get("devices"),
                availability=given.get("availability"),
                callbacks=callbacks,
                stop=signals,
            )
        except Stopped as stopped:
            line = f"hsee: {stopped}; --resume --out {folder} continues it"
            print(line, file=sys.stderr)
            return 128 + processes.largest(signals.received)
    if is_first:
        print_figures(summary.rounds, summary.scores, folder, as_json=False)
    return None


def _parser(words: Sequence[str]) -> Parser:
    parser = config_parser("train", words)
    add_run(
        parser,
        name="PRESET-DATE",
        resume="continue the run in --out; --rounds may be raised, which stretches the "
        "schedule of the learning rate",
    )
    entries = "; ".join(f"{e.name}: {e.summary}" for e in TRACKERS.values())
    parser.add_argument(
        "--track",
        nargs="+",
        metavar="|".join(TRACKERS),
        help="trackers that get the figures of each round while the run trains: "
        + entries.replace("%", "%%"),
    )
    _add_devices(parser)
    several = parser.add_argument_group(
        "several processes", "set automatically on TPU pods and in Slurm steps"
    )
    several.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="address of the first process, or auto",
    )
    several.add_argument("--num-processes", type=int, help="number of processes")
    several.add_argument(
        "--process-id", type=int, help="number of this process, from 0"
    )
    return parser


def _add_devices(parser: Parser) -> None:
    """Add the options of a plan and of the simulated clock."""
    parser.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="plan.json of hsee plan: sets --cuts and --num-clients",
    )
    parser.add_argument(
        "--devices",
        type=Path,
        metavar="FILE",
        help="TOML or CSV with the device of each client: every round gets simulated "
        "seconds and joules; with --cuts auto the fastest cuts are planned for them",
    )
    add_link_rates(parser)
    parser.add_argument(
        "--availability",
        type=Path,
        metavar="FILE",
        help="CSV with the columns client,from_s,to_s, in simulated seconds: when "
        "clients are available; needs --devices",
    )
    parser.add_argument(
        "--replan-every",
        type=int,
        metavar="ROUNDS",
        help="with --cuts auto: plan again every so many rounds, for devices that "
        "change or have a battery",
    )


def _callbacks(rounds: int, names: Sequence[str], folder: Path) -> list[Callback]:
    """Make the progress bar and the named trackers; refuse a missing library."""
    trackers = [TRACKERS.make(name, folder) for name in dict.fromkeys(names)]
    return [ProgressBar(rounds), *trackers]


def _folder(
    out: Path | None, given: dict[str, Any]
) -> contextlib.AbstractContextManager[Path]:
    """Return the given folder of the run, or make a new folder below ``runs``."""
    if out is not None:
        return contextlib.nullcontext(out)
    if jax.process_count() > 1:
        raise UserError("out: missing; several processes need a folder they share")
    name = given.get("preset", "run" if "config" in given else "demo")
    return new_folder(Path("runs"), f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
