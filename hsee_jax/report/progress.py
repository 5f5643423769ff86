"""Figures over the rounds: the test accuracy and the training loss of each curve."""

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hsee_jax.report.curves import BRANCHES, Curve, Values, spread
from hsee_jax.report.style import LINE, WIDTH, curve_style, show_percent, wrap


class _Line(NamedTuple):
    """A line for exits and a line for servers."""

    rounds: Sequence[int]  # R
    values: Values  # ``[S, R, 2]``


def accuracy(curves: Sequence[Curve]) -> Figure:
    """Draw the test accuracy over the rounds, as the mean over clients."""
    lines = [_Line(curve.rounds, curve.accuracy.mean(axis=-1)) for curve in curves]
    figure = _over_rounds(curves, lines)
    figure.axes[0].set_ylabel("test accuracy")
    show_percent(figure.axes[0].yaxis)
    return figure


def training_loss(curves: Sequence[Curve]) -> Figure:
    """Draw the training loss over the rounds, as the mean over samples."""
    losses = [curve.losses for curve in curves]
    lines = [_Line(range(1, 1 + one.shape[1]), one) for one in losses]
    figure = _over_rounds(curves, lines)
    figure.axes[0].set_ylabel("cross-entropy (nats)")
    return figure


def _over_rounds(curves: Sequence[Curve], lines: Sequence[_Line]) -> Figure:
    """Draw a panel for exits and a panel for servers, with a line for each curve."""
    labels = [wrap(curve.label) for curve in curves]
    height = sum(label.count("\n") + 1 for label in labels) * LINE
    figure = Figure((WIDTH, 3.6 + height))
    panels = figure.subplots(1, len(BRANCHES), sharey=True)
    for branch, (name, panel) in enumerate(zip(BRANCHES, panels, strict=True)):
        for number, line in enumerate(lines):
            _plot(panel, line, branch, number, labels[number])
        panel.set_title(f"{name}s")
        panel.set_xlabel("round")
        panel.set_xlim(0, 1.03 * max(line.rounds[-1] for line in lines))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, _ = panels[0].get_legend_handles_labels()
    figure.legend(handles=handles, loc="outside lower left", frameon=False)
    return figure


def _plot(panel: Axes, line: _Line, branch: int, number: int, label: str) -> None:
    """Draw the mean over seeds, and a band of one standard deviation to each side."""
    mean, deviation = spread(line.values[:, :, branch])
    style = curve_style(number)
    every = max(1, len(mean) // 12)
    panel.plot(line.rounds, mean, markevery=every, label=label, **style)
    if len(line.values) > 1:
        panel.fill_between(
            line.rounds,
            mean - deviation,
            mean + deviation,
            color=style["color"],
            alpha=0.2,
            linewidth=0,
        )
