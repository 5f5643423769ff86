"""Early exits: choose thresholds, then answer on the device or at the server.

An exit that is sure answers on the device. The features of all other images go to the
server. Each client has a threshold of its own, chosen on images that were held out of
the training; at most the given share of these goes to the server::

    python examples/gate.py --run runs/demo --offload 0.3

Without ``--run`` the example opens the run in ``runs/gate``, or trains a small one
there.
"""

import argparse
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np

import hsee_jax as hs
from hsee_jax.inference import Target, make_gate, study
from hsee_jax.link import sample_bytes_of
from hsee_jax.runs.data import build_data

BATCH_SIZE = 250


def answer(folder: Path, offload: float) -> list[dict[str, float]]:
    """Answer the test images behind the gate of each client.

    Args:
      folder: the run's folder.
      offload: the share of the held-out images that may go to the server.

    Returns:
      For each client its id, cut and threshold, the accuracy of the gate, the share of
      images sent to the server, and the bytes sent for an image on average.
    """
    chosen = study(folder).thresholds(Target("offload", offload))["clients"]
    run = hs.restore(folder)
    test = build_data(run.config.data)[1]
    images = hs.data.normalize(test.images, run.info.mean, run.info.std)
    features = hs.nn.layer_inputs(run.federation.model)
    gate_of = cache(partial(make_gate, batch_size=BATCH_SIZE))  # one for each cut
    rows = []
    for client in chosen:
        i, cut, threshold = client["id"], client["cut"], client["threshold"]
        gate, branches = gate_of(*run.specs(i)), (run.client(i), run.server(i))
        answers = [
            gate.answer(*branches, images[n : n + BATCH_SIZE], threshold)
            for n in range(0, len(images), BATCH_SIZE)
        ]
        classes = np.concatenate([part.predictions for part in answers])
        sent = 1 - float(np.concatenate([part.exited for part in answers]).mean())
        row = {"id": i, "cut": cut, "threshold": threshold, "sent": sent}
        row["accuracy"] = float(np.mean(classes == test.labels))
        (size,) = sample_bytes_of(run.federation.codec, features[cut], [i])
        row["bytes"] = sent * size
        row["exit"], row["server"] = client["exit_accuracy"], client["server_accuracy"]
        rows.append(row)
    return rows


def main(words: Sequence[str] | None = None) -> None:
    """Open a run, or train one, and print what the gates of its clients give."""
    parser = argparse.ArgumentParser(description="Answer at the exit or at the server.")
    parser.add_argument("--run", type=Path, help="a trained run; without it, train one")
    parser.add_argument("--offload", type=float, default=0.3, help="to the server")
    parser.add_argument("--rounds", type=int, default=4, help="of the training")
    given = parser.parse_args(words)
    folder = given.run or Path("runs/gate")
    if given.run is None:  # it goes on where it stopped, or begins anew if it differs
        config = hs.override(hs.preset("demo"), rounds=given.rounds)
        run = hs.studies.Run("gate", config.run.model_seed, config)
        hs.studies.train_run(run, folder, overwrite=True)
    for row in answer(folder, given.offload):
        print(
            "client {id}, cut {cut}: sent {sent:.1%}, {bytes:,.0f} bytes an image; "
            "accuracy {accuracy:.3f} (exit alone {exit:.3f}, server alone "
            "{server:.3f})".format(**row)
        )


if __name__ == "__main__":
    main()
