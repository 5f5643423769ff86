"""A device from its files: take part in a run, from its start or from where it was."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from hsee_jax.core.errors import UserError
from hsee_jax.data.arrays import as_known
from hsee_jax.data.npz import read_split
from hsee_jax.deployment.box import Box
from hsee_jax.deployment.device import Call, Changed, Device, join
from hsee_jax.deployment.protocol import Refusal, digest
from hsee_jax.runs.participant import own_share


def take_part(
    call: Call,
    state: Path,
    data: Path | None,
    plugins: Sequence[str],
    stop: Callable[[], bool],
    *,
    data_dir: str | None = None,
    private: bool = False,
) -> bool:
    """Take part in a run until it ends.

    A server that was stopped may go on with other rounds or another evaluation; the
    device then joins it again.

    Args:
      call: calls the server.
      state: the folder of the device.
      data: the file of its samples; None for its share of the run's dataset.
      plugins: modules that the run may need.
      stop: called between rounds; true ends the part before the run ends.
      data_dir: the folder of the run's dataset on this machine; None for the default.
      private: refuse a run in which the device sends its layers.

    Returns:
      Whether the run has ended.

    Raises:
      UserError: the samples or the files of the device are not valid or not those of
        this run, or the server refuses the device.
    """
    if data is not None and data_dir is not None:
        raise UserError(
            "data_dir: is not allowed with data, the device's own samples; allowed is "
            "one of the two"
        )
    raw = None if data is None else read_split(data, "data")
    samples = -1 if raw is None else len(raw.labels)

    def once() -> bool:
        values, part = join(call, samples, tuple(plugins))
        if private and not part.private:
            raise UserError(
                "keep_layers_private: the server's run asks for layers; allowed is one "
                "of `hsee serve --keep-layers-private`"
            )
        box = Box(state)
        box.claim(values["run"], part.client)
        box.put_about(values)
        own = own_share(values, data_dir) if raw is None else as_known(raw, part.info)
        return Device(part, own, box, call, about=digest(values)).run(stop)

    try:
        while True:
            with contextlib.suppress(Changed):
                return once()
    except Refusal as refusal:
        raise UserError(f"server: sends what is not allowed: {refusal}") from refusal
