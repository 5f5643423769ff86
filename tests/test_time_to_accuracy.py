"""What a report says of simulated seconds, joules and bytes, for handmade runs."""

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from test_report import make_run

from hsee_jax.report.curves import read_curves
from hsee_jax.report.page import write_report
from hsee_jax.report.progress import accuracy_over
from hsee_jax.report.spending import BYTES, JOULES, SECONDS, spent
from hsee_jax.report.targets import levels, targets
from hsee_jax.systems import read_devices


def with_clock(folder, *, scale=1.0, joules=10.0, link=True, devices="fleet.toml 1234"):
    """Add to each of 4 rounds 2 s, a second of waiting before, energy and bytes."""
    path = folder / "metrics.jsonl"
    lines = []
    for record in map(json.loads, path.read_text().splitlines()):
        if link:
            record["link"] = {"up_bytes": 3e6, "down_bytes": 1e6}
        if devices:
            record["simulated"] = {
                "begin_s": scale * (3 * record["round"] - 2),
                "seconds": 2 * scale,
                "joules": joules,
                "lost_bytes": 1e6,
                "away": [],
                "late": [],
            }
        lines.append(json.dumps(record) + "\n")
    path.write_text("".join(lines))
    if devices:
        device = {"name": "d", "forward_flops_per_s": 1.0, "up_bytes_per_s": 1.0}
        values = {"clients": [device], "server": device, "availability": []}
        text = json.dumps(values | {"sources": {"devices": devices}})
        (folder / "devices.json").write_text(text)
    return folder


@pytest.fixture
def two(tmp_path):
    """Two seeds on devices, of which one takes twice as long, and a run without."""
    return [
        with_clock(make_run(tmp_path / "a0")),
        with_clock(make_run(tmp_path / "a1", seed=1), scale=2.0, joules=20.0),
        with_clock(make_run(tmp_path / "s", strategy="sequential"), devices=None),
    ]


def test_what_is_spent_by_each_evaluated_round(two):
    """After rounds 2 and 4: round 2 ends at 4 + 2 s, and round 4 at 10 + 2 s."""
    timed, plain = read_curves(two)
    assert (
        timed.label
        == "strategy=averaging, average=all_holders, devices=fleet.toml 1234"
    )
    assert spent(timed, SECONDS).tolist() == [[6, 12], [12, 24]]
    assert spent(timed, JOULES).tolist() == [[20, 40], [40, 80]]
    assert spent(timed, BYTES).tolist() == [[10e6, 20e6]] * 2
    assert spent(plain, SECONDS) is None and spent(plain, JOULES) is None
    assert spent(plain, BYTES).tolist() == [[8e6, 16e6]]


def test_runs_on_other_devices_are_other_curves(tmp_path):
    folders = [
        with_clock(make_run(tmp_path / "one"), devices="a.toml 11"),
        with_clock(make_run(tmp_path / "two", seed=1), devices="a.toml 11"),
        with_clock(make_run(tmp_path / "three"), devices="a.toml 22"),
        make_run(tmp_path / "none"),
    ]
    labels = [curve.label for curve in read_curves(folders)]
    assert labels == ["devices=a.toml 11", "devices=a.toml 22", "devices=None"]


def test_the_tables_say_what_an_accuracy_takes(two, tmp_path):
    """Exits reach 20 % after round 2 and 30 % after round 4, servers 50 and 70 %."""
    exits, servers = targets(read_curves(two))
    header = ("accuracy", "curve", "round", "simulated seconds", "joules", "MB")
    assert exits.header == servers.header == header
    assert "exits" in exits.title and "servers" in servers.title
    assert [row[0] for row in exits.rows[-4:]] == ["20%", "20%", "30%", "30%"]
    at_once = ("2.0 ± 0.0", "9.0 ± 4.2", "30.0 ± 14.1", "10.0 ± 0.0")
    at_end = ("4.0 ± 0.0", "18.0 ± 8.5", "60.0 ± 28.3", "20.0 ± 0.0")
    found = {(row[0], "sequential" in row[1]): tuple(row[2:]) for row in servers.rows}
    assert found["50%", False] == at_once and found["60%", False] == at_end
    assert found["50%", True] == ("2", "", "", "8.0")
    assert found["60%", True] == ("4", "", "", "16.0")
    assert levels(0.72) == (0.3, 0.4, 0.5, 0.6, 0.7)
    assert levels(0.004) == () and levels(1.0)[-1] == 0.99


