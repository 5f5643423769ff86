"""The command ``hsee plan``."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hsee_jax.algorithms import ALGORITHMS
from hsee_jax.cli.arguments import config_parser
from hsee_jax.cli.expectations import expected_problem, read_experience
from hsee_jax.cli.flags import Parser, config_from, count_of, use_cache
from hsee_jax.cli.link_rates import add_link_rates, config_with_link_rates
from hsee_jax.cli.plan_pairs import check_flags, show_pairs
from hsee_jax.cli.terminal import show, text_table
from hsee_jax.config import Config
from hsee_jax.core.errors import UserError, unknown
from hsee_jax.core.options import Option, between, positive
from hsee_jax.federation.accumulation import check_micro_batches
from hsee_jax.nn.cuts import parse_cut
from hsee_jax.parallel.processes import check_devices
from hsee_jax.report import plan as plan_report
from hsee_jax.report.accuracy import leave_one_out_table, predicted
from hsee_jax.report.clusters import cluster_entries, clusters_table
from hsee_jax.report.tables import Table
from hsee_jax.runs.accuracy import Experience
from hsee_jax.runs.folder import check_writable
from hsee_jax.runs.planning import Planning, Resources, planning
from hsee_jax.systems.comparison import Row, compare, other_choices
from hsee_jax.systems.device_file import read_devices
from hsee_jax.systems.pairing import RULES
from hsee_jax.systems.planner import Limits, plan_cuts
from hsee_jax.systems.problem import Problem, replica_bytes

_MINIMIZE = {"time": "seconds", "energy": "joules", "bytes": "bytes"}
_NUMBERS = {
    "max_memory": "bytes of memory of every client's device; by default each one's own",
    "max_joules": "energy of all clients in a round",
    "max_seconds": "seconds of a round",
    "max_bytes": "bytes on all links in a round, up and down",
    "max_server_memory": "bytes of memory of the server",
    "bandwidth": "bytes/s of an uplink that all clients share; it is divided so that "
    "the last upload ends as early as possible",
}
_MISSING = ("participation", "dropout", "absences", "absences_file", "deadline")
_REFUSED = {  # flags that would change nothing, and why
    "cuts": "the plan says it",
    "num_clients": "the plan says it",
    "recuts": "a plan is for the cuts of one round",
    **dict.fromkeys(_MISSING, "a plan is for a round of all clients"),
}


def plan(words: Sequence[str]) -> None:
    """Choose the cuts of some devices; print and write the plan and its picture."""
    given = vars(_parser(words).parse(words))
    _check(given)
    out = given.get("out", Path("plan"))
    check_writable(out)
    if "devices" in given:
        given["num_clients"] = len(read_devices(given["devices"]).clients)
    config = config_with_link_rates(config_from(given), given)
    resources = read_resources(given, config)
    use_cache(given)
    check_devices()
    known = planning(config, resources)
    if "pairs" in given:
        show_pairs(known, given["pairs"], _number(given, "max_memory"), out)
    else:
        _plan_cuts(known, given, out)


def _check(given: dict[str, Any]) -> None:
    """Refuse flags that are not allowed, before any file is read."""
    for name, reason in _REFUSED.items():
        if name in given:
            raise UserError(f"{name}: is not allowed; {reason}")
    if given.get("minimize", "time") not in _MINIMIZE:
        raise unknown("minimize", given["minimize"], _MINIMIZE)
    if "pairs" in given:
        check_flags(given)
    _least_accuracy(given)


def _plan_cuts(known: Planning, given: dict[str, Any], out: Path) -> None:
    """Plan, print the tables, and write the plan and its picture."""
    minimize, strategy = given.get("minimize", "time"), known.config.strategy.strategy
    quantity = _MINIMIZE[minimize]
    limits = _limits(given, known.layer_names)
    experience = read_experience(given.get("accuracy_from", ()), known)
    problem, expected = expected_problem(known, experience)
    course = problem.schedule
    check_micro_batches(
        known.config.run.micro_batches,
        problem.batch_size,
        course.boundary,
        course.distill,
    )
    if "compare" not in given:
        _check_effect(given, problem, strategy, replica_bytes(problem, limits.min_cut))
    answer = plan_cuts(problem, quantity, limits)
    document = {
        "strategy": strategy,
        "minimize": minimize,
        **plan_report.document(problem, answer, known.layer_names),
    }
    tables = []
    if expected is not None:
        document["predicted"] = predicted(expected, answer.cuts)
        tables.append(leave_one_out_table(expected, answer.cuts))
    tables.append(plan_report.by_kind(document))
    if problem.clusters:
        document["clusters"] = cluster_entries(problem, answer)
        tables.append(clusters_table(document["clusters"]))
    if given.get("compare", False):
        needed = experience if limits.exit_accuracy is not None else None
        rows = compare(_problems(known, needed), quantity, limits)
        tables.append(_strategies(known, rows))
        others = [Row("plan", answer), *other_choices(problem, quantity, limits)]
        title = f"other cuts under {strategy}, without limits of totals"
        tables.append(plan_report.side_by_side(title, "choice", others))
    plan_report.write(document, problem, answer, out)
    for table in tables:
        show(text_table(*table))
    print(out / "plan.json")


def _check_effect(
    given: dict[str, Any], problem: Problem, strategy: str, replica: int
) -> None:
    """Refuse flags about machines that the algorithm of the plan does not have."""
    if given.get("server_workers", 1) > 1 and not replica:
        raise UserError(
            f"server_workers: {given['server_workers']} has no effect with {strategy}, "
            "whose server has no replicas; allowed is 1"
        )
    if problem.at_server and "max_memory" in given:
        raise UserError(
            f"max_memory: has no effect with {strategy}, which trains on the server; "
            "allowed is --max-server-memory"
        )


def read_resources(given: dict[str, Any], config: Config) -> Resources:
    """Read the devices that the flags name, the server's workers and the uplink.

    Raises:
      UserError: no file of devices is given, or a value is not allowed.
    """
    if "devices" not in given:
        raise UserError("devices: missing; allowed is a file of TOML or CSV")
    workers = count_of(given, "server_workers", 1)
    fleet = read_devices(given["devices"], seed=config.run.partition_seed)
    return Resources(fleet, workers, _number(given, "bandwidth") or float("inf"))


def _parser(words: Sequence[str]) -> Parser:
    parser = config_parser("plan", words)
    parser.add_argument(
        "--devices", type=Path, metavar="FILE", help="TOML or CSV with the devices"
    )
    add_link_rates(parser)
    parser.add_argument(
        "--minimize",
        metavar="|".join(_MINIMIZE),
        help="time of a round, energy of all clients, or bytes on all links (time)",
    )
    for name, meaning in _NUMBERS.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=float, metavar="FLOAT", help=meaning
        )
    parser.add_argument("--min-cut", help="least cut, a number or a name")
    parser.add_argument(
        "--accuracy-from",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="finished runs of the same network and dataset, or folders of studies "
        "with their results: predict the accuracies of the plan from them",
    )
    parser.add_argument(
        "--min-exit-accuracy",
        type=float,
        metavar="FLOAT",
        help="least predicted accuracy of each client's exit, from 0 to 1; needs "
        "--accuracy-from",
    )
    parser.add_argument(
        "--server-workers",
        type=int,
        help="clients that a server with replicas works for at once (1)",
    )
    parser.add_argument(
        "--pairs",
        metavar="|".join(RULES),
        help="pair the clients without a server: each client trains a whole network, "
        "of which its partner computes a part; writes pairs.json",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="also plan for every strategy, and compare with other choices of cuts",
    )
    parser.add_argument(
        "--out", type=Path, help="folder for the files, which are replaced (plan)"
    )
    return parser


def _number(given: dict[str, Any], name: str) -> float | None:
    """Return the value of a flag of `_NUMBERS`; None if it is not given.

    Raises:
      UserError: the value is not allowed.
    """
    if name not in given:
        return None
    return Option(name, float, None, rules=(positive,)).checked(given[name])


def _limits(given: dict[str, Any], layer_names: Sequence[str]) -> Limits:
    try:
        min_cut = parse_cut(given.get("min_cut", 1), layer_names)
    except UserError as error:
        raise UserError(str(error).replace("cuts:", "min_cut:", 1)) from error
    return Limits(
        memory_bytes=_number(given, "max_memory"),
        min_cut=min_cut,
        seconds=_number(given, "max_seconds"),
        joules=_number(given, "max_joules"),
        bytes=_number(given, "max_bytes"),
        server_bytes=_number(given, "max_server_memory"),
        exit_accuracy=_least_accuracy(given),
    )


def _least_accuracy(given: dict[str, Any]) -> float | None:
    if "min_exit_accuracy" not in given:
        return None
    if "accuracy_from" not in given:
        raise UserError("accuracy_from: missing; min_exit_accuracy needs finished runs")
    option = Option("min_exit_accuracy", float, None, rules=(between(0, 1),))
    return option.checked(given["min_exit_accuracy"])


def _problems(
    known: Planning, experience: Experience | None
) -> dict[str, Problem | UserError]:
    """Return the problem under each algorithm, or the error where there is none."""
    found: dict[str, Problem | UserError] = {}
    for name in ALGORITHMS:
        try:
            found[name], _ = expected_problem(known, experience, name)
        except UserError as error:
            found[name] = error
    return found


def _strategies(known: Planning, rows: Sequence[Row]) -> Table:
    images = float(known.samples.sum()) * _sample_bytes(known)
    title = (
        "strategies, each with its best cuts; for centralized the clients sent their "
        f"{images / 1e6:,.1f} MB of samples before"
    )
    for row in rows:
        if row.plan is None:
            title += f"\n{row.name}: {row.refusal}"
    return plan_report.side_by_side(title, "strategy", rows)


def _sample_bytes(known: Planning) -> int:
    """Return the bytes of a sample as it is stored."""
    info = known.info
    return math.prod(info.input_shape) * np.dtype(info.dtype).itemsize
