"""Measure the memory of a device: `hsee join` at width 64, by its cut.

Shows: the peak of the resident memory of a process that takes part in a round of two
batches of 32 images of 32x32x3, for cuts 1 to 7 of ResNet-18: at its first start, which
compiles, and at a later one, which finds the programs; beside it what its imports take,
and what `hsee_jax.systems.client_memory` counts for weights, optimizer and activations.
The server of this script takes the messages, and trains nothing.
Expected: the imports and XLA take more than the layers of the first cuts, and a first
start takes more than a later one.
Cost: about six minutes on two CPU cores.
Command: python benchmarks/bench_device.py
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import bench
import numpy as np

import hsee_jax as hs
from hsee_jax.data import Arrays, write_npz
from hsee_jax.data.npz import write_shard
from hsee_jax.deployment.forms import Layers
from hsee_jax.deployment.mailbox import Mailbox
from hsee_jax.deployment.rpc import open_port
from hsee_jax.deployment.service import Service
from hsee_jax.deployment.types import Patience
from hsee_jax.runs.experiment import Experiment
from hsee_jax.runs.material import shares
from hsee_jax.runs.served import build_served
from hsee_jax.systems import client_memory, layer_costs, optimizer_slots

COLUMNS = ("cut", "first peak MB", "later peak MB", "counted MB")
# A process says itself what its peak was: what the system says of a child may be that
# of the process that started it.
PEAK = """
from pathlib import Path
lines = Path("/proc/self/status").read_text().splitlines()
print([line.split()[1] for line in lines if line.startswith("VmHWM")][0])
"""
IMPORTS = """
import grpc, jax, safetensors.numpy
import hsee_jax.cli.join, hsee_jax.deployment.take_part
jax.devices()
"""
JOINS = """
import sys
from hsee_jax.cli import main
assert not main(sys.argv[1:])
"""
STEPS = 2


def main() -> None:
    """Start a device for each cut, print the table, and write its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny, for tests")
    parser.add_argument("--out", type=Path, default=bench.RESULTS)
    given = parser.parse_args()
    size, cuts, width = (8, 1, 2) if given.quick else (32, 7, 64)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), batch_size=size, cuts=cuts, width=width)
    print(bench.table(rows, COLUMNS))
    bench.write("device", rows, out=given.out)


def measure(folder: Path, *, batch_size: int, cuts: int, width: int) -> list[bench.Row]:
    """Return a row for the imports, and a row for each cut."""
    count = cuts * STEPS * batch_size
    write_npz(folder / "data", _noise(count))
    config = hs.override(
        hs.preset("demo"),
        dataset="npz",
        data_dir=str(folder / "data"),
        validation_share=0.0,
        strategy="sequential",
        width=width,
        num_clients=cuts,
        cuts=tuple(str(cut + 1) for cut in range(cuts)),
        batch_size=batch_size,
        rounds=1,
        eval_every=1,
        checkpoint_every=1,
    )
    experiment = build_served(config)
    assert experiment.learning_rates.shape[1] == STEPS
    counted = client_memory(
        layer_costs(experiment.federation.model),
        batch_size=batch_size,
        slots=optimizer_slots(experiment.federation.optimizer),
    )
    imports = _peak(_start(IMPORTS))
    rows: list[bench.Row] = [{"cut": "imports alone", "later peak MB": imports}]
    for i, share in enumerate(shares(config)):
        write_shard(folder / f"data-{i}.npz", share)
        rows.append(
            {
                "cut": i + 1,
                "first peak MB": device_peak(experiment, i, folder, "first"),
                "later peak MB": device_peak(experiment, i, folder, "later"),
                "counted MB": float(counted[i]) / 1e6,
            }
        )
    return rows


def device_peak(experiment: Experiment, i: int, folder: Path, start: str) -> float:
    """Return the peak of the resident memory of device i in a round, in MB.

    Args:
      experiment: the run.
      i: the client.
      folder: holds the client's data; all starts keep their programs in it.
      start: a name; each start has a state of its own.
    """
    mailbox = Mailbox(Patience(), lambda: False)
    service = Service(experiment, mailbox, "measurement", bound=1e4)
    rows = [experiment.batch_size] * STEPS
    mailbox.open(1, {i: rows}, Layers.ALL, last={}, means={})
    with open_port(service, "127.0.0.1:0", None) as port:
        words = ["join", f"127.0.0.1:{port}", "--client", str(i)]
        words += ["--data", str(folder / f"data-{i}.npz")]
        words += ["--state", str(folder / f"device-{i}-{start}")]
        words += ["--compilation-cache", str(folder / "programs")]
        process = _start(JOINS, *words)
        for step in range(STEPS):
            mailbox.take(i, step)
        mailbox.finish(i)
        mailbox.close()
        mailbox.end(last={i: 1}, means={})
        return _peak(process)


def _start(code: str, *words: str) -> subprocess.Popen[str]:
    """Start a process that prints its peak memory, in KiB, when its code has run."""
    command = [sys.executable, "-c", code + PEAK, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _peak(process: subprocess.Popen[str]) -> float:
    """Return the peak memory that a process prints, in MB."""
    said, _ = process.communicate()
    if process.returncode:
        raise SystemExit("a process has failed")
    return 1024 * int(said) / 1e6


def _noise(count: int) -> Arrays:
    rng = np.random.default_rng(0)

    def draw(size: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(size) % 10
        return rng.integers(0, 256, (size, 32, 32, 3), np.uint8), labels

    return (*draw(count), *draw(20))


if __name__ == "__main__":
    main()
