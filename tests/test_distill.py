"""Exits that learn from the server: the loss, the step, the bytes, the wait."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from client_devices import small_run
from rounds import assert_same, branches, train
from test_contracts import DENSE, SIZES
from test_deployment import SMALL, both
from tiny import tiny_data, tiny_federation, tiny_shards
from torch_networks import import_torch

from hsee_jax import cli
from hsee_jax.algorithms import averaging, sequential
from hsee_jax.config import override
from hsee_jax.core import Batch, UserError
from hsee_jax.deployment.bundle import check_detached
from hsee_jax.engine.round import CLIENT_AXES
from hsee_jax.federation import init_client, init_server
from hsee_jax.federation.branch import forward
from hsee_jax.federation.fused import detached_step, joint_step
from hsee_jax.link import unpack_bytes
from hsee_jax.nn import distillation_loss, init_network, masked_cross_entropy
from hsee_jax.runs.build import build
from hsee_jax.runs.served import build_served
from hsee_jax.systems import Schedule, Work, round_time, schedule_of
from hsee_jax.systems.traffic import traffic_of

DESCENT = optax.scale(-1.0)  # the change of the weights is the gradient
RATES = (jnp.float32(1.0), jnp.float32(1.0))
REAL = 6
CUTS = {4: 1, 1: 2, 6: 1}


def draw_logits(seed=0, classes=5):
    rng = np.random.default_rng(seed)
    own, teacher = 3 * rng.normal(size=(2, 8, classes)).astype(np.float32)
    return own, teacher, np.arange(8) < REAL


def softmax(values):
    exponents = np.exp(values - values.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 2.5, 10.0])
def test_the_loss_has_a_closed_form(temperature):
    """And so has its gradient; padding has no part in either."""
    own, teacher, mask = draw_logits()
    at = jax.value_and_grad(distillation_loss)
    loss, slope = at(*map(jnp.asarray, (own, teacher, mask)), temperature)
    q, p = softmax(own / temperature), softmax(teacher / temperature)
    each = temperature**2 * np.sum(p * np.log(p / q), axis=1)
    np.testing.assert_allclose(loss, each[:REAL].mean(), rtol=1e-5)
    expected = temperature * (q - p) * mask[:, None] / REAL
    np.testing.assert_allclose(slope, expected, atol=1e-6)
    nothing = distillation_loss(own, teacher, np.zeros(8, bool), temperature)
    assert nothing == 0


def test_the_loss_is_that_of_torch():
    torch = import_torch()
    own, teacher, mask = draw_logits(1)
    student = torch.tensor(own[mask], requires_grad=True)
    loss = 9.0 * torch.nn.functional.kl_div(
        torch.log_softmax(student / 3, dim=1),
        torch.softmax(torch.tensor(teacher[mask]) / 3, dim=1),
        reduction="batchmean",
    )
    loss.backward()
    at = jax.value_and_grad(distillation_loss)
    found, slope = at(*map(jnp.asarray, (own, teacher, mask)), 3.0)
    np.testing.assert_allclose(found, loss.item(), rtol=1e-5)
    np.testing.assert_allclose(slope[:REAL], student.grad, atol=1e-6)


def sides():
    """What a client and its server compute, their states, and a padded batch."""
    federation = tiny_federation({0: 2})._replace(optimizer=DESCENT)
    network = jax.jit(lambda: init_network(federation.model, jax.random.key(0)))()
    client, server = init_client(network, 2, DESCENT), init_server(network, 2, DESCENT)
    data = tiny_data(8)
    images = jnp.asarray(data.images, jnp.float32) / 64 - 1
    batch = Batch(images, jnp.asarray(data.labels), jnp.arange(8) < REAL)
    return federation.specs(0), client, server, batch


def params_of(branch):
    return [layer.params for layer in (*branch.layers, branch.head)]


def replaced(branch, params):
    *layers, head = params
    pairs = zip(branch.layers, layers, strict=True)
    return branch.replace(
        layers=tuple(layer.replace(params=p) for layer, p in pairs),
        head=branch.head.replace(params=head),
    )


@pytest.mark.parametrize(
    "boundary", ["detached", pytest.param("joint", marks=pytest.mark.slow)]
)
def test_a_step_is_the_gradient_of_the_sum_of_both_losses(boundary):
    """By one gradient of the whole; the server's step stays what it is."""
    specs, client, server, batch = sides()
    weight = 1.0 if boundary == "detached" else 0.5

    @jax.jit
    def steps(client, server):
        if boundary == "detached":
            step, options = detached_step, {}
        else:
            step, options = joint_step, {"exit_gradient": 0.5}
        plain = step(*specs, client, server, batch, RATES, **options)
        return plain, step(*specs, client, server, batch, RATES, **options, distill=3.0)

    def loss(params, share):
        own = replaced(client, params)
        features, logits, _ = forward(
            specs[0], own, batch.inputs, batch.mask, train=True, head_gradient=share
        )
        _, teacher, _ = forward(specs[1], server, features, batch.mask, train=True)
        total = masked_cross_entropy(logits, batch.labels, batch.mask)[0]
        fixed = jax.lax.stop_gradient(teacher)
        total += distillation_loss(logits, fixed, batch.mask, 3.0)
        if boundary == "joint":
            total += masked_cross_entropy(teacher, batch.labels, batch.mask)[0]
        return total

    plain, distilled = steps(client, server)
    gradient = jax.jit(lambda p: jax.grad(loss)(p, weight))(params_of(client))
    expected = jax.tree.map(jnp.subtract, params_of(client), gradient)
    assert_same(params_of(distilled[0]), expected, rtol=1e-4, atol=1e-5)
    moves = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), params_of(distilled[0]), params_of(plain[0])
    )
    assert min(jax.tree.leaves(moves[-1])) > 1e-3
    assert_same(distilled[1], plain[1], rtol=1e-6, atol=1e-7)
    assert_same(distilled[2].exit, plain[2].exit, rtol=1e-6)
    down = unpack_bytes(np.stack([plain[2].link, distilled[2].link]))
    np.testing.assert_array_equal(down[1] - down[0], [0, REAL * 3 * 4])


