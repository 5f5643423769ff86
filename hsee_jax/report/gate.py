"""The output of ``hsee gate``: tables, JSON and a picture of a `Study`.

The folder holds ``curve.json``, ``curve.md`` and ``curve.png`` and, if the user named a
target, ``thresholds.json``.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from hsee_jax.core.files import replace_file, writing
from hsee_jax.inference.client_study import Figures
from hsee_jax.report.style import DASHES, RC, WIDTH, curve_style, png, show_percent
from hsee_jax.report.tables import Table, markdown


class _Column(NamedTuple):
    """A column of a table: the heading and the format of a figure."""

    heading: str
    format: str
    scale: float = 1
    missing: str = ""  # the text for a figure that is None


_RESULTS = {
    "threshold": _Column("threshold", "{:.4f}"),
    "normalized_threshold": _Column("of largest", "{:.4f}"),
    "accuracy": _Column("accuracy", "{:.4f}"),
    "on_device": _Column("on device", "{:.1%}"),
    "bytes": _Column("bytes", "{:,.0f}"),
}
_COSTS = {
    "flops": _Column("MFLOPs", "{:,.3f}", 1e-6),
    "seconds": _Column("ms", "{:.3f}", 1e3),
    "relative_seconds": _Column("of all sent", "{:.2f}"),
}
_CLIENTS = {
    "id": _Column("client", "{}"),
    "cut": _Column("cut", "{}"),
    "exit_accuracy": _Column("exit accuracy", "{:.4f}"),
    "server_accuracy": _Column("server accuracy", "{:.4f}"),
    "exit_calibration_error": _Column("exit ECE", "{:.4f}", missing="not finite"),
    "server_calibration_error": _Column("server ECE", "{:.4f}", missing="not finite"),
}


_SEVERAL = {
    "early_accuracies": _Column("earlier exits", "{:.4f}"),
    "exit_shares": _Column("by exit", "{:.0%}"),
}


def tables(curve: Figures, thresholds: Figures | None) -> tuple[Table, Table]:
    """Return a table of the mean curve, and a table with a row for each client.

    Args:
      curve: see `Study.curve`.
      thresholds: see `Study.thresholds`; None if there was no target. The rows of the
        clients then hold no thresholds.
    """
    mean = _table(
        f"the device answers below a threshold of the {curve['criterion']}: mean over "
        f"clients on {curve['test_samples']} test samples, costs of a sample",
        curve["mean"],
        _RESULTS | _COSTS,
    )
    if thresholds is None:
        clients = curve["clients"]
        columns = _CLIENTS | _present(clients)
        return mean, _table("clients on the test samples", clients, columns)
    ((kind, value),) = thresholds["target"].items()
    return mean, _table(
        f"clients on the test samples, with thresholds for {kind} {value} from "
        f"{thresholds['validation_samples']} held-out samples",
        thresholds["clients"],
        _CLIENTS | _RESULTS | _present(thresholds["clients"]),
    )


def _present(records: list[Figures]) -> dict[str, _Column]:
    """Return the columns on several exits, where a client has several."""
    return {
        name: column
        for name, column in _SEVERAL.items()
        if any(name in record for record in records)
    }


def _table(title: str, records: list[Figures], columns: dict[str, _Column]) -> Table:
    def cell(name: str, value: Any) -> str:
        column = columns[name]
        if isinstance(value, list):
            return " ".join(map(column.format.format, value))
        if value is None:
            return column.missing
        return column.format.format(column.scale * value)

    return Table(
        title,
        tuple(column.heading for column in columns.values()),
        [[cell(name, record.get(name)) for name in columns] for record in records],
    )


def write(curve: Figures, thresholds: Figures | None, folder: Path) -> None:
    """Write the files of a study, and replace the files of an earlier study.

    Args:
      curve: see `Study.curve`.
      thresholds: see `Study.thresholds`; None keeps the thresholds of an earlier study.
      folder: the folder for the files; `write` makes it if it is missing.

    Raises:
      UserError: the folder cannot be written to.
    """
    parts = {"curve": curve, "thresholds": thresholds}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in parts.items():
            if part is not None:
                text = json.dumps(part, indent=2)
                replace_file(folder / f"{name}.json", text + "\n")
        pages = tables(curve, thresholds)
        text = "\n".join(f"{t.title}\n\n{markdown(t)}" for t in pages)
        replace_file(folder / "curve.md", text)
        replace_file(folder / "curve.png", _picture(curve, thresholds))


def _picture(curve: Figures, thresholds: Figures | None) -> bytes:
    """Plot accuracy and relative costs against the share on the device.

    The costs are relative to the costs of a gate that sends all samples to the server.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(RC):
        figure = Figure((WIDTH, 7))
        upper, lower = figure.subplots(2, sharex=True)
        _draw_accuracy(upper, curve, thresholds)
        _draw_costs(lower, curve["mean"])
        lower.set(xlabel="share answered on the device", xlim=(-0.02, 1.02))
        for axis in (upper.yaxis, lower.xaxis):
            show_percent(axis)
        for panel in (upper, lower):
            panel.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
        return png(figure)


def _draw_accuracy(panel: Any, curve: Figures, thresholds: Figures | None) -> None:
    """Draw a line for each client in the style of its cut, and their mean."""
    cuts = sorted({client["cut"] for client in curve["clients"]})
    styles = {
        cut: curve_style(number) | {"linestyle": DASHES[number % len(DASHES)]}
        for number, cut in enumerate(cuts)
    }
    labels = {cut: f"clients of cut {cut}" for cut in cuts}
    for client in curve["clients"]:
        style = styles[client["cut"]] | {"marker": "", "linewidth": 1}
        label = labels.pop(client["cut"], None)  # once in the legend
        panel.plot(*_xy(client["points"], "accuracy"), label=label, **style)
    for client in thresholds["clients"] if thresholds else ():
        style = styles[client["cut"]] | {"linestyle": "none"}
        panel.plot(*_xy([client], "accuracy"), **style)
    panel.plot(*_xy(curve["mean"], "accuracy"), "k", lw=2.5, label="mean")
    marks = "; marks: thresholds" if thresholds else ""
    title = f"Accuracy with the gate by {curve['criterion']}{marks}"
    panel.set(title=title, ylabel="test accuracy")


def _draw_costs(panel: Any, mean: list[Figures]) -> None:
    timed = [point for point in mean if point["seconds"] is not None]
    costs = {"bytes": mean, "flops": mean, "seconds": timed}
    labels = ("bytes sent", "FLOPs", "measured time")
    for number, (name, points) in enumerate(costs.items()):
        shares, values = _xy(points, name)
        if not values[0]:  # no features cross a link
            continue
        relative = [value / values[0] for value in values]
        every = 1 if points is timed else 5
        style = curve_style(number)
        panel.plot(shares, relative, markevery=every, label=labels[number], **style)
    title = "Cost of a sample, relative to sending all samples"
    panel.set(title=title, ylabel="relative cost", ylim=0)


def _xy(points: list[Figures], name: str) -> tuple[list[float], list[float]]:
    return [point["on_device"] for point in points], [point[name] for point in points]
