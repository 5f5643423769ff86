"""A picture of a round: who computes, sends, waits and serves when."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from hsee_jax.report.style import RC, png
from hsee_jax.systems.intervals import Interval, intervals
from hsee_jax.systems.outcome import Plan
from hsee_jax.systems.problem import Problem

_ROWS = 24  # kinds of clients, at most
_WORKERS = 4  # at most


class _Look(NamedTuple):
    """The look of the bars of an activity."""

    lane: float  # of the row, the centre is 0
    height: float
    color: str
    hatch: str = ""
    edge: str = "white"  # of the bars and of their hatches


# Computing is above the middle of a row, the link below it.
_LOOKS = {
    "forward": _Look(-0.2, 0.36, "#56B4E9"),
    "backward": _Look(-0.2, 0.36, "#0072B2", "////"),
    "upload": _Look(0.2, 0.36, "#E69F00"),
    "download": _Look(0.2, 0.36, "#009E73", "\\\\\\\\"),
    "weights up": _Look(0.2, 0.36, "#CC79A7", "...."),
    "weights down": _Look(0.2, 0.36, "#CC79A7", "xxxx"),
    "server": _Look(0.0, 0.76, "#444444", edge="#444444"),
}
_RC = RC | {"hatch.linewidth": 0.6}


def draw_round(problem: Problem, plan: Plan) -> bytes:
    """Draw a round as PNG, with a row for each kind of client and server worker.

    A kind is a device and a cut; its row shows the client that is ready last. Of more
    than 24 kinds the picture shows those that are ready last, and of more than 4
    workers the first 4.

    Args:
      problem: the planner's problem.
      plan: the planner's answer.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = _clients(problem, plan)
    bars = list(intervals(plan.time.spans[1:], rows))
    served = list(intervals(plan.time.spans[:1], range(len(plan.cuts))))
    workers = sorted({bar.worker for bar in served if bar.worker is not None})
    workers = workers[:_WORKERS]
    places = {("client", client): place for place, client in enumerate(rows)}
    places |= {("server", w): len(rows) + n for n, w in enumerate(workers)}
    with mpl.rc_context(_RC):
        figure = Figure((9.0, 1.6 + 0.36 * len(places)))
        panel = figure.subplots()
        panel.set_xlim(0, plan.time.seconds * 1.01)
        shown = [
            kind
            for kind, look in _LOOKS.items()
            if _draw(panel, look, kind, [*bars, *served], places)
        ]
        panel.set_yticks(list(places.values()), _labels(problem, plan, rows, workers))
        panel.set_ylim(len(places) - 0.4, -0.6)
        panel.set_xlabel("seconds")
        patches = [
            Patch(facecolor=_LOOKS[kind].color, hatch=_LOOKS[kind].hatch, label=kind)
            for kind in shown
        ]
        figure.legend(
            handles=patches, loc="outside lower center", ncols=4, frameon=False
        )
        figure.suptitle(f"A round of {plan.time.seconds:,.1f} s", fontsize="medium")
        return png(figure)


def _draw(
    panel: Any,
    look: _Look,
    kind: str,
    bars: Sequence[Interval],
    places: dict[tuple[str, int], int],
) -> bool:
    """Draw the bars of an activity; return whether there are any."""
    by_place: dict[int, list[tuple[float, float]]] = {}
    for bar in bars:
        row = ("client", bar.client) if bar.worker is None else ("server", bar.worker)
        if bar.kind == kind and row in places:
            spans = by_place.setdefault(places[row], [])
            spans.append((bar.start_s, bar.end_s - bar.start_s))
    for place, spans in by_place.items():
        narrow = np.median([width for _, width in spans]) < 0.005 * panel.get_xlim()[1]
        panel.broken_barh(
            spans,
            (place + look.lane - look.height / 2, look.height),
            facecolors=look.color,
            hatch=look.hatch,
            edgecolor=look.color if narrow else look.edge,
            linewidth=0.4,
        )
    return bool(by_place)


def _clients(problem: Problem, plan: Plan) -> list[int]:
    """Return the client of each kind that is ready last, in the order of clients."""
    ready = plan.time.seconds - plan.time.shares.waiting_s
    last: dict[tuple[str, int], int] = {}
    for client, device in enumerate(problem.devices):
        kind = device.name, int(plan.cuts[client])
        if kind not in last or ready[client] > ready[last[kind]]:
            last[kind] = client
    slowest = sorted(last.values(), key=lambda client: -ready[client])[:_ROWS]
    return sorted(slowest)


def _labels(
    problem: Problem, plan: Plan, rows: Sequence[int], workers: Sequence[int]
) -> list[str]:
    names = np.array([device.name for device in problem.devices])
    labels = []
    for client in rows:
        name, cut = names[client], plan.cuts[client]
        count = int(np.sum((names == name) & (plan.cuts == cut)))
        labels.append(f"{name}, cut {cut} ({count})")
    return [*labels, *(f"server {worker + 1}" for worker in workers)]
