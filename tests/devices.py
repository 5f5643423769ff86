"""Runs on devices without a network: each device is a thread that calls a function."""

import threading
from contextlib import contextmanager

import numpy as np

from hsee_jax.core.types import Dataset
from hsee_jax.deployment.box import Box
from hsee_jax.deployment.device import Device, join
from hsee_jax.deployment.serve import serve
from hsee_jax.runs.build import build


def shares(config):
    """The samples of each client of a run, on the host."""
    experiment = build(config)
    images, labels = map(np.asarray, experiment.train)
    return {i: Dataset(images[r], labels[r]) for i, r in experiment.shards.items()}


def start_device(service, i, data, folder, plugins, failures):
    """Let a device take part in a run, in a thread of its own."""

    def call(method, message):
        return service.call(method, i, message, lambda: True)

    def run():
        try:
            values, part = join(call, len(data.labels), plugins)
            box = Box(folder)
            box.claim(values["run"], i)
            Device(part, data, box, call).run(lambda: False)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def serve_in_process(config, folder, **options):
    """Serve a run to devices that are threads; returns its summary."""
    data, failures = shares(config), []

    @contextmanager
    def doors(service):
        threads = [
            start_device(
                service, i, own, folder / f"device-{i}", config.run.plugin, failures
            )
            for i, own in data.items()
        ]
        yield
        for thread in threads:
            thread.join(20)

    summary = serve(
        config, folder / "run", doors, stop=lambda: bool(failures), **options
    )
    assert not failures
    return summary
