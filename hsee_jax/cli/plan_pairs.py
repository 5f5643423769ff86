"""Pairs of clients without a server, for ``hsee plan --pairs``."""

import json
from pathlib import Path
from typing import Any

from hsee_jax.algorithms import ALGORITHMS
from hsee_jax.cli.terminal import show, text_table
from hsee_jax.core.errors import UserError, unknown
from hsee_jax.core.files import replace_file, writing
from hsee_jax.report.pairs import pairs_document, pairs_table
from hsee_jax.runs.planning import Planning, problem_of
from hsee_jax.systems.pairing import RULES, plan_pairs

_NO_EFFECT = (
    "strategy",
    "micro_batches",
    "minimize",
    "max_joules",
    "max_seconds",
    "max_bytes",
    "max_server_memory",
    "bandwidth",
    "min_cut",
    "server_workers",
    "accuracy_from",
    "min_exit_accuracy",
    "compare",
    "link_rates_from_devices",
)
_TRAINED = "fedavg"  # what pairs train: a whole network for every client


def check_flags(given: dict[str, Any]) -> None:
    """Refuse an unknown rule, and flags without a meaning for pairs.

    Raises:
      UserError: such a flag is given.
    """
    if given["pairs"] not in RULES:
        raise unknown("pairs", given["pairs"], RULES)
    trained = ALGORITHMS.entry(_TRAINED).options
    of_others = (name for name in ALGORITHMS.options() if name not in trained)
    for name in (*_NO_EFFECT, *of_others):
        if name in given:
            raise UserError(f"{name}: has no effect with pairs")


def show_pairs(
    known: Planning, rule: str, memory_bytes: float | None, out: Path
) -> None:
    """Pair the clients, print the pairs and write ``pairs.json``.

    Args:
      known: what the plan knows of the run.
      rule: one of `RULES`.
      memory_bytes: the memory of every device; None for each device's own.
      out: the folder for the file.

    Raises:
      UserError: the network has more exits than one; or see `plan_pairs`.
    """
    exits = known.config.clients.exits
    if exits != "cut":
        raise UserError(
            f"exits: {exits} is not allowed with pairs, which train no exit but the "
            "last; allowed is cut"
        )
    problem = problem_of(known, _TRAINED)
    pairs = plan_pairs(problem, rule, memory_bytes)
    document = pairs_document(problem, pairs, known.layer_names)
    path = out / "pairs.json"
    with writing(path):
        out.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(document, indent=2) + "\n")
    show(text_table(*pairs_table(document)))
    print(path)
