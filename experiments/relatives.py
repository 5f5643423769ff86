"""Write docs/results/relatives.md, what related methods add to both strategies.

Shows: the rows of the study cpu-small-methods, each beside the row that it changes,
with the gain over the same seeds. All figures are read from the study's results.jsonl;
the words come from cpu-small-methods/findings.md.
Cost: a second.
Command: python experiments/relatives.py
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import script
import tables
from scipy import stats

from hsee_jax import studies
from hsee_jax.engine.evaluation import ClientResult
from hsee_jax.report.tables import Table, markdown
from hsee_jax.studies.results import Result

NAME = "cpu-small-methods"
PAGE = tables.PAGE.with_name("relatives.md")
TEXT = tables.HERE / NAME / "findings.md"  # the words, with {iid[row].figure}
CHANGED = {
    "sequential-clients-refit": "sequential-clients",
    "sequential-joint-shared": "sequential-joint",
    "sequential-topk-links": "sequential-topk",
    "averaging-all-refit": "averaging-all",
    "sequential-quarter": "sequential-clients-refit",
    "vicreg-quarter": "sequential-quarter",
    "vicreg-gates": "vicreg-quarter",
}  # what a row changes; any other changes the strategy that its name begins with


class Figure(NamedTuple):
    """An accuracy in percent, and its gain over the changed row in points.

    Both are means over seeds. The interval is that of Student's t for paired seeds,
    95 %; it is a point where all seeds agree, and infinite with fewer than two seeds.
    """

    mean: float
    gain: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        """Return the mean."""
        return format(self.mean, spec)

    @property
    def is_clear(self) -> bool:
        """Return whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


class Row(NamedTuple):
    """The figures of a row on one partition; bytes are of a run, both ways."""

    exit: Figure
    server: Figure
    megabytes: float


def rows(partition: str) -> tables.Rows[Row]:
    """Return the rows of a partition, by name."""
    study, results = tables.load(NAME)
    found = tables.Rows(
        {
            name.removesuffix(f",partition={partition}"): own
            for name, own in studies.by_row(study, results).items()
            if name.endswith(f",partition={partition}")
        }
    )
    compared = {name: _row(own, found[_changed(name)]) for name, own in found.items()}
    return tables.Rows(compared)


def _changed(name: str) -> str:
    """Return the name of the row that a row changes; a plain strategy's is its own."""
    return CHANGED.get(name, name.partition("-")[0])


def _row(own: Sequence[Result], changed: Sequence[Result]) -> Row:
    links = [one.summary.link for one in own if one.summary]
    return Row(
        exit=figure(own, changed, "mean_exit_accuracy"),
        server=figure(own, changed, "mean_server_accuracy"),
        megabytes=float(np.mean([one.up_bytes + one.down_bytes for one in links]))
        / 1e6,
    )


def figure(own: Sequence[Result], changed: Sequence[Result], name: str) -> Figure:
    """Compare the runs of two rows by a mean accuracy of `Scores`, seed by seed."""
    ours, theirs = _by_seed(own, name), _by_seed(changed, name)
    seeds = sorted(ours.keys() & theirs.keys())
    after, before = ([of[seed] for seed in seeds] for of in (ours, theirs))
    gains = np.subtract(after, before)
    if len(seeds) < 2:
        low, high = -np.inf, np.inf
    elif np.ptp(gains) < 1e-9:
        low = high = gains[0]
    else:
        low, high = stats.ttest_rel(after, before).confidence_interval()
    return Figure(float(np.mean(after)), float(np.mean(gains)), float(low), float(high))


def _by_seed(results: Sequence[Result], name: str) -> dict[int, float]:
    return {
        one.seed: 100 * getattr(one.summary.scores, name)
        for one in results
        if one.summary
    }


def rows_table(iid: Mapping[str, Row]) -> str:
    """Return a table of what each row is, which row it changes, and a run's bytes."""
    shows = {row.name.partition(",")[0]: row.shows for row in tables.load(NAME)[0].rows}
    header = ("row", "what it is", "gain over", "MB")
    lines = [
        (
            f"`{name}`",
            shows[name],
            "" if _is_plain(name) else f"`{_changed(name)}`",
            f"{row.megabytes:.0f}",
        )
        for name, row in iid.items()
    ]
    return markdown(Table("", header, lines)).rstrip()


def accuracies_table(iid: Mapping[str, Row], skewed: Mapping[str, Row]) -> str:
    """Return a table of accuracies with their gains; a clear gain is bold."""
    header = ("row", "exit %", "server %", "exit %, skewed", "server %, skewed")
    lines = [
        (
            f"`{name}`",
            *(
                _cell(one, gains=not _is_plain(name))
                for row in (iid[name], skewed[name])
                for one in (row.exit, row.server)
            ),
        )
        for name in iid
    ]
    return markdown(Table("", header, lines)).rstrip()


def _is_plain(name: str) -> bool:
    return _changed(name) == name


def _cell(one: Figure, *, gains: bool) -> str:
    if not gains:
        return f"{one.mean:.1f}"
    gain = f"{one.gain:+.1f}".replace("-0.0", "+0.0")
    return f"{one.mean:.1f} ({f'**{gain}**' if one.is_clear else gain})"


def exits_table(partition: str) -> str:
    """Return a table of the accuracies of several exits in one client, by cut.

    They are in percent, means over the clients of a cut and over seeds.
    """
    study, results = tables.load(NAME)
    found = studies.by_row(study, results)
    several, one = (
        _clients_by_cut(found[f"{name},partition={partition}"])
        for name in ("sequential-exits", "sequential")
    )
    deepest = max(several)
    header = ("cut", *(f"layer {n}" for n in range(1, deepest + 1)), "one exit alone")
    lines = []
    for cut, clients in several.items():
        by_exit = [(*c.early_accuracies, c.exit_accuracy) for c in clients]
        cells = [f"{100 * value:.1f}" for value in np.mean(by_exit, axis=0)]
        cells += [""] * (deepest - len(cells))
        alone = 100 * np.mean([c.exit_accuracy for c in one[cut]])
        lines.append((str(cut), *cells, f"{alone:.1f}"))
    return markdown(Table("", header, lines)).rstrip()


def _clients_by_cut(results: Sequence[Result]) -> dict[int, list[ClientResult]]:
    clients = [c for one in results if one.summary for c in one.summary.scores.clients]
    cuts = sorted({client.cut for client in clients})
    return {cut: [c for c in clients if c.cut == cut] for cut in cuts}


def page() -> str:
    """Return the page."""
    iid, skewed = rows("iid"), rows("dirichlet")
    text = TEXT.read_text(encoding="utf-8")
    shown = {
        "rows": rows_table(iid),
        "accuracies": accuracies_table(iid, skewed),
        "exits": exits_table("iid"),
    }
    joint, shared = iid["sequential-joint"], iid["sequential-joint-shared"]
    return text.format(
        **shown,
        iid=iid,
        skewed=skewed,
        averaging_qgm_loss=-iid["averaging-qgm"].server.gain,
        joint_shared_saved=joint.megabytes - shared.megabytes,
    )


def main() -> None:
    """Write the page."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    script.run(main)