def test_what_is_spent_is_summed_once_for_all_accuracies(two, monkeypatch):
    """The sums are over all rounds of all runs."""
    summed = []

    def noted(curve, quantity):
        summed.append((curve.label, quantity))
        return spent(curve, quantity)

    monkeypatch.setattr("hsee_jax.report.targets.spent", noted)
    curves = read_curves(two)
    assert len(targets(curves)[0].rows) > 2
    assert len(summed) == len(set(summed)) == 3 * len(curves)


def test_a_curve_that_does_not_get_there_says_so(tmp_path):
    low = ((0.1, 0.1), (0.2, 0.2))
    folders = [
        with_clock(make_run(tmp_path / "a0")),
        with_clock(make_run(tmp_path / "a1", seed=1, servers=low)),
        with_clock(make_run(tmp_path / "s", strategy="sequential", servers=low)),
    ]
    _, servers = targets(read_curves(folders))
    last = [tuple(row[2:]) for row in servers.rows[-2:]]
    assert last == [("1 of 2 seeds", "", "", ""), ("never", "", "", "")]


@pytest.mark.parametrize(
    ("quantity", "label", "ends"),
    [
        (SECONDS, "simulated seconds", [(9, 0.5), (18, 0.7)]),
        (JOULES, "energy of the devices (J)", [(30, 0.5), (60, 0.7)]),
        (BYTES, "bytes on all links (MB)", [(10e6, 0.5), (20e6, 0.7)]),
    ],
)
def test_the_figures_are_over_what_is_spent(two, quantity, label, ends):
    _, servers = accuracy_over(read_curves(two), quantity).axes
    np.testing.assert_allclose(servers.lines[0].get_xydata(), ends)
    assert servers.get_xlabel() == label
    assert len(servers.lines) == (2 if quantity is BYTES else 1)


def test_energy_that_is_zero_is_drawn(tmp_path):
    folder = with_clock(make_run(tmp_path / "run"), joules=0.0)
    figure = accuracy_over(read_curves([folder]), JOULES)
    assert figure.axes[0].get_xlim() == (0, 1)


@pytest.mark.parametrize("scale", [0.001, 1.0, 4321.0, 123456.0])
def test_no_number_overlaps_another(tmp_path, scale):
    folder = with_clock(make_run(tmp_path / "run"), scale=scale, joules=scale)
    for quantity in (SECONDS, JOULES):
        figure = accuracy_over(read_curves([folder]), quantity)
        figure.draw_without_rendering()
        for panel in figure.axes:
            labels = [label for label in panel.get_xticklabels() if label.get_text()]
            boxes = [label.get_window_extent() for label in labels]
            assert len(boxes) > 1
            assert not any(one.overlaps(two) for one, two in combinations(boxes, 2))


def test_the_page_has_pictures_and_tables(two, tmp_path):
    page = write_report(read_curves(two), tmp_path / "report")
    found = {path.stem for path in page.parent.glob("accuracy-*.png")}
    assert found == {"accuracy-seconds", "accuracy-joules", "accuracy-bytes"}
    text = page.read_text()
    assert text.count("1 of the 2 curves do not have it") == 2
    for name in (page.name, "report.md"):
        assert "9.0 ± 4.2" in (page.parent / name).read_text()


def test_runs_without_devices_show_bytes_alone(tmp_path):
    folder = with_clock(make_run(tmp_path / "run"), devices=None)
    curves = read_curves([folder])
    headers = {table.header for table in targets(curves)}
    assert headers == {("accuracy", "curve", "round", "MB")}
    page = write_report(curves, tmp_path / "report")
    found = {path.stem for path in page.parent.glob("accuracy-*.png")}
    assert found == {"accuracy-bytes"}
    assert "simulated" not in page.read_text()
    (old,) = read_curves([make_run(tmp_path / "old")])  # it did not count bytes
    assert targets([old]) == [] and spent(old, BYTES) is None


def test_the_devices_of_the_demo_are_those_of_the_page():
    root = Path(__file__).parents[1]
    text = (root / "examples/stragglers.toml").read_text()
    assert text in (root / "docs/how-to/time-to-accuracy.md").read_text()
    fleet = read_devices(root / "examples/stragglers.toml")
    assert len(fleet.clients) == 6  # of the demo


def test_energy_that_is_not_known_is_not_shown(tmp_path):
    folder = with_clock(make_run(tmp_path / "run"), joules=None)
    curves = read_curves([folder])
    assert spent(curves[0], JOULES) is None and spent(curves[0], SECONDS) is not None
    header = ("accuracy", "curve", "round", "simulated seconds", "MB")
    assert targets(curves)[0].header == header
