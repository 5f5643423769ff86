"""Answer samples with a restored run: on the device, or at the server."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from hsee_jax.core.errors import UserError
from hsee_jax.core.options import Option, Rule
from hsee_jax.data.info import DatasetInfo
from hsee_jax.data.pipeline import normalize
from hsee_jax.inference.answering import BATCH_SIZE, answers_of, gate_of
from hsee_jax.inference.gate import Answers
from hsee_jax.runs.model import views_in
from hsee_jax.runs.private import check_layers
from hsee_jax.runs.restore import Restored, check_read

_THRESHOLD = Option(
    "threshold", float, 0.0, rules=(Rule("a number", lambda value: value == value),)
)


def predict(
    run: Restored,
    i: int,
    inputs: npt.ArrayLike,
    *,
    threshold: float = 0.0,
    criterion: str = "entropy",
    batch_size: int = 256,
) -> Answers:
    """Answer samples with client i, and with its server where the exit is unsure.

    Args:
      run: the networks, see `restore`.
      i: the client's id.
      inputs: samples as the dataset stores them, ``[M, ...]``, before `normalize`; of
        a run with views the whole samples, of which each client sees its own.
      threshold: the exit answers the samples with an uncertainty below it; with 0 the
        server answers every sample. `hsee gate` finds one for each client.
      criterion: the measure of uncertainty, a name in `CRITERIA`.
      batch_size: samples that run at once.

    Returns:
      The answers to all M samples, on the host.

    Raises:
      UserError: there is no such client or criterion, or the criterion gives a
        negative uncertainty; the clients kept their layers private, or `restore` has
        not read all layers, see ``only``; the threshold or the batch size is not
        allowed; or the samples have another shape or type than the run's data, or
        values that it cannot hold.
    """
    samples = _samples(inputs, run.info)
    batch_size = BATCH_SIZE.checked(batch_size)
    threshold = _THRESHOLD.checked(threshold)
    place = run.federation.seat(i)
    check_layers(run.config)
    check_read(run.state)
    gate = gate_of(
        run.federation,
        run.strategy,
        place[0],
        batch_size=batch_size,
        criterion=criterion,
    )
    view = views_in(run.config, run.info).take
    answer = answers_of(gate, run.federation, run.strategy, run.state, view, *place)
    parts = [
        answer(
            normalize(
                jnp.asarray(samples[first : first + batch_size]),
                run.info.mean,
                run.info.std,
            ),
            threshold,
        )
        for first in range(0, len(samples), batch_size)
    ]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def _samples(inputs: npt.ArrayLike, info: DatasetInfo) -> npt.NDArray:
    """Check the samples, and give them the type of the run's data."""
    try:
        samples = np.asarray(inputs)
    except ValueError as error:
        raise UserError(
            f"inputs: they are no array ({error}); allowed is one sample or more of "
            f"{list(info.input_shape)}"
        ) from error
    if samples.shape[1:] != tuple(info.input_shape) or not len(samples):
        raise UserError(
            f"inputs: the shape {list(samples.shape)} is not allowed; allowed is one "
            f"sample or more of {list(info.input_shape)}"
        )
    integers = np.issubdtype(samples.dtype, np.integer)
    if not integers and not np.can_cast(samples.dtype, info.dtype, "same_kind"):
        raise UserError(
            f"inputs: the type {samples.dtype} is not allowed; allowed is {info.dtype}"
        )
    with np.errstate(over="ignore", invalid="ignore"):  # refused below
        found = samples.astype(info.dtype)
    if integers and np.issubdtype(found.dtype, np.integer):
        wrong, allowed = found != samples, "0..255"
    else:
        wrong, allowed = ~np.isfinite(found), f"finite numbers in {info.dtype}"
    if wrong.any():
        first = np.unravel_index(np.argmax(wrong), wrong.shape)
        raise UserError(
            f"inputs: {samples[first]} at {list(map(int, first))} is not allowed; "
            f"allowed are {allowed}"
        )
    return found
