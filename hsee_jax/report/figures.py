"""The figures of a report.

They use the colours of Okabe and Ito (https://jfly.uni-koeln.de/color/) without yellow;
no distinction rests on colour alone.
"""

import io
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hsee_jax.report.curves import BRANCHES, Curve, Run, spread

_COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split()
_MARKERS = "osD^vPX"
_LINES = ("-", "--", ":", "-.")
_BRANCH: dict[str, dict[str, Any]] = {
    "exit": {"color": "#E69F00", "hatch": "///", "marker": "o"},
    "server": {"color": "#0072B2", "hatch": "", "marker": "s"},
}
_STYLE: dict[Any, Any] = {
    "figure.constrained_layout.use": True,
    "figure.dpi": 150,
    "figure.titlesize": "medium",
    "axes.titlesize": "medium",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dddddd",
    "hatch.color": "white",
    "text.parse_math": False,
}
_WIDTH = 9.0  # inches
_MANY = 40  # clients; a figure does not show more than these one by one


class Picture(NamedTuple):
    """A drawn figure."""

    name: str  # the name of its file
    title: str  # also drawn in the figure
    figure: Figure
    png: bytes


def draw(curves: Sequence[Curve]) -> list[Picture]:
    """Draw all the figures of a report.

    Args:
      curves: at least one curve.

    Returns:
      The accuracy over rounds; a comparison, if there are several curves; the clients
      of each curve; each different split of the labels.
    """
    with mpl.rc_context(_STYLE):
        return [
            _picture(name, title, figure) for name, title, figure in _figures(curves)
        ]


def _picture(name: str, title: str, figure: Figure) -> Picture:
    lines = [textwrap.fill(line, 95) for line in title.splitlines()]
    figure.suptitle("\n".join(lines))
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Picture(f"{name}.png", title, figure, file.getvalue())


def _figures(curves: Sequence[Curve]) -> Iterator[tuple[str, str, Figure]]:
    over_seeds = "; {}: ± standard deviation over seeds"
    several = any(len(curve.runs) > 1 for curve in curves)
    title = "Test accuracy, mean over clients" + over_seeds.format("band") * several
    yield "accuracy", title, _accuracy(curves)
    if len(curves) > 1:
        title = "Final test accuracy, mean over clients"
        title += over_seeds.format("small: each run; line") * several
        yield "comparison", title, _comparison(curves)
    for number, curve in enumerate(curves, start=1):
        if len(curve.cuts) > _MANY:
            figure = _cuts(curve)
            what = "cut, mean over its clients; line: ± standard deviation over them"
        else:
            figure = _clients(curve)
            what = "client" + over_seeds.format("line") * (len(curve.runs) > 1)
        title = f"Final test accuracy of each {what}\n{curve.label}"
        yield f"clients-{number}", title, figure
    for number, runs in enumerate(_splits(curves), start=1):
        names = ", ".join(run.name for run in runs)
        title = f"Training samples by client and label (empty: none)\n{names}"
        yield f"split-{number}", title, _split(runs[0])


def _splits(curves: Sequence[Curve]) -> list[list[Run]]:
    """Group the runs by equal partitions."""
    splits: list[list[Run]] = []
    for run in (run for curve in curves for run in curve.runs):
        for runs in splits:
            if runs[0].partition == run.partition:
                runs.append(run)
                break
        else:
            splits.append([run])
    return splits


