"""Figures of the accuracy after the last round: of curves, of clients, and of cuts."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hsee_jax.report.curves import BRANCHES, Curve, spread
from hsee_jax.report.style import BRANCH, LINE, WIDTH, num_clients, show_percent, wrap


def comparison(curves: Sequence[Curve]) -> Figure:
    """Draw a row for each curve, with a mark for its exits and one for its servers."""
    labels = [wrap(curve.label, share=0.42) for curve in curves]
    lines = sum(label.count("\n") + 1.8 for label in labels)
    figure = Figure((WIDTH, 1.6 + LINE * lines))
    panel = figure.subplots()
    for b, branch in enumerate(BRANCHES):
        places = np.arange(len(curves)) + (b - 0.5) * 0.3
        style = {"color": BRANCH[branch]["color"], "linestyle": "none"}
        style["marker"] = BRANCH[branch]["marker"]
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
    show_percent(panel.xaxis, 5)
    figure.legend(loc="outside lower center", ncols=len(BRANCHES), frameon=False)
    return figure


def clients(curve: Curve) -> Figure:
    """Draw two bars for each client, in the order of the cuts."""
    order = np.argsort(curve.cuts, kind="stable")
    means, deviations = spread(curve.final[:, :, order])
    cuts = curve.cuts[order]
    # Leave a gap between the cuts.
    places = np.arange(len(cuts)) + np.unique(cuts, return_inverse=True)[1]
    figure, panel = _panel()
    for b, branch in enumerate(BRANCHES):
        panel.bar(
            places + (b - 0.5) * 0.4,
            means[b],
            0.4,
            yerr=deviations[b] if len(curve.runs) > 1 else None,
            error_kw={"elinewidth": 1, "capsize": 2},
            color=BRANCH[branch]["color"],
            hatch=BRANCH[branch]["hatch"],
            label=branch,
        )
    panel.set_xlim(places[0] - 1, places[-1] + 1)
    upright = len(cuts) > 20
    panel.set_xticks(places, order, fontsize="small", rotation=90 if upright else 0)
    below = panel.secondary_xaxis(0)
    centres = [places[cuts == cut].mean() for cut in np.unique(cuts)]
    below.set_xticks(centres, [f"cut {cut}" for cut in np.unique(cuts)])
    below.set_xlabel("client, by its number")
    below.tick_params(length=0, pad=26 if upright else 22)  # under the clients
    below.spines["bottom"].set_visible(False)
    panel.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=len(BRANCHES), frameon=False)
    return figure


def cuts(curve: Curve) -> Figure:
    """Draw a dot for each client over its cut, and a line at their mean."""
    by_client = curve.final.mean(axis=0)
    distinct, sizes = np.unique(curve.cuts, return_counts=True)
    figure, panel = _panel()
    for b, branch in enumerate(BRANCHES):
        for place, cut in enumerate(distinct):
            values = by_client[b, curve.cuts == cut]
            centre = place + (b - 0.5) * 0.4
            panel.plot(
                centre + np.linspace(-0.14, 0.14, len(values)),
                values,
                linestyle="none",
                marker=BRANCH[branch]["marker"],
                color=BRANCH[branch]["color"],
                markersize=4,
                alpha=0.6,
                label=None if place else f"{branch} of a client",
            )
            panel.hlines(values.mean(), centre - 0.18, centre + 0.18, color="black")
    labels = map("cut {}\n({})".format, distinct, map(num_clients, sizes))
    panel.set_xticks(range(len(distinct)), list(labels))
    panel.set_xlim(-0.6, len(distinct) - 0.4)
    figure.legend(loc="outside lower center", ncols=len(BRANCHES), frameon=False)
    return figure


def _panel() -> tuple[Figure, Axes]:
    figure = Figure((WIDTH, 4))
    panel = figure.subplots()
    panel.grid(visible=False, axis="x")
    panel.set_ylabel("test accuracy")
    show_percent(panel.yaxis)
    return figure, panel
