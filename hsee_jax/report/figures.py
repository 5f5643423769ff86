"""The pictures of a report: which there are, their titles, and what to look for."""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure

from hsee_jax.report.agreement import agreement
from hsee_jax.report.curves import Curve, Run
from hsee_jax.report.final import clients, comparison, cuts
from hsee_jax.report.heat_maps import classes, split
from hsee_jax.report.progress import accuracy, accuracy_over, training_loss
from hsee_jax.report.spending import BYTES, JOULES, QUANTITIES, SECONDS, spent
from hsee_jax.report.style import MANY, RC, png, wrap


class _Sketch(NamedTuple):
    """A figure and its words."""

    name: str  # the name of its file, without the suffix
    title: str  # also drawn in the figure
    text: str  # how to read it
    figure: Figure


class Picture(NamedTuple):
    """A drawn figure."""

    name: str  # the name of its file
    title: str  # also drawn in the figure
    text: str  # how to read it
    figure: Figure
    png: bytes

    @property
    def heading(self) -> str:
        """Return the title without the part that pictures of one kind differ in."""
        return self.title.partition("\n")[0].partition(";")[0]


class Pictures(NamedTuple):
    """All pictures of a report."""

    overview: list[Picture]  # all curves in one picture
    curves: list[list[Picture]]  # of each curve
    splits: list[Picture]  # the training data, once for each different split

    @property
    def all(self) -> list[Picture]:
        """Return all pictures in the order of the page."""
        return [*self.overview, *chain(*self.curves), *self.splits]


def draw(curves: Sequence[Curve]) -> Pictures:
    """Draw all the figures of a report.

    Args:
      curves: at least one curve.

    Returns:
      The pictures. The overview holds the accuracy and the training loss over rounds,
      the accuracy over what the runs have spent, as far as they know it, and a
      comparison if there are several curves. Each curve has a picture of its clients,
      and, if its runs hold the counts for them, of the agreement of exit and server and
      of the accuracy by class. Each different split of the classes has a picture.
    """
    with mpl.rc_context(RC):
        return Pictures(
            [_picture(sketch) for sketch in _overview(curves)],
            [
                [_picture(sketch) for sketch in _of_curve(curve, number)]
                for number, curve in enumerate(curves, start=1)
            ],
            [_picture(sketch) for sketch in _of_splits(curves)],
        )


def _picture(sketch: _Sketch) -> Picture:
    sketch.figure.suptitle(wrap(sketch.title))
    return Picture(f"{sketch.name}.png", *sketch[1:], png(sketch.figure))


def _overview(curves: Sequence[Curve]) -> Iterator[_Sketch]:
    several = any(len(curve.runs) > 1 for curve in curves)
    band = "; band: ± standard deviation over seeds" * several
    yield _Sketch(
        "accuracy",
        "Test accuracy over rounds, mean over clients" + band,
        "The share of the test samples that the clients' exits (left) and the servers "
        "behind them (right) answer correctly. If a line still rises at its end, more "
        "rounds may help. The difference between left and right is what the server's "
        "layers add to those on the device.",
        accuracy(curves),
    )
    yield _Sketch(
        "loss",
        "Training loss over rounds, mean over samples" + band,
        "The mean cross-entropy during training; lower is better. A loss that falls "
        "while the test accuracy stands still is a sign of overfitting. A loss that "
        "jumps or rises, or a line that stops, is a sign of too high a learning rate.",
        training_loss(curves),
    )
    yield from _over_spending(curves, band)
    if len(curves) > 1:
        spread = "; small: each seed; line: ± standard deviation" * several
        yield _Sketch(
            "comparison",
            "Final test accuracy, mean over clients" + spread,
            "Compare circles with circles and squares with squares. A difference that "
            "is no larger than the lines may be chance. A curve of one seed has no "
            "line: train it with more seeds before you trust a small difference.",
            comparison(curves),
        )