def test_a_client_does_not_learn_from_logits_that_are_not_finite():
    specs, client, server, batch = sides()
    head = jax.tree.map(lambda leaf: leaf * jnp.nan, server.head.params)
    broken = server.replace(head=server.head.replace(params=head))
    step = jax.jit(lambda c, s: detached_step(*specs, c, s, batch, RATES, distill=2.0))
    *after, metrics = step(client, broken)
    jax.tree.map(np.testing.assert_array_equal, after, [client, broken])
    assert np.isnan(metrics.exit.loss_sum) and np.isnan(metrics.server.loss_sum)


def results(make, cuts, axes, **options):
    """The clients and servers after a round in forms of the engine."""
    federation = tiny_federation(cuts, DENSE)
    shards = tiny_shards({i: SIZES[i] for i in sorted(cuts)})
    strategy = make(federation, **options)
    for axis in axes:
        own = make(federation._replace(one_by_one=axis == "map"), **options)
        state, log = train(own, federation, shards, axis=axis, rounds=1)
        yield branches(federation, strategy, state), log[0][2]


@pytest.mark.parametrize(
    ("make", "options", "cuts", "axes"),
    [
        pytest.param(averaging, {}, CUTS, CLIENT_AXES, marks=pytest.mark.slow),
        pytest.param(sequential, {}, CUTS, CLIENT_AXES, marks=pytest.mark.slow),
        pytest.param(
            sequential, {"turn": "epoch"}, CUTS, CLIENT_AXES, marks=pytest.mark.slow
        ),
        pytest.param(
            averaging, {"boundary": "joint"}, CUTS, CLIENT_AXES, marks=pytest.mark.slow
        ),
    ],
)
def test_all_forms_of_the_engine_train_alike(make, options, cuts, axes):
    """They count the same bytes: three logits of 4 bytes for each sample."""
    loop, *others = results(make, cuts, axes, distill=2.0, **options)
    for other in others:
        assert_same(loop, other, rtol=1e-3, atol=1e-5)
    federation, metrics = tiny_federation(cuts, DENSE), loop[1]
    strategies = make(federation, **options), make(federation, distill=2.0, **options)
    plain, distilled = (
        [
            one.sample.down_bytes
            for one in traffic_of(
                federation, strategy, jax.eval_shape(strategy.init, jax.random.key(0))
            )
        ]
        for strategy in strategies
    )
    assert {d - p for d, p in zip(distilled, plain, strict=True)} == {12}
    crossed = unpack_bytes(np.asarray(metrics.link))[:, 1]
    by_slot = np.repeat(distilled, [len(group.ids) for group in federation.groups])
    np.testing.assert_array_equal(crossed, by_slot * metrics.exit.count)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (dict(strategy="sequential", turn="together"), "distill: 2.0 .* together"),
        (dict(micro_batches=2, batch_size=4), "micro_batches: 2 .* with distill"),
        (dict(strategy="local"), "distill: 2.0 has no effect on"),
    ],
)
def test_what_does_not_go_with_it_is_refused(changes, error):
    with pytest.raises(UserError, match=error):
        build(override(small_run(), distill=2.0, **changes))