def _accuracy(curves: Sequence[Curve]) -> Figure:
    """Draw a panel for exits and one for servers, with a line for each curve."""
    labels = [textwrap.fill(curve.label, 95) for curve in curves]
    figure = Figure((_WIDTH, 4 + 0.2 * sum(label.count("\n") + 1 for label in labels)))
    panels = figure.subplots(1, len(BRANCHES), sharey=True)
    for b, (branch, panel) in enumerate(zip(BRANCHES, panels, strict=True)):
        for number, curve in enumerate(curves):
            mean, deviation = spread(curve.accuracy[:, :, b].mean(axis=-1))
            style = _curve_style(number)
            panel.plot(
                curve.rounds,
                mean,
                markevery=max(1, len(mean) // 20),
                label=labels[number],
                **style,
            )
            if len(curve.runs) > 1:
                panel.fill_between(
                    curve.rounds,
                    mean - deviation,
                    mean + deviation,
                    color=style["color"],
                    alpha=0.2,
                    linewidth=0,
                )
        panel.set_title(f"{branch}s")
        panel.set_xlabel("round")
        panel.set_xlim(0, 1.03 * max(curve.rounds[-1] for curve in curves))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel("test accuracy")
    handles, _ = panels[0].get_legend_handles_labels()
    figure.legend(handles=handles, loc="outside lower left", frameon=False)
    return figure


def _curve_style(number: int) -> dict[str, Any]:
    kind, turn = number % len(_COLOURS), number // len(_COLOURS)
    return {
        "color": _COLOURS[kind],
        "marker": _MARKERS[kind],
        "linestyle": _LINES[turn % len(_LINES)],
        "markersize": 5,
    }


def _comparison(curves: Sequence[Curve]) -> Figure:
    """Draw a line for each curve, with a mark for its exits and one for its servers."""
    labels = [textwrap.fill(curve.label, 40) for curve in curves]
    lines = sum(label.count("\n") + 2 for label in labels)
    figure = Figure((_WIDTH, 1.6 + 0.2 * lines))
    panel = figure.subplots()
    for b, branch in enumerate(BRANCHES):
        places = np.arange(len(curves)) + (b - 0.5) * 0.3
        style = {"color": _BRANCH[branch]["color"], "linestyle": "none"}
        style["marker"] = _BRANCH[branch]["marker"]
        ends = [curve.final[:, b].mean(axis=-1) for curve in curves]
        means, deviations = zip(*map(spread, ends), strict=True)
        panel.errorbar(
            means, places, xerr=deviations, label=f"{branch}s", capsize=4, **style
        )
        for values, place in zip(ends, places, strict=True):
            if len(values) > 1:
                at = np.full(len(values), place)
                panel.plot(values, at, alpha=0.5, markersize=3, **style)
    panel.set_yticks(range(len(curves)), labels)
    panel.set_ylim(len(curves) - 0.5, -0.5)
    panel.set_xlabel("test accuracy")
    figure.legend(loc="outside lower center", ncols=len(BRANCHES), frameon=False)
    return figure


def _clients(curve: Curve) -> Figure:
    """Draw two bars for each client, in the order of the cuts."""
    order = np.argsort(curve.cuts, kind="stable")
    means, deviations = spread(curve.final[:, :, order])
    cuts = curve.cuts[order]
    # Leave a gap between the cuts.
    places = np.arange(len(cuts)) + np.unique(cuts, return_inverse=True)[1]
    figure = _bars(places, means, deviations if len(curve.runs) > 1 else None)
    panel = figure.axes[0]
    panel.set_xticks(places, order, fontsize="small")
    below = panel.secondary_xaxis(0)
    centres = [places[cuts == cut].mean() for cut in np.unique(cuts)]
    below.set_xticks(centres, [f"cut {cut}" for cut in np.unique(cuts)])
    below.set_xlabel("client")
    below.tick_params(length=0, pad=20)  # under the clients
    below.spines["bottom"].set_visible(False)
    return figure


def _cuts(curve: Curve) -> Figure:
    """Draw two bars for each cut."""
    by_client = curve.final.mean(axis=0)
    cuts, sizes = np.unique(curve.cuts, return_counts=True)
    spreads = [spread(by_client[:, curve.cuts == cut].T) for cut in cuts]
    means, deviations = (np.array(part).T for part in zip(*spreads, strict=True))
    figure = _bars(np.arange(len(cuts)), means, deviations)
    labels = [f"cut {cut}\n({n} clients)" for cut, n in zip(cuts, sizes, strict=True)]
    figure.axes[0].set_xticks(range(len(cuts)), labels)
    return figure


def _bars(places: Any, means: Any, deviations: Any) -> Figure:
    """Draw a bar for each branch at P places; means and deviations are ``[2, P]``."""
    figure = Figure((_WIDTH, 4))
    panel = figure.subplots()
    for b, branch in enumerate(BRANCHES):
        panel.bar(
            places + (b - 0.5) * 0.4,
            means[b],
            0.4,
            yerr=None if deviations is None else deviations[b],
            error_kw={"elinewidth": 1, "capsize": 2},
            color=_BRANCH[branch]["color"],
            hatch=_BRANCH[branch]["hatch"],
            label=branch,
        )
    panel.grid(visible=False, axis="x")
    panel.set_xlim(places[0] - 1, places[-1] + 1)
    panel.set_ylim(bottom=0)
    panel.set_ylabel("test accuracy")
    figure.legend(loc="outside lower center", ncols=len(BRANCHES), frameon=False)
    return figure


def _split(run: Run) -> Figure:
    """Draw the samples of clients by labels, with numbers where there is room."""
    counts = np.array([share.label_counts for share in run.partition])
    clients, labels = counts.shape
    figure = Figure((_WIDTH, min(1.8 + 0.25 * clients, 11)))
    panel = figure.subplots()
    panel.grid(visible=False)
    scale = PowerNorm(0.5, vmin=0, vmax=counts.max())
    image = panel.imshow(
        np.ma.masked_equal(counts, 0),
        norm=scale,
        cmap="Blues",
        aspect="auto",
        interpolation="nearest",
    )
    figure.colorbar(image, label="samples", pad=0.01)
    panel.set_xlabel("label")
    panel.set_ylabel("client")
    panel.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    panel.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
    if labels <= 20:
        panel.set_xticks(range(labels))
    if clients <= _MANY:
        names = [f"{s.id} (cut {s.cut}, {s.samples} samples)" for s in run.partition]
        panel.set_yticks(range(clients), names, fontsize="small")
        if labels <= 12:
            for (row, column), count in np.ndenumerate(counts):
                if count:
                    colour = "white" if scale(count) > 0.6 else "black"
                    panel.text(
                        column,
                        row,
                        str(count),
                        color=colour,
                        ha="center",
                        va="center",
                        fontsize="small",
                        in_layout=False,  # the panel holds the text; layout is slow
                    )
    return figure
