"""The look of all figures: colours, markers, dashes and sizes.

The colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/) without
yellow. No distinction rests on colour alone. Figures are narrow and their text is
large, so that they can be read at half their size.
"""

import io
import textwrap
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split()
MARKERS = "osD^vPX"
DASHES = ("-", "--", ":", "-.")
BRANCH: dict[str, dict[str, Any]] = {
    "exit": {"color": "#E69F00", "hatch": "///", "marker": "o"},
    "server": {"color": "#0072B2", "hatch": "", "marker": "s"},
}
RC: dict[Any, Any] = {
    "figure.constrained_layout.use": True,
    "figure.dpi": 200,
    "figure.titlesize": "medium",
    "font.size": 11,
    "axes.titlesize": "medium",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dddddd",
    "hatch.color": "white",
    "lines.linewidth": 1.8,
    "text.parse_math": False,
}
WIDTH = 7.2  # inches
LINE = 0.22  # inches; the height of a line of text
MANY = 40  # clients; a figure does not show more than these one by one


def wrap(text: str, *, share: float = 1.0) -> str:
    """Break lines of text that are longer than a share of the width of a figure."""
    width = round(80 * share)
    return "\n".join(textwrap.fill(line, width) for line in text.splitlines())


def curve_style(number: int) -> dict[str, Any]:
    """Return the colour, marker and dashes of a curve, from its number."""
    kind, turn = number % len(COLOURS), number // len(COLOURS)
    return {
        "color": COLOURS[kind],
        "marker": MARKERS[kind],
        "linestyle": DASHES[turn % len(DASHES)],
        "markersize": 6,
    }


def show_percent(axis: "Axis", most: int = 7) -> None:
    """Label an axis of shares in percent, at round numbers.

    Args:
      axis: the axis.
      most: the most steps between the first and the last label.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(PercentFormatter(1))


def png(figure: "Figure") -> bytes:
    """Return a figure as PNG; letters that the font lacks are boxes."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(file, format="png")
    return file.getvalue()


def num_clients(count: int) -> str:
    """Return a number of clients as text."""
    return "1 client" if count == 1 else f"{count} clients"