def test_nothing_comes_back_in_one_message_a_round():
    with pytest.raises(UserError, match="distill: 2.0 is not allowed with one message"):
        check_detached(build_served(small_run(distill=2.0)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        dict(strategy="averaging", link="int8"),
        dict(strategy="sequential", boundary="joint", exit_gradient=0.5),
    ],
    ids=lambda changes: changes["strategy"],
)
def test_a_run_on_devices_equals_the_simulation_up_to_rounding(changes, tmp_path):
    served, simulated = both(override(SMALL, distill=3.0, **changes), tmp_path)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        served[0],
        simulated[0],
    )
    for own, other in zip(served[1], simulated[1], strict=True):
        assert (own.images, own.link) == (other.images, other.link)
        np.testing.assert_allclose(own.train, other.train, rtol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_the_clock_waits_for_the_logits(shared):
    """As for a gradient; one client has a closed form, without overlap."""
    work = Work(3, 1.0, 2.0, up_s=4.0, server_s=8.0, down_s=16.0)
    time = round_time(work, Schedule(shared, distill=True))
    assert time.seconds == 3 * (1 + 2 + 4 + 8 + 16)
    assert time.receiving_s == 3 * 16
    assert round_time(work, Schedule(shared)).seconds == 1 + 4 + 3 * 8
    strategy = averaging(tiny_federation({0: 1}), distill=2.0, period=0)
    assert strategy.waits
    assert schedule_of(strategy, 3) == Schedule(shared=False, distill=True)


@pytest.mark.slow
def test_the_flag_changes_a_run(tmp_path):
    """Its exits, and the bytes: ten logits of 4 bytes come down for each sample."""
    words = ["train", "--network", "mlp", "--depth", "2", "--hidden", "4"]
    words += ["--cuts", "1", "--num-clients", "2", "--batch-size", "8"]
    words += ["--max-train-samples", "48", "--max-test-samples", "8", "--rounds", "1"]
    records = []
    for flags in ([], ["--distill", "4"]):
        out = tmp_path / str(len(flags))
        assert cli.main([*words, *flags, "--out", str(out)]) == 0
        records.append(json.loads((out / "metrics.jsonl").read_text()))
    plain, distilled = records
    assert plain["train"]["exit_loss"] != distilled["train"]["exit_loss"]
    more = distilled["link"]["down_bytes"] - plain["link"]["down_bytes"]
    assert more == distilled["images"] * 10 * 4


def test_info_shows_the_logits(capsys):
    words = ["info", "--network", "tiny", "--plugin", "tiny", "--cuts", "1"]
    assert cli.main([*words, "--distill", "2"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "\u2502" in line]
    rows = [[cell.strip() for cell in line.split("\u2502")[1:-1]] for line in lines]
    assert {row[-1] for row in rows if row[0].isdigit()} == {"40"}
