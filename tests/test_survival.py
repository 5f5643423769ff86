"""Runs that are stopped, killed or damaged, and clients that fail."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from test_strategies import assert_same, branches, train
from tiny import TINY, AfterRound, tiny_federation, tiny_shards

import hsee_jax.engine.scan
from hsee_jax import cli, runs
from hsee_jax.algorithms import ALGORITHMS
from hsee_jax.algorithms.hetero_splitee import averaging, sequential
from hsee_jax.algorithms.references import local
from hsee_jax.config.presets import preset
from hsee_jax.config.values import override, to_json
from hsee_jax.core.errors import DivergenceError, Stopped, UserError
from hsee_jax.core.files import replace_file
from hsee_jax.engine.plan import Absence, missing
from hsee_jax.runs import start
from hsee_jax.runs.checkpoint import find
from hsee_jax.runs.checkpoint_writer import Writer
from hsee_jax.runs.folder import locked, read_config

SMALL = override(
    preset("demo"),
    **TINY,
    num_clients=4,
    cuts=("1", "2"),
    max_train_samples=60,
    max_test_samples=20,
    batch_size=6,
    rounds=3,
    checkpoint_every=2,
)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


ONE_CUT = {"cuts": ("2",)}
EVERY = {
    "sequential": {},
    "averaging": {"period": 2, "period_unit": "steps"},
    "local": {},
    "splitfed_v1": ONE_CUT,
    "splitfed_v2": ONE_CUT | {"turn": "epoch"},
    "fedavg": {"cuts": ("3",)},
    "centralized": {"num_clients": 1, "cuts": ("1",)},
    "vicreg": {"labelled_share": 0.5, "augment": "noise"},
    "fpl": ONE_CUT | {"partition": "views"},
}


def test_every_strategy_is_among_those_that_are_stopped():
    assert set(EVERY) == {
        name
        for name, entry in ALGORITHMS.items()
        if entry.make.__module__.startswith("hsee_jax.")
    }


def lines(folder):
    text = (folder / "metrics.jsonl").read_text()
    records = map(json.loads, text.splitlines())
    return [{k: v for k, v in r.items() if "seconds" not in k} for r in records]


def assert_same_run(one, other):
    """The same lines and, bit for bit, the same state."""
    assert lines(one) == lines(other)
    states = [runs.reopen(folder)[1] for folder in (one, other)]
    jax.tree.map(np.testing.assert_array_equal, *states)


class Every:
    """Says stop whenever it has been asked so many times."""

    def __init__(self, times):
        self.times, self.asked = times, 0

    def __call__(self):
        self.asked += 1
        return self.asked % self.times == 0


def train_with_stops(config, folder, times):
    """Stopped and resumed until the end; returns where it was stopped."""
    stop, places = Every(times), []
    while True:
        try:
            runs.train(config, folder, resume=folder.exists(), stop=stop)
            return places
        except Stopped as stopped:
            places.append((stopped.rounds, stopped.steps))


SOME = ("sequential", "averaging")


@pytest.mark.parametrize("name", [n if n == SOME[0] else slow(n) for n in EVERY])
def test_a_stop_between_two_steps_changes_nothing(name, tmp_path):
    """For every strategy; state of absent clients on the host for the paper's two."""
    config = override(SMALL, strategy=name, **EVERY[name])
    if name in SOME:
        config = override(config, participation=0.5)
    runs.train(config, tmp_path / "whole")
    places = train_with_stops(config, tmp_path / "stopped", 4)
    assert len(places) > 1 and all(steps for _, steps in places)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    text = (tmp_path / "stopped" / "metrics.jsonl").read_text()
    for record in map(json.loads, text.splitlines()):
        assert record["wall_seconds"] > record["seconds"]
    kept = {path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir()}
    assert not {name for name in kept if "-" in name or "." in name}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["averaging", "sequential", "splitfed_v2"])
