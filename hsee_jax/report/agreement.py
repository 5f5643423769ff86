"""A figure of exit against server: whose answer is right, by cut."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from hsee_jax.engine.agreement import Agreement
from hsee_jax.report.curves import Curve
from hsee_jax.report.style import WIDTH, num_clients

_PARTS: dict[str, dict[str, Any]] = {
    "both": {"label": "both are right", "color": "#0072B2"},
    "exit_only": {
        "label": "only the exit is right",
        "color": "#E69F00",
        "hatch": "///",
    },
    "server_only": {
        "label": "only the server is right",
        "color": "#009E73",
        "hatch": "\\\\\\",
    },
    "neither": {"label": "both are wrong", "color": "#BBBBBB", "hatch": "..."},
}
_ROOM = 0.06  # a part with a smaller share has no room for its number


def agreement(curve: Curve) -> Figure:
    """Draw a bar for each cut, with a part for each case of `Agreement`.

    Args:
      curve: a curve whose `agreement` is not None.
    """
    cuts, sizes = np.unique(curve.cuts, return_counts=True)
    shares = np.array([_shares(curve, cut) for cut in cuts])
    ends = shares.cumsum(axis=1)
    figure = Figure((WIDTH, 1.9 + 0.55 * len(cuts)))
    panel = figure.subplots()
    panel.grid(visible=False)
    for share, end, part in zip(shares.T, ends.T, Agreement._fields, strict=True):
        panel.barh(range(len(cuts)), share, left=end - share, **_PARTS[part])
        for row in np.flatnonzero(share >= _ROOM):
            panel.text(
                end[row] - share[row] / 2,
                float(row),
                f"{share[row]:.0%}",
                ha="center",
                va="center",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 2},
                in_layout=False,
            )
    labels = map("cut {}\n({})".format, cuts, map(num_clients, sizes))
    panel.set_yticks(range(len(cuts)), list(labels))
    panel.set_ylim(len(cuts) - 0.5, -0.5)
    panel.set_xlim(0, 1)
    panel.set_xlabel("share of the test samples, mean over the clients of a cut")
    panel.xaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _shares(curve: Curve, cut: int) -> Any:
    """Return the shares ``[4]`` of the fields of `Agreement` at a cut."""
    counts: Any = curve.agreement
    total = counts[curve.cuts == cut].sum(axis=(0, 2))
    return total / total.sum()
