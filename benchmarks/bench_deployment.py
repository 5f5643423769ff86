"""Train the demo with a process for each client, beside the simulation of the same run.

Shows: `hsee serve demo --local 3` ends with the network and the accuracies of `hsee
train demo --num-clients 3`, bit for bit; the seconds of a round of both, trained in
turns; and the bytes that a counting proxy sees between devices and server, beside the
bytes of the messages and what `hsee_jax.systems.traffic` predicts.
Expected: equal networks; upwards less than 1 % more on the wire than predicted. Fewer
bytes go down, so the first layers and the frames of gRPC add a larger share to them.
Cost: about ten minutes on two CPU cores; --rounds and --pairs shorten it.
Command: python benchmarks/bench_deployment.py [--rounds 12] [--clients 3] [--pairs 3]
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import bench
import jax
import numpy as np

import hsee_jax as hs
from hsee_jax.runs.history import read_history
from hsee_jax.systems.traffic import averages_in

TESTS = Path(__file__).parent.parent / "tests"  # the proxy is there
ROUNDS = (
    "run",
    "clients",
    "seconds a round",
    "range",
    "ratio",
    "exit accuracy",
    "server accuracy",
    "same network",
)
BYTES = ("call", "predicted up", "sent up", "predicted down", "sent down")
QUICK = {"network": "mlp", "hidden": 4, "cuts": ("1",), "max_train_samples": 120}


def main() -> None:
    """Train both runs, print two tables, and write their rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny, for tests")
    parser.add_argument("--clients", type=bench.at_least(1), default=3)
    parser.add_argument(
        "--rounds", type=bench.at_least(2), default=12, help="the first does not count"
    )
    parser.add_argument(
        "--pairs", type=bench.at_least(1), default=3, help="of runs, in turns"
    )
    parser.add_argument("--out", type=Path, default=bench.RESULTS)
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        _serve(Path(given.child[0]), given.child[1:])
        return
    changes: dict[str, Any] = dict(QUICK if given.quick else {})
    changes["rounds"] = 2 if given.quick else given.rounds
    with tempfile.TemporaryDirectory() as folder:
        pairs = [
            train_pair(Path(folder), i, given.clients, changes)
            for i in range(1 if given.quick else given.pairs)
        ]
        rounds = compare(pairs, given.clients)
        sizes = _sizes(pairs[0].served, json.loads(pairs[0].report.read_text()))
    print(bench.table(rounds, ROUNDS))
    print(bench.table(sizes, BYTES))
    tables = {"rounds": rounds, "bytes": sizes}
    rows = [{"table": name} | row for name, own in tables.items() for row in own]
    bench.write("deployment", rows, out=given.out)


class Pair(NamedTuple):
    """The folders of the same run in one process and over a network."""

    simulated: Path
    served: Path
    report: Path  # the bytes that were sent


def train_pair(folder: Path, i: int, clients: int, changes: dict[str, Any]) -> Pair:
    """Train the run in one process, then over a network."""
    words = [f"--{name.replace('_', '-')}" for name in changes]
    values = [v if isinstance(v, tuple) else (v,) for v in changes.values()]
    flags = [w for pair in zip(words, values, strict=True) for w in (pair[0], *pair[1])]
    flags = [*map(str, flags), "--compilation-cache", str(folder / "programs")]
    pair = Pair(*(folder / f"{name}-{i}" for name in ("train", "serve", "report")))
    command = ["-m", "hsee_jax", "train", "demo", "--num-clients", str(clients)]
    _run(*command, *flags, "--out", str(pair.simulated))
    command = [__file__, "--child", str(pair.report), "serve", "demo", "--local"]
    _run(*command, str(clients), *flags, "--out", str(pair.served))
    return pair


def compare(pairs: Sequence[Pair], clients: int) -> list[bench.Row]:
    """Return a row for each side, of the rounds of all pairs."""
    same = {_same(pair.simulated, pair.served) for pair in pairs}
    ratios = [
        float(np.median(_seconds(pair.served)) / np.median(_seconds(pair.simulated)))
        for pair in pairs
    ]
    ratio = f"{np.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    simulated = _rounds("hsee train", [pair.simulated for pair in pairs], clients)
    served = _rounds("hsee serve --local", [pair.served for pair in pairs], clients)
    return [
        simulated | {"ratio": "1", "same network": "the reference"},
        served | {"ratio": ratio, "same network": " and ".join(sorted(same))},
    ]