_WORDS = {
    SECONDS: (
        "accuracy-seconds",
        "The accuracy over the simulated clock of the devices. At one height, the "
        "curve farthest to the left is the first to reach the accuracy.",
    ),
    JOULES: (
        "accuracy-joules",
        "The accuracy over the energy that the devices of the clients have used since "
        "the start. The server's is not included, but for `centralized`, which has no "
        "other device. At one height, the curve farthest to the left needs the least.",
    ),
    BYTES: (
        "accuracy-bytes",
        "The accuracy over what all clients have sent and received since the start. "
        "At one height, the curve farthest to the left needs the least.",
    ),
}


def _over_spending(curves: Sequence[Curve], band: str) -> Iterator[_Sketch]:
    for quantity in QUANTITIES:
        known = sum(spent(curve, quantity) is not None for curve in curves)
        if known == 0:
            continue
        name, text = _WORDS[quantity]
        if known < len(curves):
            text += (
                f" {len(curves) - known} of the {len(curves)} curves do not have it."
            )
        title = f"Test accuracy over {quantity.name}, mean over clients"
        yield _Sketch(name, title + band, text, accuracy_over(curves, quantity))


def _of_curve(curve: Curve, number: int) -> Iterator[_Sketch]:
    below = f"\n{curve.label}"
    seeds = "; line: ± standard deviation over seeds" * (len(curve.runs) > 1)
    if len(curve.cuts) > MANY:
        yield _Sketch(
            f"clients-{number}",
            "Final test accuracy of each client, by cut; black: mean of a cut" + below,
            "Each mark is a client's exit, or the server behind it, on the whole test "
            "set. With a later cut a device computes more layers, so its exit is "
            "usually better. A low mark is often a client with few or one-sided "
            "samples.",
            cuts(curve),
        )
    else:
        yield _Sketch(
            f"clients-{number}",
            "Final test accuracy of each client" + seeds + below,
            "Each client's exit and the server behind it, on the whole test set. With "
            "a later cut a device computes more layers, so its exit is usually better. "
            "A client that is lower than others of its cut often has few or one-sided "
            "samples.",
            clients(curve),
        )
    if curve.agreement is None:
        return
    yield _Sketch(
        f"agreement-{number}",
        "Whose answer is right: the exit's or the server's" + below,
        "Both answer every test sample. Where only the server is right, sending the "
        "sample pays off; where only the exit is right, sending it does harm. The "
        "first three parts together are the highest accuracy that any choice between "
        "the two answers can reach.",
        agreement(curve),
    )
    yield _Sketch(
        f"classes-{number}",
        "Test accuracy within each class, by cut" + below,
        "The brighter a cell, the more samples of the class are answered correctly. A "
        "column that is dark everywhere is a class that is hard, or that few clients "
        "have seen. A column that is dark for exits alone is a class that needs the "
        "layers at the server.",
        classes(curve),
    )


def _of_splits(curves: Sequence[Curve]) -> Iterator[_Sketch]:
    for number, runs in enumerate(_splits(curves), start=1):
        names = ", ".join(run.name for run in runs)
        known = all(sum(s.label_counts) == s.samples for s in runs[0].partition)
        samples = "training samples" if known else "labelled training samples"
        yield _Sketch(
            f"split-{number}",
            f"{samples.capitalize()} of each client, by class; empty: none\n{names}",
            f"A row of one colour is a client with equally many {samples} of every "
            f"class. An empty cell is a class of which a client has no {samples}. The "
            "more the rows differ, the harder it is for the clients to share layers.",
            split(runs[0]),
        )


def _splits(curves: Sequence[Curve]) -> list[list[Run]]:
    """Group the runs by equal partitions, if the classes of the clients are known."""
    splits: list[list[Run]] = []
    for run in (run for curve in curves for run in curve.runs):
        if not any(map(any, (share.label_counts for share in run.partition))):
            continue  # the clients have samples of their own
        for runs in splits:
            if runs[0].partition == run.partition:
                runs.append(run)
                break
        else:
            splits.append([run])
    return splits
