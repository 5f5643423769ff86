"""Measure the savings of gated inference: time against the share of sent samples.

Shows: the server's time for a batch when 100, 50, 20 and 5 % of its samples are sent,
relative to a server that runs all of them without a gate, and the same for client and
server together. Thresholds are set so that exactly this share is sent; images and
weights are random, because the speed does not depend on them.
Expected: with 20 % sent at most 0.35 of the server's time; with 100 % no more than a
few percent above 1, the price of the gate.
Cost: about four minutes on two CPU cores.
Command: python benchmarks/bench_gate.py [--quick] [--out FOLDER]
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import bench
import jax
import numpy as np
import optax

from hsee_jax.core.types import Array
from hsee_jax.federation import (
    Branch,
    client_spec,
    decode,
    forward,
    init_client,
    init_server,
    server_spec,
)
from hsee_jax.inference import make_gate
from hsee_jax.link import Message
from hsee_jax.nn import init_network, resnet18

SHARES = (1.0, 0.5, 0.2, 0.05)
COLUMNS = (
    "width",
    "batch",
    "cut",
    "sent",
    "server ms",
    "range",
    "relative to all",
    "both ms",
    "both relative to all",
)


def rows_of(width: int, batch: int, cut: int, *, repeats: int) -> list[bench.Row]:
    """Measure the figures of one client, all timed in turns."""
    model = resnet18(num_classes=10, input_shape=(32, 32, 3), width=width)
    network = jax.jit(partial(init_network, model))(jax.random.key(0))
    none = optax.identity()
    specs = (
        client_spec(model, cut, none),
        server_spec(model, cut, none),
    )
    client = init_client(network, cut, none)
    server = init_server(network, cut, none)
    gate = make_gate(*specs, batch_size=batch)
    images = np.random.default_rng(0).standard_normal((batch, 32, 32, 3), np.float32)
    inputs, mask = jax.device_put((images, np.ones(batch, bool)))
    message, _, uncertainty = gate.on_client(client, inputs)
    uncertainty = uncertainty[:, -1]  # of the exit at the cut

    @jax.jit
    def server_part(server: Branch, message: Message) -> Array:
        features = decode(specs[1], message)
        return forward(specs[1], server, features, mask, train=False)[1]

    def run_server(message: Message = message) -> Any:
        return jax.device_get(server_part(server, message))

    def run_both() -> Any:
        return run_server(gate.on_client(client, inputs)[0])

    order = np.argsort(uncertainty)
    calls = {"server": run_server, "both": run_both}
    for share in SHARES:
        exits = batch - max(1, round(share * batch))
        threshold = float(uncertainty[order[exits]])
        assert (uncertainty < threshold).sum() == exits
        sent = np.sort(order[exits:])
        calls[f"server {share}"] = partial(gate.on_server, server, message, sent)
        calls[f"both {share}"] = partial(gate.answer, client, server, inputs, threshold)
    times = bench.time_in_turns(calls, repeats=repeats)
    rows = []
    for share in SHARES:
        part, both = times[f"server {share}"], times[f"both {share}"]
        rows.append(
            {
                "width": width,
                "batch": batch,
                "cut": cut,
                "sent": share,
                "server ms": 1e3 * part.median,
                "range": f"{1e3 * part.low:.3g}-{1e3 * part.high:.3g}",
                "relative to all": part.median / times["server"].median,
                "both ms": 1e3 * both.median,
                "both relative to all": both.median / times["both"].median,
            }
        )
    return rows


def main() -> None:
    """Print the table, and write its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny, for tests")
    parser.add_argument("--out", type=Path, default=bench.RESULTS)
    arguments = parser.parse_args()
    sizes = [(2, 16)] if arguments.quick else [(8, 256), (16, 128)]
    repeats = 1 if arguments.quick else 9
    rows = [
        row
        for width, batch in sizes
        for cut in ((3,) if arguments.quick else (3, 5))
        for row in rows_of(width, batch, cut, repeats=repeats)
    ]
    print(bench.table(rows, COLUMNS))
    print(f"\nwrote {bench.write('gate', rows, out=arguments.out)}")


if __name__ == "__main__":
    main()