def test_a_scan_can_be_stopped_as_well(name, tmp_path, monkeypatch):
    """One compiled program, whatever part of the round it runs."""
    monkeypatch.setattr(hsee_jax.engine.scan, "_SEGMENT", 2)
    changes = EVERY[name] | {"client_axis": "vmap", "rounds": 2}
    config = override(SMALL, strategy=name, **changes)
    runs.train(config, tmp_path / "whole")
    assert train_with_stops(config, tmp_path / "stopped", 3) == [(1, 2)]
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then"),
    [("vmap", "loop"), ("loop", "vmap"), ("map", "loop"), ("vmap", "map")],
)
def test_a_round_goes_on_in_other_slots(first, then, tmp_path, monkeypatch):
    """On eight devices each cut has eight slots for its clients, in a loop two."""
    monkeypatch.setattr(hsee_jax.engine.scan, "_SEGMENT", 2)
    config = override(SMALL, rounds=1, client_axis=then)
    runs.train(config, tmp_path / "whole")
    stopped = tmp_path / "stopped"
    with pytest.raises(Stopped):
        runs.train(override(config, client_axis=first), stopped, stop=lambda: True)
    runs.train(config, stopped, resume=True)
    (one,), (other,) = lines(tmp_path / "whole"), lines(stopped)
    for name, value in one.pop("train").items():
        np.testing.assert_allclose(other["train"][name], value, rtol=1e-3)
    for record in (one, other):
        for name in ("train", "test"):
            record.pop(name, None)
    assert one == other


def test_a_round_that_has_not_ended_is_not_judged(monkeypatch):
    """No client is finite; the stop has its way, and the end of the round says so."""
    experiment = runs.build(override(SMALL, strategy="sequential", turn="epoch"))
    state = experiment.init()
    clients = jax.tree.map(
        lambda leaf: leaf * np.nan if leaf.dtype == np.float32 else leaf, state.clients
    )
    state = state.replace(clients=clients)
    state, _, progress = experiment.run_round(state, None, lambda: True)
    assert not progress.finished
    with pytest.raises(DivergenceError, match="round 1"):
        experiment.run_round(state, progress)


def test_a_signal_stops_in_the_middle_of_a_round(tmp_path, monkeypatch):
    """SIGTERM within the first turn of round 2, and the same run in the end."""
    words = "--network tiny --plugin tiny --num-clients 2 --cuts 1 "
    words += "--max-train-samples 64 --max-test-samples 8 "
    words = (words + "--batch-size 8 --rounds 2").split()
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert cli.main(["train", *words, "--out", str(whole)]) == 0
    run_round = runs.Experiment.run_round

    def tell(experiment, state, begun=None, stop=None):
        if int(state.round) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return run_round(experiment, state, begun, stop)

    with monkeypatch.context() as patch:
        patch.setattr(runs.Experiment, "run_round", tell)
        assert cli.main(["train", *words, "--out", str(stopped)]) == 143
    place = find(stopped / "checkpoints", midway=True)
    assert (place.rounds, place.steps) == (1, 1)
    with pytest.raises(UserError, match="has no checkpoint"):  # of a whole round
        runs.reopen(stopped)
    with pytest.raises(UserError, match="the run has done 1 and a part"):
        runs.train(override(read_config(stopped), rounds=1), stopped, resume=True)
    assert cli.main(["train", "--resume", "--out", str(stopped)]) == 0
    assert_same_run(whole, stopped)


def damages(path):
    """What can happen to a file: its content afterwards, or None if it is gone."""
    content = path.read_bytes()
    middle = len(content) // 2
    if content:
        flipped = bytes([content[middle] ^ 1])
        yield "flip a bit", content[:middle] + flipped + content[middle + 1 :]
        yield "truncate", content[:middle]
    yield "delete", None


