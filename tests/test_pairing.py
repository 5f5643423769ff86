"""Pairs without a server: the split of layers against a closed form and brute force."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsee_jax import cli
from hsee_jax.core import UserError
from hsee_jax.systems import LayerCost, Problem, Schedule, make_device, pairing
from hsee_jax.systems.pairing import plan_pairs
from hsee_jax.systems.pairs import pair_seconds, slowest_pair_s

SERVER = make_device({"name": "none", "forward_flops_per_s": 1, "up_bytes_per_s": 1})


def device(speed, link=1e30, **fields):
    values = {"name": "d", "forward_flops_per_s": speed, "up_bytes_per_s": link}
    return make_device({**values, **fields})


def problem(devices, flops, sizes=None, heads=0, steps=None):
    """Batches of one sample in a network whose exits and head cost the same."""
    layers = len(flops)
    sizes = sizes or [1] * layers
    costs = [LayerCost("", 2, f, b, b) for f, b in zip(flops, sizes, strict=True)]
    costs += [LayerCost("", 1, heads, 1, 1)] * (layers + 1)
    return Problem(
        costs=tuple(costs),
        traffic={},
        devices=tuple(devices),
        server=SERVER,
        schedule=Schedule(shared=False, boundary="none"),
        steps=np.array(steps or [1] * len(devices)),
        batch_size=1,
        slots=0,
    )


def test_fine_layers_come_to_the_closed_form():
    """Without exchange a pair takes 2 F / (f_i + f_j), see `pair_seconds`."""
    speeds = np.array([1.0, 3.0, 2.0, 2.0])
    fine = problem([device(speed) for speed in speeds], [1] * 12)
    seconds = pair_seconds(3 * 12.0, speeds)  # the backward pass counts twice
    for rule in ("greedy", "exact"):
        pairs = plan_pairs(fine, rule)
        assert [pair.clients for pair in pairs] == [(0, 1), (2, 3)]
        for pair in pairs:
            assert pair.seconds == pytest.approx(seconds[pair.clients])
            assert max(pair.busy_s) == pytest.approx(pair.seconds)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_exact_rule_equals_brute_force(seed):
    """Four clients with unlike links and numbers of batches."""
    rng = np.random.default_rng(seed)
    flops, sizes = rng.integers(1, 9, 3).tolist(), rng.integers(1, 9, 3).tolist()
    steps, heads = rng.integers(1, 4, 4).tolist(), int(rng.integers(0, 3))
    devices = [
        device(*rng.exponential(5.0, 2) + 0.5, message_overhead_s=rng.exponential())
        for _ in range(4)
    ]

    def round_s(i, j):
        """Try the cuts of both networks; a layer takes three times its FLOPs."""
        found = []
        for cuts in itertools.product((1, 2, 3), repeat=2):
            busy, crossing = {i: 0.0, j: 0.0}, 0.0
            for own, other, cut in ((i, j, cuts[0]), (j, i, cuts[1])):
                below, above = sum(flops[:cut]), sum(flops[cut:]) + 2 * heads
                host = own if cut == 3 else other
                for who, work in ((own, below), (host, above)):
                    speed = devices[who].forward_flops_per_s
                    busy[who] += steps[own] * 3 * work / speed
                if cut < 3:
                    rate = min(devices[k].up_bytes_per_s for k in (i, j))
                    spent = sum(devices[k].message_overhead_s for k in (i, j))
                    crossing += steps[own] * 2 * (sizes[cut - 1] / rate + spent)
            found.append(max(busy.values()) + crossing)
        return min(found)

    seconds = np.full((4, 4), np.inf)
    for i, j in itertools.combinations(range(4), 2):
        seconds[i, j] = round_s(i, j)
    pairings = (((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2)))
    best = min(slowest_pair_s(seconds, pairs) for pairs in pairings)
    asked = problem(devices, flops, sizes, heads, steps)
    exact = plan_pairs(asked, "exact")
    assert max(pair.seconds for pair in exact) == pytest.approx(best)
    for pair in plan_pairs(asked, "greedy"):
        assert pair.seconds == pytest.approx(seconds[pair.clients])


def test_a_pair_keeps_to_its_memory():
    """A layer has two parameters, 8 bytes each with its gradient, and one activation.

    So a network of two layers takes 2 * 17 for the layers and 9 for the head, and 9 for
    the exit: 52. Hosting the upper layer, the exit and the head takes 35, and holding
    the lower layer 17.
    """
    weak, strong = device(1.0), device(9.0)
    (free,) = plan_pairs(problem([weak, strong], [1, 1]))
    assert free.cuts == (1, 2)
    assert free.memory_bytes == (17, 52 + 35)
    (small,) = plan_pairs(problem([weak, strong], [1, 1]), memory_bytes=60.0)
    assert max(small.memory_bytes) <= 60
    assert small.seconds > free.seconds
    with pytest.raises(UserError) as refusal:
        plan_pairs(problem([weak, strong], [1, 1]), memory_bytes=51.0)
    assert str(refusal.value) == (
        "max_memory: 51 bytes of client 0 (d) is too little for the pair of clients 0 "
        "and 1; allowed is 52 or more for both"
    )


def test_partners_compute_the_same_network_whatever_their_cuts():
    """So two equal devices gain nothing, however much the exits differ."""
    costs = [LayerCost("", 1, 100, 1, 1)] * 3
    exits = [LayerCost("", 1, flops, 1, 1) for flops in (30, 60, 90)]
    head = LayerCost("", 1, 10, 1, 1)
    asked = problem([device(1e6, 1e9), device(1e6, 1e9)], [100] * 3)
    asked = asked._replace(costs=(*costs, *exits, head))
    (pair,) = plan_pairs(asked)
    assert pair.seconds == pytest.approx(3 * (300 + 90 + 10) / 1e6)
    assert pair.cuts == (3, 3)


@pytest.mark.parametrize(
    ("count", "error"), [(18, "18 clients are too many"), (3, "3 clients do not form")]
)
def test_a_number_without_an_exact_choice_is_refused_at_once(count, error, monkeypatch):
    """Not after a split of the layers for each of so many pairs."""
    monkeypatch.setattr(pairing, "_split", None)
    with pytest.raises(UserError, match=f"^pairs: {error}"):
        plan_pairs(problem([device(1.0)] * count, [1, 1]), "exact")


@pytest.mark.parametrize("rule", ["greedy", "exact"])
@pytest.mark.parametrize("speed", [1e-320, 1e-20])
def test_a_client_that_never_ends_is_refused(rule, speed):
    with pytest.raises(UserError, match=r"^devices: a round of client 1 \(d\) takes"):
        plan_pairs(problem([device(1.0), device(speed)], [1, 1]), rule)


def test_the_command_shows_who_hosts_whom(tmp_path, capsys):
    fleet = tmp_path / "fleet.csv"
    text = "name,forward_flops_per_s,up_bytes_per_s,count\n"
    text += "weak,1e6,1e9,{}\nstrong,1e8,1e9,2\n"
    fleet.write_text(text.format(2))
    flags = ["plan", "--network", "tiny", "--plugin", "tiny", "--batch-size", "8"]
    flags += ["--devices", str(fleet), "--out", str(tmp_path / "plan")]
    for rule in ("greedy", "exact"):
        assert cli.main([*flags, "--pairs", rule]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "weak │ 2 │ 1 │ strong: 2..3 │ none" in shown
        written = json.loads((tmp_path / "plan" / "pairs.json").read_text())
        (first, second) = written["pairs"]
        for pair in (first, second):
            weak, strong = sorted(pair["clients"], key=lambda one: one["id"])
            assert (weak["device"], weak["cut"]) == ("weak", 1)
            assert (strong["device"], strong["cut"]) == ("strong", 3)
        assert written["seconds"] == max(first["seconds"], second["seconds"])
    fleet.write_text(text.format(1))
    for words, message in (
        (["exact"], "pairs: 3 clients do not form pairs; allowed are even numbers"),
        (["fold"], "pairs: fold is unknown"),
        (["exact", "--max-joules", "3"], "max_joules: has no effect with pairs"),
        (["exact", "--strategy", "averaging"], "strategy: has no effect with pairs"),
        (["exact", "--micro-batches", "2"], "micro_batches: has no effect with pairs"),
        (["greedy", "--average", "servers"], "average: has no effect with pairs"),
        (["greedy", "--period", "3"], "period: has no effect with pairs"),
        (["greedy", "--init", "per_client"], "init: has no effect with pairs"),
        (["greedy", "--exits", "all"], "exits: all is not allowed with pairs"),
    ):
        assert cli.main([*flags, "--pairs", *words]) == 2
        line = capsys.readouterr().err
        assert message in line
        assert line.count("\n") == 1
