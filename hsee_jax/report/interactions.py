"""The output of ``hsee interactions``: a table, ``interactions.json`` and a picture."""

from pathlib import Path

from hsee_jax.core.files import replace_file, writing
from hsee_jax.inference.interactions import Interactions
from hsee_jax.report.style import COLOURS, LINE, RC, WIDTH, png, show_percent
from hsee_jax.report.tables import Table
from hsee_jax.runs.json_text import dumps


def table(found: Interactions) -> Table:
    """Make a table with a row for each interaction."""
    return Table(
        f"interactions in the network of client {found.client}, from {found.samples} "
        "of its samples",
        ("order", "columns", "score", "share of variance"),
        [
            (
                str(len(one.columns)),
                one.text,
                f"{one.score:.4g}",
                f"{found.share(one):.1%}",
            )
            for one in found.chosen
        ],
    )


def write(found: Interactions, folder: Path) -> Path:
    """Write ``interactions.json`` and ``interactions.png``; return the first.

    Args:
      found: the interactions of a client.
      folder: the folder for the files, which are replaced; it is made if it is missing.

    Raises:
      UserError: the folder cannot be written to.
    """
    path = folder / "interactions.json"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(path, dumps(found.to_json()))
        replace_file(path.with_suffix(".png"), _picture(found))
    return path


def _picture(found: Interactions) -> bytes:
    """Draw a bar for each interaction, in the colour and hatch of its order."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(RC):
        figure = Figure((WIDTH, 1.8 + LINE * 1.3 * len(found.chosen)))
        panel = figure.subplots()
        orders = sorted({len(one.columns) for one in found.chosen})
        for number, order in enumerate(orders):
            places = [i for i, s in enumerate(found.chosen) if len(s.columns) == order]
            panel.barh(
                places,
                [found.share(found.chosen[place]) for place in places],
                color=COLOURS[number % len(COLOURS)],
                hatch=("", "///", "...")[number % 3],
                label=f"{order} columns",
            )
        panel.set_yticks(range(len(found.chosen)), [s.text for s in found.chosen])
        panel.invert_yaxis()
        panel.grid(visible=False, axis="y")
        panel.set(xlabel="share of the variance of the logits", ylabel="columns")
        show_percent(panel.xaxis)
        panel.legend(frameon=False)
        figure.suptitle(f"Interactions in the network of client {found.client}")
        return png(figure)
