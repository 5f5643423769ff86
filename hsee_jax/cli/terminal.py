"""The output on the terminal: progress, accuracies, costs and the log."""

import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from hsee_jax.data import OnBytes
from hsee_jax.engine.evaluation import GatedResult
from hsee_jax.runs.callbacks import Callback, Moment
from hsee_jax.runs.experiment import Experiment
from hsee_jax.runs.records import RoundRecord, Scores
from hsee_jax.systems.costs import LayerCost
from hsee_jax.systems.traffic import Bytes


def results_table(scores: Scores, *, title: str) -> Table:
    """Return a table of the clients: cuts, and accuracies of exits and servers.

    Args:
      scores: the scores of the clients.
      title: the title above the table.
    """
    table = Table(title=_title(title), show_footer=True)
    table.add_column("client", "mean", justify="right")
    table.add_column("cut", justify="right")
    means = scores.mean_exit_accuracy, scores.mean_server_accuracy
    for name, mean in zip(("exit", "server"), means, strict=True):
        table.add_column(f"{name} accuracy", f"{mean:.4f}", justify="right")
    several = any(client.early_accuracies for client in scores.clients)
    if several:
        table.add_column("earlier exits", justify="right")
    gates = any(client.gated for client in scores.clients)
    for name in ("gated exit", "gated server", "gated FLOPs") if gates else ():
        table.add_column(name, justify="right")
    for client in scores.clients:
        early = " ".join(f"{accuracy:.4f}" for accuracy in client.early_accuracies)
        table.add_row(
            str(client.id),
            str(client.cut),
            f"{client.exit_accuracy:.4f}",
            f"{client.server_accuracy:.4f}",
            *([early] if several else []),
            *_gated_cells(client.gated),
        )
    return table


def _gated_cells(gated: GatedResult | None) -> list[str]:
    """Return the cells of a client at its gated width, if there is one."""
    if gated is None:
        return []
    exit_, server = f"{gated.exit_accuracy:.4f}", f"{gated.server_accuracy:.4f}"
    return [exit_, server, f"{gated.flops_share:.1%}"]


def cost_table(costs: tuple[LayerCost, ...], crossing: Sequence[Bytes]) -> Table:
    """Return a table of the cuts: the cost of each layer, and the client's share.

    Args:
      costs: the costs of L layers, L exit heads and the final head, see `layer_costs`.
      crossing: for each of the L cuts, the bytes on the link for a sample in training.
    """
    count = len(costs) // 2
    layers, heads, final = costs[:count], costs[count:-1], costs[-1]
    total_parameters = sum(layer.parameters for layer in layers) + final.parameters
    total_flops = sum(layer.flops for layer in layers) + final.flops
    table = Table(
        title="per layer, and per cut after it (one sample, forward)",
        caption="A client holds the layers up to its cut, and an exit head; shares "
        "are of the network without exits. Up and down are the bytes that cross the "
        "link in training.",
    )
    for name in (
        "cut",
        "layer",
        "parameters",
        "MFLOPs",
        "output bytes",
        "client parameters",
        "client MFLOPs",
        "share",
        "up",
        "down",
    ):
        table.add_column(name, justify="left" if name == "layer" else "right")
    rows = zip(layers, heads, crossing, strict=True)
    for cut, (layer, head, sample) in enumerate(rows, start=1):
        parameters = sum(part.parameters for part in layers[:cut]) + head.parameters
        flops = sum(part.flops for part in layers[:cut]) + head.flops
        table.add_row(
            str(cut),
            Text(layer.name),
            f"{layer.parameters:,}",
            f"{layer.flops / 1e6:,.3f}",
            f"{layer.output_bytes:,}",
            f"{parameters:,}",
            f"{flops / 1e6:,.3f}",
            f"{flops / total_flops:.1%}",
            f"{sample.up_bytes:,}",
            f"{sample.down_bytes:,}",
        )
    table.add_row(
        "", Text(final.name), f"{final.parameters:,}", f"{final.flops / 1e6:,.3f}"
    )
    table.add_row("", "total", f"{total_parameters:,}", f"{total_flops / 1e6:,.3f}")
    return table


def text_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> Table:
    """Return a table of cells of text."""
    table = Table(title=_title(title))
    for column in columns:
        table.add_column(Text(column), justify="right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _title(text: str) -> Text:
    """Return a title that Rich prints as it is; brackets in it are not markup."""
    return Text(text, "table.title")


class ProgressBar(Callback):
    """A line for each round, on standard error, and a bar if that is a terminal."""

    def __init__(self, rounds: int) -> None:
        """Make the bar; it appears when training starts.

        Args:
          rounds: the number of rounds of the run.
        """
        self._console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._rounds = rounds
        self._task = self._bar.add_task("rounds", total=rounds)

    def __exit__(self, *error: object) -> None:
        """Stop the bar, and leave it on the terminal as it is."""
        if self._bar.live.is_started:
            self._bar.stop()

    def on_start(self, experiment: Experiment) -> None:
        """Say what the first round waits for."""
        count = len(experiment.federation.groups)
        cuts = "1 cut" if count == 1 else f"{count} cuts"
        waits = f"compiling the programs of {cuts}"
        self._bar.update(self._task, description=f"first round ({waits})")
        self._bar.start()
        if self._bar.disable:
            self._say(f"hsee: {waits}, then training; each round prints a line")

    def on_round(self, record: RoundRecord, moment: Moment) -> None:
        """Advance the bar to a round, and print the round's line."""
        self._bar.update(self._task, completed=record.round, description="rounds")
        text = (
            f"round {record.round}/{self._rounds}: training loss "
            f"exit {record.train.exit_loss:.3f}  server {record.train.server_loss:.3f}"
        )
        for ids, what in (
            (record.missed, "missed"),
            (record.left_out, "not finite, left out"),
        ):
            if ids:
                text += f"; {what}: {' '.join(map(str, ids))}"
        if record.simulated is not None:
            text += f"; simulated {record.simulated.end_s:,.1f} s"
        if record.test is not None:
            text += (
                f"; test accuracy exit {record.test.mean_exit_accuracy:.4f}"
                f"  server {record.test.mean_server_accuracy:.4f}"
            )
        self._say(text)

    def _say(self, line: str) -> None:
        """Print a line at once, above the bar."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def download_bar() -> Iterator[OnBytes]:
    """Yield a callback that shows a bar over the bytes of each file on a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Bar(
        *columns,
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        tasks: dict[str, Any] = {}

        def on_bytes(file: str, done: int, total: int | None) -> None:
            if file not in tasks:
                tasks[file] = bar.add_task(file)
            bar.update(tasks[file], completed=done, total=total)

        yield on_bytes


class _LogLines(logging.Handler):
    """Prints each message as a line on standard error, above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message; a bar replaces `sys.stderr` while it is shown."""
        print(f"hsee: {record.getMessage()}", file=sys.stderr, flush=True)


def show_log() -> None:
    """Print the log of the package, such as the source of data, on standard error."""
    log = logging.getLogger("hsee_jax")
    log.handlers, log.propagate = [_LogLines()], False  # print each line only once
    log.setLevel(logging.INFO)


def show(table: Table) -> None:
    """Print a table on standard output."""
    console = Console()
    if not console.is_terminal:  # do not fold at 80 columns in a pipe or a file
        console = Console(width=120)
    console.print(table)
