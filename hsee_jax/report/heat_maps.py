"""Figures with a cell for each class: the accuracy by cut, the samples by client."""

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator, PercentFormatter

from hsee_jax.engine.agreement import Agreement
from hsee_jax.report.curves import BRANCHES, Curve, Run
from hsee_jax.report.style import MANY, WIDTH

_MANY_CLASSES = 12  # cells of more classes are too small for numbers


def classes(curve: Curve) -> Figure:
    """Draw the accuracy within each class, with a row for each cut.

    Args:
      curve: a curve whose `agreement` is not None.
    """
    cuts = np.unique(curve.cuts)
    figure = Figure((WIDTH, 1.8 + 2 * max(0.35 * len(cuts), 0.6)))
    panels = figure.subplots(len(BRANCHES), sharex=True)
    for branch, panel in zip(BRANCHES, panels, strict=True):
        image = _heat_map(
            panel,
            np.array([_accuracy(curve, cut, branch) for cut in cuts]),
            norm=Normalize(0, 1),
            colours="cividis",
            text="{:.0%}".format,
        )
        panel.set_yticks(range(len(cuts)), [f"cut {cut}" for cut in cuts])
        panel.set_title(f"{branch}s")
    panels[-1].set_xlabel("class, by its number")
    label = "right answers"
    figure.colorbar(image, ax=panels, label=label, pad=0.01, format=PercentFormatter(1))
    return figure


def _accuracy(curve: Curve, cut: int, branch: str) -> Any:
    """Return the accuracy ``[K]`` within each class; NaN without samples."""
    counts: Any = curve.agreement
    total = Agreement.of(counts[curve.cuts == cut].sum(axis=0))
    right = getattr(total, f"{branch}_correct")
    samples = np.where(total.samples > 0, total.samples, np.nan)
    return right / samples


def split(run: Run) -> Figure:
    """Draw the training samples of each client, with a column for each class."""
    counts = np.array([share.label_counts for share in run.partition])
    figure = Figure((WIDTH, min(1.8 + 0.26 * len(counts), 11.5)))
    panel = figure.subplots()
    image = _heat_map(
        panel,
        np.ma.masked_equal(counts, 0),
        norm=PowerNorm(0.5, vmin=0, vmax=counts.max()),
        colours="Blues",
        text=str,
    )
    figure.colorbar(image, label="samples", pad=0.01, aspect=40)
    panel.set_xlabel("class, by its number")
    panel.set_ylabel("client")
    if len(counts) <= MANY:
        names = [f"{s.id} (cut {s.cut}, {s.samples} samples)" for s in run.partition]
        panel.set_yticks(range(len(counts)), names, fontsize="small")
    return figure


def _heat_map(
    panel: Axes,
    values: Any,
    *,
    norm: Normalize,
    colours: str,
    text: Callable[[Any], str],
) -> AxesImage:
    """Draw values ``[R, K]`` as cells, with numbers where there is room."""
    rows, columns = values.shape
    values = np.ma.masked_invalid(values)
    panel.grid(visible=False)
    image = panel.imshow(
        values, norm=norm, cmap=colours, aspect="auto", interpolation="nearest"
    )
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    if columns <= 20:
        panel.set_xticks(range(columns))
    if columns > _MANY_CLASSES or rows > MANY:
        return image
    for row, column in np.argwhere(~np.ma.getmaskarray(values)):
        value = values[row, column]
        red, green, blue, _ = colormaps[colours](norm(value))
        dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
        panel.text(
            column,
            row,
            text(value),
            color="white" if dark else "black",
            ha="center",
            va="center",
            fontsize="small",
            in_layout=False,  # the panel holds the text; layout is slow
        )
    return image