def _run(*words: str) -> None:
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)


def _rounds(name: str, folders: Sequence[Path], clients: int) -> bench.Row:
    """Return the figures of runs that are repeats of each other."""
    seconds = [s for folder in folders for s in _seconds(folder)]
    summary = read_history(folders[0]).summary
    assert summary is not None
    return {
        "run": name,
        "clients": clients,
        "seconds a round": float(np.median(seconds)),
        "range": f"{min(seconds):.3g}-{max(seconds):.3g} s",
        "exit accuracy": f"{summary.scores.mean_exit_accuracy:.4f}",
        "server accuracy": f"{summary.scores.mean_server_accuracy:.4f}",
    }


def _seconds(folder: Path) -> list[float]:
    """Return the seconds of a run's rounds without the first, which compiles."""
    return [record.seconds for record in read_history(folder).records[1:]]


def _same(one: Path, other: Path) -> str:
    """Say whether two runs ended with the same network."""
    leaves = zip(
        *(jax.tree.leaves(hs.restore(folder).state) for folder in (one, other)),
        strict=True,
    )
    equal = all(np.array_equal(a, b, equal_nan=True) for a, b in leaves)
    return "bit for bit" if equal else "no"


def _sizes(folder: Path, report: dict[str, Any]) -> list[bench.Row]:
    """Return the bytes of all rounds by call, and of the whole run."""
    records, run = read_history(folder).records, hs.restore(folder)
    experiment = hs.build(run.config)
    steps = experiment.learning_rates.shape[1]
    averages = sum(averages_in(run.strategy, r.round, steps) for r in records)
    held = {traffic.cut: traffic.weights for traffic in experiment.traffic}
    weights = averages * sum(held[share.cut] for share in experiment.manifest)
    up, down = (sum(r.link[way] for r in records) for way in range(2))
    predicted = {
        "push": (up - weights, down - weights),
        "finish": (weights, 0),
        "next": (0, weights),
    }
    rows = [
        _bytes_row(method, predicted.get(method, (0, 0)), counted)
        for method, counted in report["calls"].items()
    ]
    sent = [sum(both[way] for both in report["calls"].values()) for way in range(2)]
    rows.append(_bytes_row("all", (up, down), sent))
    rows.append(_bytes_row("all, on the wire", (up, down), report["wire"]))
    return rows


def _bytes_row(call: str, predicted: Any, sent: Any) -> bench.Row:
    return {
        "call": call,
        "predicted up": float(predicted[0]),
        "sent up": float(sent[0]),
        "predicted down": float(predicted[1]),
        "sent down": float(sent[1]),
    }


class Counted:
    """A service that counts the bytes of all calls."""

    def __init__(self, service: Any) -> None:
        """Count for a `Service`."""
        self._service = service
        self.clients, self.limit = service.clients, service.limit
        self.methods = service.methods
        self.calls = {method: [0, 0] for method in service.methods}

    def call(self, method: str, i: int, message: bytes, alive: Any) -> bytes:
        """Answer a call."""
        answer: bytes = self._service.call(method, i, message, alive)
        self.calls[method][0] += len(message)
        self.calls[method][1] += len(answer)
        return answer


def _serve(report: Path, words: list[str]) -> None:
    """Run a command line whose devices call through a counting proxy."""
    sys.path.insert(0, str(TESTS))
    from proxy import Proxy  # type: ignore[import-not-found]

    from hsee_jax.cli import main as command_line
    from hsee_jax.deployment import rpc

    open_port = rpc.open_port

    @contextlib.contextmanager
    def counted(service: Any, *place: Any) -> Iterator[int]:
        own = Counted(service)
        with open_port(own, *place) as port, Proxy(port) as proxy:  # type: ignore
            yield proxy.port
        figures = {"calls": own.calls, "wire": [proxy.up, proxy.down]}
        report.write_text(json.dumps(figures))

    rpc.open_port = counted  # type: ignore[assignment]
    sys.exit(command_line(words))


if __name__ == "__main__":
    main()
