r"""Compare mean, trimmed mean and median when one of ten devices sends poisoned layers.

After each round every layer is averaged over its holders. Client 1, one of the five
with the deeper cut, multiplies its layers by a factor before it sends them: a factor of
1 is honest, and a negative factor flips their signs. The attack is part of this
example, not of the library. The script prints the mean accuracy of the nine honest
clients, over seeds; it takes a few minutes::

    python examples/poisoning.py --json examples/poisoning.json
    python examples/poisoning.py --skew --factors 1 -10 \
        --json examples/poisoning-skew.json
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np

import hsee_jax as hs
from hsee_jax.algorithms.options import Aggregate, TrimShare
from hsee_jax.core import Array
from hsee_jax.federation import RunState
from hsee_jax.federation.state import Means

ATTACKER = 1
SKEW = {"partition": "dirichlet", "alpha": 0.3}
SHARES = {"mean": 0.0, "trimmed_mean": 0.2, "median": 0.0}
Row = dict[str, Any]  # values of JSON


@hs.algorithms.register(summary="averaging, while client 1 sends poisoned layers")
def poisoned(
    federation: hs.Federation,
    *,
    factor: Annotated[float, "what client 1 multiplies its layers by"] = 1.0,
    aggregate: Aggregate = "mean",
    trim_share: TrimShare = 0.0,
) -> hs.Strategy:
    """Average over all holders, after client 1 has changed its parameters."""
    plain = hs.algorithms.averaging(
        federation,
        average="all_holders",
        weights="uniform",
        aggregate=aggregate,
        trim_share=trim_share,
    )

    def poison(state: RunState) -> RunState:
        clients = list(state.clients)
        for g, group in enumerate(federation.groups):
            if ATTACKER in group.ids:
                member = group.ids.index(ATTACKER)
                clients[g] = _scale(clients[g], member, factor)
        return state.replace(clients=tuple(clients))

    def poisoned_mean(state: RunState, weights: tuple[Array, ...]) -> Means:
        return plain.aggregate(poison(state), weights)

    return plain._replace(aggregate=poisoned_mean)


def _scale(stack: Any, member: int, factor: float) -> Any:
    """Multiply the parameters of one client's layers and exit in a stack."""

    def scale(layer: Any) -> Any:
        params = jax.tree.map(lambda p: p.at[member].multiply(factor), layer.params)
        return layer.replace(params=params)

    return stack.replace(layers=tuple(map(scale, stack.layers)), head=scale(stack.head))


def train(aggregate: str, factor: float, seed: int, given: argparse.Namespace) -> Row:
    """Train once, and return the mean accuracies of the honest clients."""
    config = hs.override(
        hs.preset("demo"),
        plugin=("poisoning",),
        network="mlp",
        depth=4,
        num_clients=10,
        cuts=("1", "3"),
        strategy="poisoned",
        factor=factor,
        aggregate=aggregate,
        trim_share=SHARES[aggregate],
        max_train_samples=given.images,
        rounds=given.rounds,
        **(SKEW if given.skew else {}),
        model_seed=seed,
        data_seed=seed,
        partition_seed=seed,
    )
    folder = given.out / f"{aggregate}-{factor:g}-{seed}"
    scores = hs.train(config, folder, overwrite=True).scores
    honest = [client for client in scores.clients if client.id != ATTACKER]
    return {
        "aggregate": aggregate,
        "factor": factor,
        "seed": seed,
        "exit_accuracy": float(np.mean([one.exit_accuracy for one in honest])),
        "server_accuracy": float(np.mean([one.server_accuracy for one in honest])),
    }


def table(rows: Sequence[Row]) -> str:
    """Return a Markdown table: mean ± standard deviation over the seeds."""
    lines = [
        "| aggregate | client 1 sends | exit accuracy | server accuracy |",
        "|---|---|---|---|",
    ]
    cases: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        cases.setdefault((row["aggregate"], row["factor"]), []).append(row)
    for (aggregate, factor), found in cases.items():
        sends = "its layers" if factor == 1 else f"{factor:g} × its layers"
        figures = [_mean(found, f"{branch}_accuracy") for branch in ("exit", "server")]
        lines.append(f"| `{aggregate}` | {sends} | {' | '.join(figures)} |")
    return "\n".join(lines)


def _mean(rows: Sequence[Mapping[str, float]], name: str) -> str:
    return hs.studies.mean_text([row[name] for row in rows], 3)


def main(words: Sequence[str] | None = None) -> None:
    """Train all combinations and print the table."""
    parser = argparse.ArgumentParser(description="Poison one of ten clients.")
    parser.add_argument("--out", type=Path, default=Path("runs/poisoning"))
    parser.add_argument("--json", type=Path, help="write the figures of each run there")
    parser.add_argument("--aggregates", nargs="+", default=list(SHARES), choices=SHARES)
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0, -1.0, -10.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--skew", action="store_true", help="deal labels unequally")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--images", type=int, help="for training (all)")
    given = parser.parse_args(words)
    rows = [
        train(aggregate, factor, seed, given)
        for factor in given.factors
        for aggregate in given.aggregates
        for seed in given.seeds
    ]
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
