"""One run in several processes, each with its own devices.

All processes run the same program with the same arguments; each process holds a part of
every array that is spread over a mesh of all devices.
"""

import os
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from hsee_jax.core.errors import UserError


def join(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Join this process to several; call it before any other function of JAX.

    Args:
      coordinator: ``HOST:PORT`` of the first process. With ``"auto"`` JAX finds it, and
        so it does without any argument in a Slurm step of several tasks and on the
        workers of a TPU pod.
      num_processes: the number of processes.
      process_id: the number of this process, from 0.

    Raises:
      UserError: an argument is missing or not allowed, or the other processes cannot be
        reached.
    """
    given = (coordinator, num_processes, process_id) != (None, None, None)
    if not given and not _in_cluster():
        return
    arguments: tuple = ()
    if coordinator == "auto":
        for name, value in (
            ("num_processes", num_processes),
            ("process_id", process_id),
        ):
            if value is not None:
                raise UserError(f"{name}: is not allowed with --coordinator auto")
    elif given:
        arguments = _checked(coordinator, num_processes, process_id)
    try:
        jax.distributed.initialize(*arguments)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"coordinator: the processes cannot meet: {reason}") from error


def _in_cluster() -> bool:
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    workers = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return tasks != "1" or "," in workers


def _checked(
    coordinator: str | None, count: int | None, index: int | None
) -> tuple[str, int, int]:
    if coordinator is None or count is None or index is None:
        missing = "coordinator" if coordinator is None else "num_processes"
        if coordinator is not None and count is not None:
            missing = "process_id"
        raise UserError(
            f"{missing}: missing; several processes need coordinator, num_processes "
            "and process_id"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(
            f"coordinator: {coordinator} is not allowed; allowed is HOST:PORT, or auto"
        )
    if count < 1:
        raise UserError(f"num_processes: {count} is not allowed; allowed is 1 or more")
    if not 0 <= index < count:
        raise UserError(
            f"process_id: {index} is not allowed; allowed are 0..{count - 1}"
        )
    return coordinator, count, index


def check_devices() -> None:
    """Find the devices of this process; call it after `join`.

    Raises:
      UserError: JAX_PLATFORMS names devices that this machine does not have.
    """
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:  # JAX also asserts
        platforms = os.environ.get("JAX_PLATFORMS", "the default")
        reason = (str(error).splitlines() or ["JAX does not find it here"])[0]
        raise UserError(
            f"JAX_PLATFORMS: {platforms} is not allowed: {reason}; allowed are the "
            "kinds of device that this machine has, such as cpu"
        ) from error


def is_first() -> bool:
    """Return whether this is the first process, which writes for all."""
    return jax.process_index() == 0


def largest(number: int) -> int:
    """Return the largest number over all processes; every process must call this."""
    if jax.process_count() == 1:
        return number
    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def in_any(happened: bool) -> bool:
    """Return whether it happened in any process; every process must call this."""
    return largest(int(happened)) > 0


def in_first(act: Callable[[], None]) -> None:
    """Call ``act`` in the first process, and let the other processes wait for it.

    Raises:
      Exception: ``act`` raised it in this process.
      UserError: this is another process, and ``act`` raised an error in the first.
    """
    failure = None
    if is_first():
        try:
            act()
        except Exception as error:  # of any kind: the others must not wait for ever
            failure = error
    if jax.process_count() > 1:
        failed = multihost_utils.broadcast_one_to_all(np.int32(failure is not None))
        if failed and failure is None:
            failure = UserError("run: the first process says why it cannot go on")
    if failure is not None:
        raise failure
