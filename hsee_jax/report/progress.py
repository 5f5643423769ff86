"""Figures over the rounds, or over what they spend: test accuracy and training loss."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hsee_jax.report.curves import BRANCHES, Curve, Values, spread
from hsee_jax.report.spending import SECONDS, Quantity, spent
from hsee_jax.report.style import LINE, WIDTH, curve_style, show_percent, wrap


class _Line(NamedTuple):
    """A line for exits and a line for servers."""

    x: Sequence[float] | Values  # R
    values: Values  # ``[S, R, 2]``


def accuracy(curves: Sequence[Curve]) -> Figure:
    """Draw the test accuracy over the rounds, as the mean over clients."""
    lines = [_Line(curve.rounds, _accuracy(curve)) for curve in curves]
    return _of_accuracy(_over_rounds(curves, lines))


def accuracy_over(curves: Sequence[Curve], quantity: Quantity) -> Figure:
    """Draw the test accuracy over what the rounds have spent, as means over seeds.

    Args:
      curves: the curves; at least one knows the quantity, the others are not drawn.
      quantity: what is spent.
    """
    totals = [spent(curve, quantity) for curve in curves]
    lines = [
        None if total is None else _Line(total.mean(axis=0), _accuracy(curve))
        for curve, total in zip(curves, totals, strict=True)
    ]
    most = max(line.x[-1] for line in lines if line is not None)
    scale, unit = _unit(quantity, most)
    figure = _panels(curves, lines, f"{quantity.name}{unit}")
    for panel in figure.axes:
        panel.xaxis.set_major_locator(MaxNLocator(5 if most < 1e5 * scale else 2))
        panel.xaxis.set_major_formatter(lambda x, _: f"{x / scale:,.10g}")
    return _of_accuracy(figure)


def _unit(quantity: Quantity, most: float) -> tuple[float, str]:
    """Return the size of a unit on the axis, and its name in brackets."""
    if quantity is SECONDS:
        return 1.0, ""
    power = min(int(math.log10(max(most, 1.0)) / 3), 4)
    return 1000.0**power, f" ({' kMGT'[power].strip()}{quantity.unit})"


def training_loss(curves: Sequence[Curve]) -> Figure:
    """Draw the training loss over the rounds, as the mean over samples."""
    losses = [curve.losses for curve in curves]
    lines = [_Line(range(1, 1 + one.shape[1]), one) for one in losses]
    figure = _over_rounds(curves, lines)
    figure.axes[0].set_ylabel("cross-entropy (nats)")
    return figure


def _accuracy(curve: Curve) -> Values:
    """Return the mean accuracy over the clients, ``[S, R, 2]``."""
    return curve.accuracy.mean(axis=-1)


def _of_accuracy(figure: Figure) -> Figure:
    figure.axes[0].set_ylabel("test accuracy")
    show_percent(figure.axes[0].yaxis)
    return figure


def _over_rounds(curves: Sequence[Curve], lines: Sequence[_Line]) -> Figure:
    figure = _panels(curves, lines, "round")
    for panel in figure.axes:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _panels(
    curves: Sequence[Curve], lines: Sequence[_Line | None], xlabel: str
) -> Figure:
    """Draw a panel for exits and a panel for servers, with a line for each curve."""
    labels = [wrap(curve.label) for curve in curves]
    height = sum(label.count("\n") + 1 for label in labels) * LINE
    figure = Figure((WIDTH, 3.6 + height))
    panels = figure.subplots(1, len(BRANCHES), sharey=True)
    for branch, (name, panel) in enumerate(zip(BRANCHES, panels, strict=True)):
        drawn = [(n, line) for n, line in enumerate(lines) if line is not None]
        for number, line in drawn:
            _plot(panel, line, branch, number, labels[number])
        panel.set_title(f"{name}s")
        panel.set_xlabel(xlabel)
        panel.set_xlim(0, 1.03 * max(line.x[-1] for _, line in drawn) or 1)
    handles, _ = panels[0].get_legend_handles_labels()
    figure.legend(handles=handles, loc="outside lower left", frameon=False)
    return figure


def _plot(panel: Axes, line: _Line, branch: int, number: int, label: str) -> None:
    """Draw the mean over seeds, and a band of one standard deviation to each side."""
    mean, deviation = spread(line.values[:, :, branch])
    style = curve_style(number)
    every = max(1, len(mean) // 12)
    panel.plot(line.x, mean, markevery=every, label=label, **style)
    if len(line.values) > 1:
        panel.fill_between(
            line.x,
            mean - deviation,
            mean + deviation,
            color=style["color"],
            alpha=0.2,
            linewidth=0,
        )
