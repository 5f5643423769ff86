"""Reports of handmade run folders."""

import base64
import html
import io
import json
import re
import struct
import sys
import warnings
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hsee_jax import cli
from hsee_jax.config.presets import preset
from hsee_jax.config.values import override, to_json
from hsee_jax.core.errors import UserError
from hsee_jax.report import style
from hsee_jax.report.answers import further_answers
from hsee_jax.report.curves import read_curves
from hsee_jax.report.events import write_events
from hsee_jax.report.figures import Picture, draw
from hsee_jax.report.html import Section
from hsee_jax.report.html import page as html_page
from hsee_jax.report.page import by_cut, over_rounds, results, write_report
from hsee_jax.report.tables import markdown
from hsee_jax.runs.history import read_history, read_records

EXIT, SERVER = ((0.1, 0.3), (0.2, 0.4)), ((0.5, 0.5), (0.6, 0.8))  # rounds 2 and 4
# Samples of each class of client 0; of client 1 there is one more of each kind.
AGREEMENT = {"both": 4, "exit_only": 1, "server_only": 3, "neither": 2}


def make_run(
    folder,
    *,
    exits=EXIT,
    servers=SERVER,
    seed=0,
    clients=2,
    labels=3,
    counts=5,
    agreement=True,
    **more,
):
    """A run of 4 rounds, each other one evaluated, that takes 1, 2, 3 and 4 seconds."""
    config = override(
        preset("demo"),
        num_clients=clients,
        cuts=("3", "5") if clients > 1 else ("3",),
        **{"rounds": 4, "eval_every": 2} | more,
        **dict.fromkeys(("model_seed", "data_seed", "partition_seed"), seed),
    )
    cuts = [3 + 2 * (i % 2) for i in range(clients)]
    partition = [
        {
            "id": i,
            "cut": cuts[i],
            "samples": counts * labels,
            "label_counts": [counts] * labels,
            "indices": [i],  # of no use to a report
        }
        for i in range(clients)
    ]
    records = []
    for number in range(1, 2 * len(exits) + 1):
        record = {"round": number, "seconds": number, "images": 100}
        record["train"] = {
            "exit_loss": 2.0,
            "exit_accuracy": 0.1,
            "server_loss": 1.0 / number,
            "server_accuracy": 0.2,
        }
        if number % 2 == 0:
            pairs = zip(
                exits[number // 2 - 1], servers[number // 2 - 1], cuts, strict=True
            )
            record["test"] = {
                "mean_exit_accuracy": float(np.mean(exits[number // 2 - 1])),
                "mean_server_accuracy": float(np.mean(servers[number // 2 - 1])),
                "clients": [
                    {
                        "id": i,
                        "cut": cut,
                        "exit_loss": 2.0,
                        "exit_accuracy": a,
                        "server_loss": None,  # not finite
                        "server_accuracy": b,
                    }
                    for i, (a, b, cut) in enumerate(pairs)
                ][::-1],  # the order does not matter
            }
        records.append(record | {"wall_seconds": number + 0.5})
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(to_json(config))
    (folder / "partition.json").write_text(json.dumps(partition))
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines)
    if 2 * len(exits) == config.run.rounds:
        summary = {
            "rounds": len(records),
            **records[-1]["test"],
            "wall_seconds": sum(record["wall_seconds"] for record in records),
            "images_per_second": 40.0,
            "missed_rounds": 0,
            "left_out_rounds": 0,
            "device": "1 x abacus",
            "versions": {"jax": "0.1", "numpy": "0.2"},
            "link": {"up_bytes": 0, "down_bytes": 0, "cuts": []},
        }
        if agreement:
            summary["agreement"] = [
                {"id": i} | {name: [n + i] * labels for name, n in AGREEMENT.items()}
                for i in range(clients)
            ]
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def four(tmp_path):
    """Return the runs of `write_four`."""
    return write_four(tmp_path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """The pictures of four runs, by their names."""
    curves = read_curves(write_four(tmp_path_factory.mktemp("four")))
    return {picture.name: picture for picture in draw(curves).all}


def write_four(tmp_path):
    """Two seeds of averaging, one of sequential, and one that was stopped."""
    return [
        make_run(tmp_path / "a0"),
        make_run(tmp_path / "a1", seed=1, exits=((0.1, 0.1), (0.6, 0.4))),
        make_run(tmp_path / "s", strategy="sequential"),
        make_run(tmp_path / "x", seed=2, exits=EXIT[:1], servers=SERVER[:1]),
    ]


def test_curves_are_runs_that_differ_in_seeds_alone(four):
    """And whose last evaluation is of the same round."""
    averaging, sequential, unfinished = read_curves(four)
    assert averaging.label == "strategy=averaging, average=all_holders"
    assert [run.name for run in averaging.runs] == ["a0", "a1"]
    assert sequential.label == "strategy=sequential, average=none"
    assert unfinished.label == f"{averaging.label} (unfinished: 2 of 4 rounds)"
    assert averaging.rounds == (2, 4)
    assert averaging.accuracy.shape == (2, 2, 2, 2)
    np.testing.assert_array_equal(averaging.accuracy[0, :, 0], EXIT)
    np.testing.assert_array_equal(averaging.accuracy[0, :, 1], SERVER)


def test_runs_with_equal_seeds_are_no_repetitions(tmp_path):
    """A run and its repetition on devices have two curves, not one without a spread."""
    places = [make_run(tmp_path / name) for name in ("simulated", "served")]
    places.append(make_run(tmp_path / "other", seed=1))
    first, second = read_curves(places)
    assert [run.name for run in first.runs] == ["simulated", "other"]
    assert [run.name for run in second.runs] == ["served"]
    assert first.label == "strategy=averaging (simulated)"
    assert second.label == "strategy=averaging (served)"


def test_a_label_names_every_option_that_differs(tmp_path):
    one = make_run(tmp_path / "one", partition="dirichlet", alpha=0.5)
    more = {"learning_rate": 0.2, "max_train_samples": 7, "data_dir": "elsewhere"}
    other = make_run(tmp_path / "other", partition="dirichlet", **more)
    labels = [curve.label for curve in read_curves([one, other])]
    assert labels == [
        "max_train_samples=None, alpha=0.5, learning_rate=0.1",
        "max_train_samples=7, alpha=0.3, learning_rate=0.2",
    ]
    even = make_run(tmp_path / "even")  # has no alpha
    labels = [curve.label for curve in read_curves([one, even])]
    assert labels == ["partition=dirichlet", "partition=iid"]


def test_the_tables_hold_means_and_sample_deviations(four):
    """Derived by hand.

    Final exits of the seeds of averaging: (0.2 + 0.4) / 2 = 0.3, (0.6 + 0.4) / 2 = 0.5;
    their mean is 0.4 and their deviation 0.2 / sqrt(2) = 0.1414. By cut: 0.2 and 0.6,
    deviation 0.4 / sqrt(2) = 0.2828; 0.4 twice. After round 2 they are 0.2 and 0.1,
    deviation 0.1 / sqrt(2) = 0.0707. A round takes the median of 1, 2, 3 and
    4 seconds for 100 images: 40 images/s; of 1 and 2 seconds: 66.7. With evaluation
    1.5 + 2.5 + 3.5 + 4.5 = 12 seconds, or 4.
    """
    curves = read_curves(four)
    two = "strategy=averaging, average=all_holders", "0, 1", "4"
    assert results(curves).rows == [
        (*two, "0.4000 ± 0.1414", "0.7000 ± 0.0000", "40.0 ± 0.0", "12.0 ± 0.0"),
        (
            "strategy=sequential, average=none",
            "0",
            "4",
            "0.3000",
            "0.7000",
            "40.0",
            "12.0",
        ),
        (curves[2].label, "2", "2", "0.2000", "0.5000", "66.7", "4.0"),
    ]
    assert by_cut(curves).rows[:2] == [
        (two[0], "3", "1", "0.4000 ± 0.2828", "0.6000 ± 0.0000"),
        (two[0], "5", "1", "0.4000 ± 0.0000", "0.8000 ± 0.0000"),
    ]
    assert over_rounds(curves).rows == [
        (two[0], "2", "0.1500 ± 0.0707", "0.5000 ± 0.0000"),
        (two[0], "4", "0.4000 ± 0.1414", "0.7000 ± 0.0000"),
        ("strategy=sequential, average=none", "2", "0.2000", "0.5000"),
        ("strategy=sequential, average=none", "4", "0.3000", "0.7000"),
        (curves[2].label, "2", "0.2000", "0.5000"),
    ]
    lines = markdown(results(curves)).splitlines()
    assert len(lines) == 5
    assert {line.count("|") for line in lines} == {8}
    assert lines[3] == "| " + " | ".join(results(curves).rows[1]) + " |"


def add_answers(run, gated):
    """Give each client an exit before its cut's, and answers at the gated width."""
    path = run / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for client in records[-1]["test"]["clients"]:
        client["early_accuracies"] = [0.1 * client["cut"], gated]
        client["gated"] = {
            "flops_share": 0.5,
            "exit_accuracy": gated,
            "server_accuracy": 2 * gated,
        }
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_tables_of_further_answers_stand_where_clients_have_them(four, tmp_path):
    """Gated exits of 0.1 and 0.3: 0.2, with the deviation 0.2 / sqrt(2)."""
    assert list(further_answers(read_curves(four))) == []
    add_answers(four[0], 0.1)
    add_answers(four[1], 0.3)
    curves = read_curves(four[:3])
    label = curves[0].label
    early, gated = further_answers(curves)
    assert early.rows == [
        (label, "3", "1", "0.3000 ± 0.0000"),
        (label, "3", "2", "0.2000 ± 0.1414"),
        (label, "5", "1", "0.5000 ± 0.0000"),
        (label, "5", "2", "0.2000 ± 0.1414"),
    ]
    assert gated.rows == [
        (label, cut, "0.2000 ± 0.1414", "0.4000 ± 0.2828", "0.5000 ± 0.0000")
        for cut in ("3", "5")
    ]
    write_report(curves, tmp_path / "report")
    for name in ("report.md", "report.html"):
        page = (tmp_path / "report" / name).read_text(encoding="utf-8")
        assert early.title in page
        assert gated.title in page


class Page(HTMLParser):
    """Checks that tags are closed, and gathers what is shown."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.links, self.text = [], [], [], []
        self.ids = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        if tag == "img":
            self.images.append(values)
        elif tag != "meta":
            self.open.append(tag)
        self.links += [values[name] for name in ("src", "href") if name in values]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_alone(four, tmp_path):
    odd = make_run(tmp_path / "<b>&\"'|$x_", strategy="sequential", seed=7)
    page = write_report(read_curves([*four, odd]), tmp_path / "new" / "out")
    text = page.read_text()
    shown = Page(text)
    # accuracy, loss, comparison; three curves, two of them with counts; one split
    assert len(shown.images) == 3 + 3 + 2 * 2 + 1
    jumps = [link[1:] for link in shown.links if link.startswith("#")]
    assert sorted(jumps) == sorted(set(shown.ids))
    assert len(jumps) == len(shown.ids) == 6 + 1 + len(shown.images)
    links = [link for link in shown.links if not link.startswith("#")]
    for link, image in zip(links, shown.images, strict=True):
        kind, data = link.split(",")
        assert kind == "data:image/png;base64"
        content = base64.b64decode(data, validate=True)
        with Image.open(io.BytesIO(content)) as picture:
            picture.load()
            assert picture.width == 1440
        assert any(content == path.read_bytes() for path in page.parent.glob("*.png"))
        assert image["alt"]
    rest = re.sub(r'src="[^"]*"', "", text)
    assert not re.search(r"https?:|//|url\(|@import|<script|<link", rest)
    cells = set(shown.text)
    assert {odd.name, "0.4000 ± 0.1414", "1 x abacus; jax 0.1, numpy 0.2"} <= cells
    assert {"no summary yet", "averaging; sequential", "0.1"} <= cells
    assert html.escape(odd.name) in text

    text = (page.parent / "report.md").read_text()
    for table in (results, by_cut, over_rounds):
        assert markdown(table(read_curves([*four, odd]))) in text
    pictures = re.findall(r"\]\((.*)\)", text)
    assert sorted(pictures) == sorted(p.name for p in page.parent.glob("*.png"))


@pytest.mark.parametrize("count", [20, 21])
def test_the_contents_list_pictures_if_they_are_few(count):
    """Each section is there; a link leads to each picture of 20, to none of 21."""
    pictures = [Picture(f"p{n}.png", f"P {n}", "", None, b"") for n in range(count)]
    sections = [
        Section("<one>", pictures[:5]),
        Section("two", ["& text", *pictures[5:]]),
    ]
    shown = Page(html_page("Title", sections))
    jumps = [link for link in shown.links if link.startswith("#")]
    assert [link for link in jumps if link[1] == "s"] == ["#s1", "#s2"]
    assert len(jumps) == 2 + (20 if count == 20 else 0)
    assert {"Title", "<one>", "& text"} <= set(shown.text)


def test_the_figures_show_the_numbers(pictures):
    pictures = {name: picture.figure for name, picture in pictures.items()}
    exits, servers = pictures["accuracy.png"].axes
    assert exits.get_ylim() == servers.get_ylim()
    np.testing.assert_allclose(exits.lines[0].get_xydata(), [(2, 0.15), (4, 0.4)])
    np.testing.assert_allclose(servers.lines[1].get_xydata(), [(2, 0.5), (4, 0.7)])
    (bars,) = pictures["clients-1.png"].axes
    heights = [[bar.get_height() for bar in branch] for branch in bars.containers[1::2]]
    np.testing.assert_allclose(heights, [(0.4, 0.4), (0.6, 0.8)])
    (image, _) = pictures["split-1.png"].axes
    np.testing.assert_array_equal(image.images[0].get_array(), np.full((2, 3), 5))
    exits, servers = pictures["loss.png"].axes
    np.testing.assert_allclose(exits.lines[0].get_ydata(), [2.0] * 4)
    np.testing.assert_allclose(servers.lines[1].get_xdata(), [1, 2, 3, 4])
    np.testing.assert_allclose(servers.lines[1].get_ydata(), [1, 1 / 2, 1 / 3, 1 / 4])
    assert exits.get_ylabel() == "cross-entropy (nats)"


@pytest.mark.parametrize("labelled", [0, 2])
def test_unlabelled_samples_are_no_empty_cells(tmp_path, labelled):
    """Of samples of their own nothing is known; with some labels these are shown."""
    folder = make_run(tmp_path / "run", counts=5)
    path = folder / "partition.json"
    partition = json.loads(path.read_text())
    for share in partition:
        share["label_counts"] = [labelled] * 3
    path.write_text(json.dumps(partition))
    assert cli.main(["report", str(folder)]) == 0
    titles = [picture.title for picture in draw(read_curves([folder])).splits]
    assert len(titles) == (labelled > 0)
    for title in titles:
        assert title.startswith("Labelled training samples of each client, by class")


def test_the_figures_of_right_answers_show_the_numbers(pictures):
    """Client 0 alone has cut 3 and 10 samples of each class, client 1 cut 5 and 14."""
    for name, title in (
        ("agreement-1.png", "Whose answer is right: the exit's or the server's"),
        ("classes-1.png", "Test accuracy within each class, by cut"),
    ):
        assert pictures[name].heading == title
        assert (
            pictures[name].title == f"{title}\nstrategy=averaging, average=all_holders"
        )
        assert pictures[name].figure.get_suptitle() == pictures[name].title
    (panel,) = pictures["agreement-1.png"].figure.axes
    widths = [[bar.get_width() for bar in part] for part in panel.containers]
    expected = np.array([(4, 1, 3, 2), (5, 2, 4, 3)]).T / [10, 14]
    np.testing.assert_allclose(widths, expected)
    assert panel.texts[0].get_text() == "40%"
    exits, servers, _ = pictures["classes-1.png"].figure.axes
    for axes, rows in ((exits, (5 / 10, 7 / 14)), (servers, (7 / 10, 9 / 14))):
        shown = axes.images[0].get_array()
        np.testing.assert_allclose(shown, np.repeat([rows], 3, axis=0).T)
        assert [label.get_text() for label in axes.get_yticklabels()] == [
            "cut 3",
            "cut 5",
        ]
    assert not pictures.keys() & {"agreement-3.png", "classes-3.png"}  # no summary


def test_a_run_without_counts_has_no_pictures_of_them(tmp_path):
    """And says so; runs with and without them may be one curve."""
    old = make_run(tmp_path / "old", agreement=False)
    new = make_run(tmp_path / "new", seed=1)
    for runs, missing in (([old], True), ([new], False), ([old, new], True)):
        page = write_report(read_curves(runs), tmp_path / str(len(runs)))
        assert ("not in the summary of old." in page.read_text()) == missing
        assert ("Whose answer is right" in page.read_text()) != missing


def test_a_class_without_test_samples_is_blank(tmp_path):
    folder = make_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    for client in summary["agreement"]:
        for name in AGREEMENT:
            client[name][1] = 0
    (folder / "summary.json").write_text(json.dumps(summary))
    pictures = {p.name: p.figure for p in draw(read_curves([folder])).all}
    for axes in pictures["classes-1.png"].axes[:2]:
        mask = np.ma.getmaskarray(axes.images[0].get_array())
        np.testing.assert_array_equal(mask, [[False, True, False]] * 2)


@pytest.mark.parametrize(
    ("clients", "labels", "counts"),
    [(1, 1, 1), (40, 10, 9999), pytest.param(200, 100, 1, marks=pytest.mark.slow)],
)
def test_no_label_overlaps_another(tmp_path, clients, labels, counts):
    final = (np.linspace(0, 1, clients),)
    sizes = {"clients": clients, "labels": labels, "counts": counts, "rounds": 2}
    long = {"average": "servers", "batch_norm": "keep_local", "period": 3}
    long |= {"learning_rate": 0.12345, "optimizer_state": "average", "momentum": 0.1}
    long |= {"weights": "uniform"}
    folders = [
        make_run(tmp_path / str(i), exits=final, servers=final, **sizes, **options)
        for i, options in enumerate((long, {}, {"seed": 1}))
    ]
    for picture in draw(read_curves(folders[: 3 if clients == 40 else 1])).all:
        width, height = picture.figure.bbox.size
        for axes in picture.figure.axes:
            below = [axes.xaxis, *(child.xaxis for child in axes.child_axes)]
            for axis in ([axes.yaxis], below):
                boxes = [
                    label.get_window_extent()
                    for part in axis
                    for label in part.get_ticklabels()
                    if label.get_text().strip() and label.get_visible()
                ]
                for one, other in combinations(boxes, 2):
                    assert not one.overlaps(other), picture.name
        box = picture.figure.get_tightbbox().extents * picture.figure.dpi
        assert (box[:2] >= -1).all() and (box[2:] <= (width + 1, height + 1)).all()


def test_a_line_that_a_kill_cut_off_is_passed_over(four):
    path = four[0] / "metrics.jsonl"
    whole = path.read_text()
    before = results(read_curves(four[:1])).rows
    path.write_text(whole + '{"round": 5, "sec')
    assert results(read_curves(four[:1])).rows == before
    path.write_text('{"round": 1, "sec\n' + whole)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1, is damaged"):
        read_curves(four[:1])


BAD = {
    "metrics.jsonl": [
        (None, "No such file"),
        ("", "no evaluated round yet"),
        ("{}\n", "line 1, is damaged: KeyError: 'round'"),
        ("[1]\n2\n", "line 1, is damaged"),
        ('{"round": 1e999}\n', "line 1, is damaged: OverflowError"),
        ("[" * 100_000 + "\n{}\n", "line 1, is damaged: RecursionError"),
        ("\ufeff\n{}\n", "line 1, is damaged"),
    ],
    "partition.json": [(None, "No such file"), ("[{}]", "damaged"), ("[", "damaged")],
    "devices.json": [("[" * 100_000, "is damaged: RecursionError")],
    "summary.json": [("{}", "is damaged: KeyError: 'rounds'"), ("[]", "damaged")],
    "config.json": [
        (None, "is not a run"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
    ],
}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [(name, *case) for name, cases in BAD.items() for case in cases],
)
def test_a_damaged_run_is_one_line(tmp_path, capsys, name, content, message):
    path = make_run(tmp_path / "run") / name
    path.unlink() if content is None else path.write_text(content)
    assert cli.main(["report", str(path.parent)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and message in err
    assert not (path.parent / "report").exists()


WRONG = {
    "metrics.jsonl": [
        ("train", "exit_accuracy", "x"),
        ("link", "up_bytes", None),
        ("missed", 0, None),
        ("test", "mean_exit_accuracy", [1]),
        ("test", "clients", 0, "cut", None),
        ("test", "clients", 0, "exit_loss", "x"),
        ("test", "clients", 0, "early_accuracies", [None]),
        ("test", "clients", 0, "gated", "flops_share", None),
        ("simulated", "late", 0, None),
    ],
    "summary.json": [
        ("rounds", None),
        ("wall_seconds", None),
        ("versions", None),
        ("link", "cuts", None),
        ("link", "up_bytes", "x"),
        ("simulated", "seconds", None),
    ],
}


@pytest.mark.parametrize(
    ("name", "place"),
    [(name, place) for name, places in WRONG.items() for place in places],
)
def test_a_value_of_another_type_is_damage(tmp_path, capsys, name, place):
    """Each figure is read as a number, wherever it stands."""
    more = {"missed": [0], "link": {"up_bytes": 1, "down_bytes": 2}}
    clock = {"seconds": 1, "joules": None, "lost_bytes": 0}
    path = make_run(tmp_path / "run") / name
    first, *rest = path.read_text().splitlines()
    values = json.loads(first)
    *parents, last, wrong = place
    if name == "metrics.jsonl":
        values |= more | {"test": json.loads(rest[0])["test"]}
        values["simulated"] = clock | {"begin_s": 0, "away": [], "late": [1]}
        gated = {"flops_share": 1, "exit_accuracy": 1, "server_accuracy": 1}
        values["test"]["clients"][0] |= {"gated": gated}
    else:
        values["simulated"] = clock | {"late_rounds": 0}
    path.write_text("\n".join([json.dumps(values), *rest]))
    read_history(path.parent)
    owner = values
    for key in parents:
        owner = owner[key]
    owner[last] = wrong
    path.write_text("\n".join([json.dumps(values), *rest]))
    assert cli.main(["report", str(path.parent)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "is damaged: " in err


def test_a_version_that_is_a_number_is_text(tmp_path, capsys):
    path = make_run(tmp_path / "run") / "summary.json"
    path.write_text(path.read_text().replace('"0.1"', "3"))
    assert read_history(path.parent).summary.versions["jax"] == "3"
    assert cli.main(["report", str(path.parent)]) == 0


@pytest.mark.parametrize("order", [(1, 2, 3), (0, 0, 1, 2, 3), (0, 2, 3), (1, 0, 2)])
def test_rounds_are_there_once_and_in_their_order(tmp_path, order):
    path = make_run(tmp_path / "run") / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[i] for i in order))
    number = next(n for n, i in enumerate(order) if n != i) + 1
    message = rf"line {number}, is damaged: .* of round {order[number - 1] + 1}"
    with pytest.raises(UserError, match=message):
        read_records(path.parent)


def test_counts_of_too_few_clients_are_damaged(tmp_path):
    path = make_run(tmp_path / "run") / "summary.json"
    summary = json.loads(path.read_text())
    del summary["agreement"][1]
    path.write_text(json.dumps(summary))
    with pytest.raises(UserError, match=r"summary\.json is damaged: ValueError"):
        read_curves([path.parent])


def test_the_command(four, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", "a0"]) == 0
    out = capsys.readouterr().out
    assert out == f"{markdown(results(read_curves(four[:1])))}\na0/report/report.html\n"
    assert (tmp_path / "a0" / "report" / "report.html").exists()
    with monkeypatch.context() as stub:
        stub.setattr("hsee_jax.report.page.write_report", lambda curves, out: out)
        assert cli.main(["report", "a0", "s"]) == 0
        assert capsys.readouterr().out.endswith("\n\nreport\n")
    for words, message in (
        ("", "arguments are required: RUN"),
        ("a0 a1 ./a0", "run: a0 is given twice"),
        ("a0 nowhere", "nowhere is not a run"),
        ("a0 --out /dev/null --tensorboard t", "out: /dev/null is not a folder that"),
        ("a0 --tensorboard a0", "tensorboard: a0 is not empty"),
        ("a0 --tensorboard /dev/null/x", "/dev/null/x cannot be written: "),
    ):
        assert cli.main(["report", *words.split()]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1 and message in err
    assert not (tmp_path / "t").exists()


def test_a_full_disk_keeps_the_report_before(four, monkeypatch, capsys):
    """A file is opened, which empties it, and takes nothing."""
    run, real = four[0], Path.open
    assert cli.main(["report", str(run)]) == 0
    before = {path: path.read_bytes() for path in (run / "report").iterdir()}
    assert {path.suffix for path in before} == {".html", ".md", ".png"}

    def full(path, mode="r", *args, **kwargs):
        file = real(path, mode, *args, **kwargs)
        if "w" not in mode:
            return file
        file.close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    capsys.readouterr()
    assert cli.main(["report", str(run)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cannot be written: No space left" in error
    assert {path: path.read_bytes() for path in before} == before


def test_events_for_tensorboard(four, tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    write_events(read_curves(four), tmp_path / "events")
    found = {}
    for path in (tmp_path / "events").glob("*/*"):
        content, at = path.read_bytes(), 0
        while at < len(content):  # length, its checksum, an event, its checksum
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                found[path.parent.name, value.tag, event.step] = value.simple_value
    assert {name for name, _, _ in found} == {"a0", "a1", "s", "x"}
    assert found["a0", "test/mean_exit_accuracy", 4] == pytest.approx(0.3)
    assert found["s", "train/server_loss", 3] == pytest.approx(1 / 3)
    assert found["x", "images_per_second", 2] == 50

    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"pip install 'hsee-jax\[tensorboard\]'"):
        write_events(read_curves(four), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def make_own(folder, data_dir, digest=None, **more):
    """A run on own data, with the digest in its data.json."""
    make_run(folder, dataset="npz", data_dir=data_dir, **more)
    info = {"input_shape": [4], "num_classes": 2, "mean": [0] * 4, "std": [1] * 4}
    (folder / "data.json").write_text(json.dumps(info | {"digest": digest}))
    return folder


def test_runs_on_other_own_data_are_other_curves(tmp_path):
    """A digest tells data apart; without it, their folder does."""
    one, two = "1" * 64, "2" * 64
    folders = [
        make_own(tmp_path / f"run{i}", folder, digest, seed=i)
        for i, (folder, digest) in enumerate(
            [("/a", one), ("/moved", one), ("/a", two), ("/a", None), ("/b", None)]
        )
    ]
    curves = read_curves(folders)
    assert [curve.label for curve in curves] == [
        "data=/a (111111111111)",
        "data=/a (222222222222)",
        "data=/a",
        "data=/b",
    ]
    assert [len(curve.runs) for curve in curves] == [2, 1, 1, 1]


def test_folders_outside_of_utf_8_are_shown(tmp_path, monkeypatch, capsys):
    """As bytes, in each of the files; Python reads such a byte as a surrogate."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        own = {"data_dir": f"/{name}\udcff", "pretrained": "/w\udcfe"}
        make_run(tmp_path / name, dataset="npz", **own)
    assert cli.main(["report", "a", "b"]) == 0
    assert r"data=/a\xff" in capsys.readouterr().out
    for name in ("report.md", "report.html"):
        assert r"data=/b\xff" in (tmp_path / "report" / name).read_text()
    assert r"/w\xfe" in (tmp_path / "report" / "report.html").read_text()


def test_runs_on_other_arrays_are_other_curves(tmp_path):
    folders = [
        make_own(tmp_path / f"run{i}", None, str(i) * 64, seed=i) for i in range(2)
    ]
    for folder in folders:
        path = folder / "config.json"
        path.write_text(path.read_text().replace('"npz"', '"arrays"'))
    labels = [curve.label for curve in read_curves(folders)]
    assert labels == ["data=000000000000", "data=111111111111"]


def test_runs_on_a_known_dataset_are_one_curve_wherever_it_lies(tmp_path):
    folders = [
        make_run(tmp_path / f"run{i}", seed=i, dataset="cifar10", data_dir=f"/{i}")
        for i in range(2)
    ]
    (curve,) = read_curves(folders)
    assert len(curve.runs) == 2


def test_letters_that_the_font_lacks_are_no_warning():
    from matplotlib.figure import Figure

    figure = Figure()
    figure.suptitle("装置 \U00013000")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert style.png(figure).startswith(b"\x89PNG")
    assert seen == []
