"""Threads that call the programs of a loop on a CPU side by side."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from hsee_jax.parallel.cores import cores

MOST = 8  # of the threads that a loop takes by itself: each holds a program's memory


def num_threads(choice: int) -> int:
    """Return the number of threads, for 0 one for each core at hand, at most `MOST`."""
    return choice or min(len(cores()), MOST)


class Streams:
    """Queues of calls; the calls of a queue come one after another, in their order.

    On a CPU, JAX runs the programs that one thread calls one after another, and those
    of several threads side by side. Programs with small operations leave cores idle,
    which programs beside them fill. Every program computes what it computes alone.
    The threads end with the object.

    Attributes:
      count: the number of queues.
    """

    def __init__(self, count: int) -> None:
        """Open the queues: a single one is the thread of whoever submits to it."""
        self.count = count
        self._threads = [
            ThreadPoolExecutor(1, thread_name_prefix=f"hsee-stream-{n}")
            for n in range(count if count > 1 else 0)
        ]

    def submit(self, n: int, call: Callable, *arguments: Any) -> Future:
        """Queue a call at the n-th of the queues, which are counted round and round."""
        if self._threads:
            return self._threads[n % len(self._threads)].submit(call, *arguments)
        done: Future = Future()
        done.set_result(call(*arguments))
        return done

    def submit_beside_first(self, n: int, call: Callable, *arguments: Any) -> Future:
        """Queue a call as `submit` does, but at the first queue only if it is alone."""
        others = max(len(self._threads) - 1, 1)
        return self.submit(1 + n % others, call, *arguments)
