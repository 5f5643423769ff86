"""Train the runs of a study, each in a process of its own."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hsee_jax.config.plugins import load_plugins
from hsee_jax.core.errors import Stopped, UserError
from hsee_jax.parallel.cores import cores
from hsee_jax.runs.folder import sole_writer
from hsee_jax.studies.digests import Digests
from hsee_jax.studies.results import (
    Result,
    append_result,
    read_results,
    result_of,
)
from hsee_jax.studies.study import Run
from hsee_jax.studies.train import changes, refusal, train_run

_PASSED_ON = (signal.SIGINT, signal.SIGTERM)  # by the parent, which stops the runs


class End(NamedTuple):
    """How a run ended."""

    run: Run
    how: Literal["finished", "diverged", "stopped", "refused", "failed"]
    text: str  # where it stopped or diverged, or why it was refused or failed
    result: Result | None = None  # of a run that is finished or diverged


def perform(
    runs: Sequence[Run],
    out: str | os.PathLike[str],
    *,
    jobs: int = 1,
    overwrite: bool = False,
    stop: Callable[[], bool] = lambda: False,
    setup: Callable[[], None] | None = None,
    on_end: Callable[[End], None] = lambda end: None,
    digests: Digests | None = None,
) -> list[End]:
    """Train the runs that are not finished, several at once, and append their results.

    Each run trains in a new process on its share of the cores. A run that was stopped
    or killed continues from its last checkpoint. The processes are spawned, so a script
    must call this below ``if __name__ == "__main__":``. They end with this process.

    Args:
      runs: the runs, in the order of their start.
      out: the folder of the study; it gets ``results.jsonl``, and a folder for each
        run in ``runs/``.
      jobs: the number of processes at once, at most one a core.
      overwrite: replace runs in the folder whose settings or data have changed since.
      stop: called about ten times a second; true stops the runs at work after their
        step, with a checkpoint, and no other run starts.
      setup: called in each process once its plugins are there; a module-level function.
      on_end: called when a run has ended, after its result is written.
      digests: of the data of runs, as far as they are known already.

    Returns:
      The end of each run that was started. After a run is refused, no other starts.

    Raises:
      UserError: ``jobs`` is not allowed, the folder is that of a run, another process
        writes to it, or it holds a run with other settings or on other data and
        ``overwrite`` is not set.
    """
    available = cores()
    if not 1 <= jobs <= len(available):
        raise UserError(
            f"jobs: {jobs} is not allowed; allowed are 1..{len(available)}, the cores "
            "of this machine"
        )
    out = Path(out)
    if (out / "config.json").exists():
        raise UserError(
            f"out: {out} holds a run; allowed is a new folder, or that of a study"
        )
    with sole_writer(out):
        digests = digests or Digests()
        todo = unfinished(runs, out, digests)
        for run in todo:
            begun = os.path.isfile(_folder(out, run) / "config.json")
            digest = digests(run) if begun else None
            changed = changes(run, _folder(out, run), digest)
            if changed and not overwrite:
                raise refusal(run, _folder(out, run), changed)
        size = len(available) // jobs
        shares = [available[i * size : (i + 1) * size] for i in range(jobs)]
        return _Sweep(todo, out, shares, overwrite, setup, on_end).run(stop)


def unfinished(
    runs: Sequence[Run], out: Path, digests: Digests | None = None
) -> list[Run]:
    """Return the runs without a result in the folder of a study.

    Args:
      runs: of the study.
      out: its folder.
      digests: of the data of runs, as far as they are known already.
    """
    results, digests = read_results(out), digests or Digests()

    def is_done(run: Run) -> bool:
        found = result_of(run, results)
        if found is None or found.digest is None:
            return found is not None
        return result_of(run, results, digests(run)) is not None

    return [run for run in runs if not is_done(run)]


def _folder(out: Path, run: Run) -> Path:
    return out / "runs" / run.folder


class _Work(NamedTuple):
    """A run at work."""

    run: Run
    process: BaseProcess
    answer: Connection  # receives the end of the run
    share: list[int]  # its cores


class _Sweep:
    """Starts processes while there are runs and cores, and collects their ends."""

    def __init__(
        self,
        todo: list[Run],
        out: Path,
        shares: list[list[int]],
        overwrite: bool,
        setup: Callable[[], None] | None,
        on_end: Callable[[End], None],
    ) -> None:
        self._waiting, self._out, self._shares = list(todo), out, shares
        self._options = {"overwrite": overwrite, "setup": setup}
        self._on_end = on_end
        self._context = multiprocessing.get_context("spawn")
        self._told, self._tell = self._context.Pipe(duplex=False)
        self._at_work: dict[Any, _Work] = {}  # by the connection with the answer

    def run(self, stop: Callable[[], bool]) -> list[End]:
        """Perform all runs, or as many as ``stop`` allows."""
        ends: list[End] = []
        try:
            while self._waiting or self._at_work:
                if stop():
                    self._waiting.clear()
                    self._tell.close()  # every process sees the end of the pipe
                while self._waiting and self._shares:
                    self._start(self._waiting.pop(0))
                for ready in wait(self._at_work, timeout=0.1):
                    end = self._finish(self._at_work.pop(ready))
                    ends.append(end)
                    if end.how == "refused":
                        self._waiting.clear()
        finally:
            for work in self._at_work.values():
                work.process.kill()
                work.process.join()
        return ends

    def _start(self, run: Run) -> None:
        share = self._shares.pop()
        answer, tell = self._context.Pipe(duplex=False)
        process: BaseProcess = self._context.Process(
            target=_work,
            args=(run, _folder(self._out, run), share, self._told, tell),
            kwargs=self._options,
        )
        with _blocked():
            process.start()
        tell.close()  # the process has the only other end
        self._at_work[answer] = _Work(run, process, answer, share)

    def _finish(self, work: _Work) -> End:
        """Take the end of a run from its process, and write its result."""
        try:
            end = work.answer.recv()
            work.process.join()
        except (EOFError, OSError):  # the process died
            work.process.join()
            text = f"failed with status {work.process.exitcode}"
            end = End(work.run, "failed", text)
        work.answer.close()
        self._shares.append(work.share)
        if end.result is not None:
            append_result(self._out, end.result)
        self._on_end(end)
        return end


@contextlib.contextmanager
def _blocked() -> Iterator[None]:
    """Keep Ctrl-C from ending a process that starts here while it still imports.

    A process inherits the blocked signals; it ignores them only after its imports.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # the first process starts it, and it unblocks
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(
    run: Run,
    folder: Path,
    share: list[int],
    told: Connection,
    tell: Connection,
    *,
    overwrite: bool,
    setup: Callable[[], None] | None,
) -> None:
    """Train a run in this process, and send its end."""
    for number in _PASSED_ON:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, share)
    try:
        load_plugins(run.config.run.plugin)  # they may still choose devices
        if setup is not None:
            setup()
        result = train_run(run, folder, overwrite=overwrite, stop=told.poll)
        how: Any = "diverged" if result.diverged else "finished"
        end = End(run, how, result.diverged, result)
    except Stopped as stopped:
        end = End(run, "stopped", str(stopped))
    except UserError as error:
        end = End(run, "refused", str(error))
    tell.send(end)


def _end_with_parent() -> None:
    """End this process with its parent, so that no run keeps its folder locked."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