def test_of_damaged_checkpoints_the_one_before_is_used(tmp_path, caplog):
    """Every file of the latest checkpoint; prints what happened to each."""
    config = override(SMALL, checkpoint_every=1, rounds=2)
    runs.train(config, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    files = [path for path in sorted((folder / "2").rglob("*")) if path.is_file()]
    assert len(files) > 5
    for path in files:
        content = path.read_bytes()
        for what, changed in damages(path):
            caplog.clear()
            path.unlink()
            if changed is not None:
                path.write_bytes(changed)
            found = find(folder)
            path.write_bytes(content)
            assert found.rounds == 1
            (warning,) = caplog.messages
            assert str(folder / "2") in warning and "earlier" in warning
            print(f"{path.relative_to(folder)}: {what}: checkpoint {found.rounds}")
    assert find(folder).rounds == 2

    _, whole = runs.reopen(tmp_path / "run")
    (folder / "2" / "notes.json").write_text("{}")
    _, before = runs.reopen(tmp_path / "run")
    assert int(before.round) == 1
    runs.train(config, tmp_path / "run", resume=True)
    _, again = runs.reopen(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, whole, again)
    assert {path.name for path in folder.iterdir()} == {"1", "2", "2.damaged"}

    for name in "12":
        (folder / name / "digests.json").unlink()
    caplog.clear()
    with pytest.raises(UserError, match=r"2/digests\.json is missing"):
        runs.train(config, tmp_path / "run", resume=True)
    with pytest.raises(UserError, match=r"2/digests\.json is missing"):
        runs.reopen(tmp_path / "run")


def write_rounds(folder, *numbers):
    with Writer(folder, keep=2) as writer:
        for number in numbers:
            writer.save(number, 0, {"weights": np.full(3, number)}, {"score": None})


def test_a_checkpoint_has_the_name_that_it_was_given(tmp_path):
    runs.train(override(SMALL, rounds=2), tmp_path / "run")
    place = tmp_path / "run" / "checkpoints" / "2"
    longer = override(SMALL, rounds=5)
    for name in ("1-3", "2-3", "3"):
        place = place.rename(place.with_name(name))
        message = rf"{name} is not the checkpoint that its name says; it is of 2 rounds"
        with pytest.raises(UserError, match=message):
            runs.train(longer, tmp_path / "run", resume=True)


def test_another_run_than_that_of_the_checkpoint_is_one_line(tmp_path):
    runs.train(override(SMALL, rounds=1), tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    other = override(SMALL, rounds=2, cuts=("1", "3"))
    with pytest.raises(UserError, match="cuts: 1 3 is not allowed with --resume; .* 1"):
        runs.train(other, tmp_path / "run", resume=True)
    path.write_text(to_json(override(SMALL, network="mlp", hidden=8, depth=3)))
    with pytest.raises(UserError, match=r"holds other layers than config\.json"):
        runs.reopen(tmp_path / "run")


def test_a_damaged_checkpoint_is_written_again(tmp_path):
    """In a server's journal it stays in its place until its round is trained anew."""
    write_rounds(tmp_path, 1, 2)
    (tmp_path / "2" / "notes.json").write_text("{}")
    assert find(tmp_path).rounds == 1
    write_rounds(tmp_path, 2)
    assert find(tmp_path).rounds == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


@pytest.mark.parametrize(("damaged", "left"), [("checkpoints", 3), ("journal", 2)])
def test_of_a_run_and_its_journal_one_is_enough(damaged, left, tmp_path):
    write_rounds(tmp_path / "checkpoints", 2)
    write_rounds(tmp_path / "journal", 3)
    assert start._latest(tmp_path, "journal").rounds == 3
    for notes in (tmp_path / damaged).glob("*/notes.json"):
        notes.write_text("{}")
    assert start._latest(tmp_path, "journal").rounds == left
    for notes in tmp_path.glob("*/*/notes.json"):
        notes.write_text("{}")
    with pytest.raises(UserError, match="notes.json has changed"):
        start._latest(tmp_path, "journal")


def test_a_kill_a_round_after_a_checkpoint_loses_one_round(
    tmp_path, monkeypatch, caplog
):
    """What the folder holds at the end of round 3 goes on from round 2."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    class Written:  # in its thread before the next step
        def result(self):
            pass

        def on_complete(self, tell):
            tell(None)

    def save_at_once(path, state):
        ocp.save(path, state)
        return Written()

    def keep(record):
        if record.round == 3:
            shutil.copytree(whole, killed)

    monkeypatch.setattr(ocp, "save_async", save_at_once)
    runs.train(SMALL, whole, callbacks=[AfterRound(keep)])
    assert [path.name for path in (killed / "checkpoints").iterdir()] == ["2"]
    runs.train(SMALL, killed, resume=True)
    assert not caplog.messages
    assert_same_run(whole, killed)


def test_training_does_not_wait_for_a_checkpoint(tmp_path, monkeypatch):
    """A slow disk: it is written during the rounds until the next one, or the end."""
    save_async, held, seen = ocp.save_async, [], []

    class Slow:  # written for sure only when somebody waits for it
        def __init__(self, response):
            self.result = response.result

        def on_complete(self, tell):
            held.append(tell)

    monkeypatch.setattr(ocp, "save_async", lambda *args: Slow(save_async(*args)))
    folder = tmp_path / "run" / "checkpoints"

    def look(record):
        seen.append(sorted(path.name for path in folder.glob("*")))

    config = override(SMALL, rounds=4)
    runs.train(config, tmp_path / "run", callbacks=[AfterRound(look)])
    assert seen == [[], [], ["2.tmp"], ["2.tmp"]] and len(held) == 2
    assert sorted(path.name for path in folder.glob("*")) == ["2", "4"]


@pytest.mark.slow
def test_a_run_without_a_checkpoint_begins_anew(tmp_path, caplog):
    """Killed in its first round, or while its folder was made."""
    config = override(SMALL, rounds=1)
    runs.train(config, tmp_path / "whole")
    killed = tmp_path / "killed"
    killed.mkdir()
    for name in (".lock", "config.json.tmp"):
        (killed / name).write_text("{")
    runs.train(config, killed)
    shutil.rmtree(killed / "checkpoints")
    (killed / "checkpoints" / "1.tmp" / "state").mkdir(parents=True)
    (killed / "metrics.jsonl").write_text('{"round": 1, "sec')
    (killed / "refit").mkdir()
    for name in ("summary.json", "refit"):
        with pytest.raises(UserError, match=f"no checkpoint any more, but {name}; all"):
            runs.train(config, killed, resume=True)
        assert (killed / name).exists()
        (killed / name).unlink() if name == "summary.json" else (killed / name).rmdir()
    runs.train(config, killed, resume=True)
    assert "begins anew" in caplog.text
    assert_same_run(tmp_path / "whole", killed)


def test_only_unfinished_checkpoints_are_cleaned_away(tmp_path):
    for name in ("3.tmp", "2-5.tmp", "1.old.tmp", "4", "other.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / ".notes.json.tmp").write_text("of a program that copies files")
    with Writer(tmp_path, keep=1):
        pass
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"4", "other.tmp", ".notes.json.tmp"}


def test_a_run_that_goes_on_draws_no_first_state(tmp_path, monkeypatch):
    """Which needs as much memory as the state that it goes on with."""
    config = override(SMALL, rounds=1)
    runs.train(config, tmp_path)
    (tmp_path / "summary.json").unlink()
    monkeypatch.setattr(runs.Experiment, "init", None)
    runs.train(config, tmp_path, resume=True)
    assert (tmp_path / "summary.json").exists()


def test_the_figures_of_a_run_copied_without_checkpoints_stay(tmp_path):
    """Of three rounds; one of two rounds may have been killed before its first."""
    whole, copies = tmp_path / "whole", []

    def keep(record):  # what a copy without checkpoints holds
        kept = shutil.ignore_patterns("checkpoints", ".lock")
        copies.append(shutil.copytree(whole, tmp_path / str(record.round), ignore=kept))
        (copies[-1] / "report").mkdir()

    runs.train(SMALL, whole, callbacks=[AfterRound(keep)])
    _, two, copy = copies
    before = (copy / "metrics.jsonl").read_text()
    with pytest.raises(
        UserError, match=r"no checkpoint any more, but metrics\.jsonl of 3"
    ):
        runs.train(override(SMALL, checkpoint_every=5), copy, resume=True)
    assert (copy / "metrics.jsonl").read_text() == before
    assert (copy / "report").exists()
    (copy / "checkpoints").mkdir()  # emptied; the second waits for the first
    line = before.splitlines(keepends=True)[0]
    (copy / "metrics.jsonl").write_text(line * 5)
    with pytest.raises(UserError, match="of 5 rounds; allowed is --overwrite"):
        runs.train(SMALL, copy, resume=True)
    (copy / "metrics.jsonl").write_text(line * 4)
    runs.train(SMALL, copy, resume=True)
    runs.train(SMALL, two, resume=True)
    assert_same_run(whole, copy)
    assert_same_run(whole, two)


def test_two_processes_do_not_write_one_run(tmp_path):
    """A lock of another open file is that of another process."""
    config, refused = override(SMALL, rounds=2), []

    def start_another(record):
        for how in ("resume", "overwrite"):
            with pytest.raises(UserError, match="written by another process") as error:
                runs.train(config, tmp_path / "run", **{how: True})
            refused.append(error)

    runs.train(config, tmp_path / "run", callbacks=[AfterRound(start_another)])
    assert len(refused) == 4
    runs.train(config, tmp_path / "alone")
    assert_same_run(tmp_path / "alone", tmp_path / "run")


LOCKED = """
import sys, time
from pathlib import Path
from hsee_jax.runs.folder import locked
with locked(Path(sys.argv[1])):
    print("ready", flush=True)
    time.sleep(600)
"""


def test_a_lock_dies_with_its_process(tmp_path):
    command = [sys.executable, "-c", LOCKED, str(tmp_path / "run")]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with child.stdout as output:
        assert output.readline() == "ready\n"
    with pytest.raises(UserError, match="written by another process"):
        with locked(tmp_path / "run"):
            pass
    child.kill()
    child.wait()
    with locked(tmp_path / "run"):
        pass


def test_a_folder_that_cannot_be_locked_is_used(tmp_path, monkeypatch, caplog):
    def refuse(*args, **kwargs):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with locked(tmp_path / "run"):
        assert "run cannot be locked" in caplog.text


def test_nothing_needs_a_module_of_one_system():
    """Windows has neither of these."""
    modules = ("fcntl", "resource", "pwd", "termios")
    for path in Path(runs.__file__).parents[1].rglob("*.py"):
        found = re.findall(r"^ *(?:import|from) (\w+)", path.read_text(), re.MULTILINE)
        assert not set(found) & set(modules), path


def test_a_name_that_is_no_text_is_refused(tmp_path):
    """Checkpoints cannot be kept there, which is told before the training."""
    folder = tmp_path / "r\udcff"
    for how in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(UserError, match="outside of the encoding"):
            runs.train(SMALL, folder, **how)
    assert not list(tmp_path.iterdir())


def test_text_outside_of_utf_8_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"out: .*me\.toml cannot hold '\\udcff'"):
        replace_file(tmp_path / "me.toml", "a\udcff")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_leaves_no_half_of_it(tmp_path, monkeypatch):
    path = tmp_path / "curve.json"
    path.write_text("before")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="curve.json cannot be written: No space"):
        replace_file(path, "after", sync=True)
    assert [p.name for p in tmp_path.iterdir()] == ["curve.json"]
    assert path.read_text() == "before"


@pytest.mark.parametrize("where", ["save_async", slow("write_text"), slow("open")])
def test_a_full_disk_is_one_clear_line(where, tmp_path, monkeypatch):
    """In a checkpoint's arrays, its digests, or the log; there is one to go on from."""
    config = override(SMALL, rounds=3, checkpoint_every=1)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill(record):
        if record.round == 2:
            owner = Path if where != "save_async" else ocp
            monkeypatch.setattr(owner, where, refuse)

    def refuse(*args, **kwargs):
        raise full

    with pytest.raises(UserError, match="No space left on device") as error:
        runs.train(config, tmp_path / "run", callbacks=[AfterRound(fill)])
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    runs.train(config, tmp_path / "run", resume=True)
    runs.train(config, tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_survival import SMALL
from hsee_jax import runs
from hsee_jax.config import override
folder = Path(sys.argv[2])
config = override(SMALL, rounds=30, checkpoint_every=1, strategy="averaging")
print("ready", flush=True)
runs.train(config, folder, resume=(folder / "config.json").exists())
"""


@pytest.mark.slow
def test_fifty_kills_leave_a_run_that_goes_on(tmp_path):
    """SIGKILL at random moments; in the end the run is the one without kills."""

    def start(folder):
        command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(folder)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        with child.stdout as lines:
            assert lines.readline() == "ready\n"
        return child

    assert start(tmp_path / "whole").wait() == 0
    begin = time.monotonic()  # once the whole run has filled the compilation cache
    assert start(tmp_path / "again").wait() == 0
    longest = time.monotonic() - begin
    assert_same_run(tmp_path / "whole", tmp_path / "again")
    rng, folder = np.random.default_rng(0), tmp_path / "killed"
    kills, rounds, finished = 0, [], 0
    while kills < 50:
        child = start(folder)
        try:
            status = child.wait(rng.uniform(0, 0.6 * longest))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            kills += 1
            checkpoint = find(folder / "checkpoints", midway=True)
            rounds.append(checkpoint.rounds if checkpoint else 0)
        else:
            assert status == 0
            assert_same_run(tmp_path / "whole", folder)
            shutil.rmtree(folder)
            finished += 1
    print(f"rounds after each kill: {rounds}; finished in between: {finished}")
    assert len(set(rounds)) > 5
    assert start(folder).wait() == 0
    assert_same_run(tmp_path / "whole", folder)


SHARDS = tiny_shards({0: 6, 1: 5, 2: 7, 3: 4})
CUTS = {0: 1, 1: 2, 2: 1, 3: 2}


@pytest.mark.parametrize(
    ("make", "axis"),
    [
        slow(sequential, "vmap"),
        (averaging, "loop"),
        slow(sequential, "loop"),
        slow(averaging, "vmap"),
    ],
)
def test_a_client_that_breaks_is_as_one_that_is_away(make, axis, monkeypatch):
    """Client 2 has a weight that is not finite: the others do not notice.

    It is left out of the means, weighted anew; with `averaging` it receives them.
    """
    federation = tiny_federation(CUTS)
    strategy = make(federation)
    away, _ = train(
        strategy, federation, SHARDS, axis=axis, rounds=1, missing={0: (2,)}
    )
    broken = strategy._replace(init=broken_init(strategy))
    state, log = train(broken, federation, SHARDS, axis=axis, rounds=1)
    expected = branches(federation, strategy, away)
    found = branches(federation, strategy, state)
    (plan, _, metrics) = log[0]
    assert plan.ids[~np.isfinite(metrics.exit.loss_sum)].tolist() == [2]
    for i in CUTS:
        clients, servers = zip(found[i], expected[i], strict=True)
        if i != 2:
            assert_same(*clients, rtol=1e-5, atol=1e-6)
        assert_same(
            *servers,
            rtol=1e-5,
            atol=1e-6,
        )


def broken_init(strategy):
    """Client 2, the second of the first group, begins with NaN in its layer."""

    def init(*arguments):
        state = strategy.init(*arguments)
        first = state.clients[0]
        (layer,) = first.layers
        params = jax.tree.map(lambda leaf: leaf.at[1].set(np.nan), layer.params)
        first = first.replace(layers=(layer.replace(params=params),))
        return state.replace(clients=(first, *state.clients[1:]))

    return init


@ALGORITHMS.register
def broken(federation, *, average: str = "servers"):
    """The paper's averaging, of which client 2 begins with NaN."""
    strategy = averaging(federation, average=average)
    return strategy._replace(init=broken_init(strategy))


def test_who_misses_a_round_keeps_its_state():
    """It neither trains nor weighs; other clients draw what they would have drawn."""
    federation = tiny_federation(CUTS)
    strategy = local(federation)
    some, log = train(
        strategy, federation, SHARDS, axis="loop", missing={0: (1, 3), 1: (0, 1)}
    )
    every, _ = train(strategy, federation, SHARDS, axis="loop")
    first, _ = train(strategy, federation, SHARDS, axis="loop", rounds=1)
    fresh, _ = train(strategy, federation, SHARDS, axis="loop", rounds=0)
    found, alone, once, never = (
        branches(federation, strategy, state) for state in (some, every, first, fresh)
    )
    jax.tree.map(np.testing.assert_array_equal, found[2], alone[2])
    jax.tree.map(np.testing.assert_array_equal, found[1], never[1])
    jax.tree.map(np.testing.assert_array_equal, found[0], once[0])
    assert [plan.order.shape for plan, _, _ in log] == [(2, 4)] * 2  # none recompiles


def test_a_client_misses_its_share_of_the_rounds():
    """0.3 of 2,000 draws to 4 standard deviations, and two known absences."""
    absences = [Absence(3, 2, 4), Absence(3, 9, 9)]
    draws = [
        missing(range(20), dropout=0.3, absences=absences, seed=1, number=round)
        for round in range(100)
    ]
    assert abs(sum(map(len, draws)) / 2000 - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5
    assert len({tuple(sorted(draw)) for draw in draws}) > 90
    known = [
        missing(range(20), dropout=0.0, absences=absences, seed=1, number=round)
        for round in range(10)
    ]
    assert known == [set(), {3}, {3}, {3}, set(), set(), set(), set(), {3}, set()]


def test_failing_clients_are_counted_and_reported(tmp_path, capsys):
    """By the command line, with a schedule from a file."""
    schedule = tmp_path / "absent.csv"
    schedule.write_text("client,from,to\n3,2,3\n0,3,9\n")
    words = "--num-clients 4 --cuts 1 2 --max-train-samples 60 --max-test-samples 20 "
    words += "--network tiny --plugin tiny "
    words += f"--batch-size 6 --rounds 3 --absences-file {schedule}"
    assert cli.main(["train", *words.split(), "--out", str(tmp_path / "run")]) == 0
    assert [r["missed"] for r in lines(tmp_path / "run")] == [[], [3], [0, 3]]
    assert "missed: 0 3" in capsys.readouterr().err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["missed_rounds"], summary["left_out_rounds"]) == (3, 0)
    dropout = override(SMALL, dropout=0.3, participation=0.8)
    runs.train(dropout, tmp_path / "dropout")
    missed = [r["missed"] for r in lines(tmp_path / "dropout")]
    assert any(missed) and all(len(ids) < 3 for ids in missed)
    assert cli.main("train --cuts 1 --dropout 0.99 --out run".split()) == 2
    assert "no client is left in round" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("policy", "average", "rounds"),
    [
        ("leave_out", "servers", [[2], [2], [2]]),
        ("leave_out", "all_holders", [[2], [], []]),
        ("stop", "servers", []),
    ],
)
def test_a_diverging_client_is_left_out_or_stops(policy, average, rounds, tmp_path):
    """Where its own layers are averaged too, it recovers with the first means."""
    config = override(SMALL, on_nonfinite=policy, strategy="broken", average=average)
    if policy == "stop":
        with pytest.raises(DivergenceError, match="exit loss of client 2 .* round 1"):
            runs.train(config, tmp_path / "run")
        return
    summary = runs.train(config, tmp_path / "run")
    assert [r["left_out"] for r in lines(tmp_path / "run")] == rounds
    assert summary.left_out_rounds == sum(map(len, rounds))
    clients = summary.scores.clients
    assert [c.id for c in clients if np.isnan(c.exit_loss)] == rounds[-1]
    assert all(r["train"]["exit_loss"] > 0 for r in lines(tmp_path / "run"))
