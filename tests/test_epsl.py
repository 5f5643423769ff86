"""All clients' rows in one step, against one loss over the joined rows."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rounds import assert_same, branches, train
from test_mesh import first_devices
from tiny import DenseLayer, tiny_federation, tiny_model, tiny_shards

from hsee_jax.algorithms import sequential, splitfed_v2
from hsee_jax.algorithms.rows import joined, rows_of
from hsee_jax.core import Batch, UserError
from hsee_jax.federation import Federation
from hsee_jax.federation.state import RunState
from hsee_jax.link import topk, unpack_bytes

RATE = np.float32(0.3)
TOGETHER = {"turn": "together"}
JOINT = TOGETHER | {"boundary": "joint"}


class NormLayer(nn.Module):
    """A dense layer and BatchNorm over the real rows."""

    @nn.compact
    def __call__(self, x, mask, *, train):
        x = nn.Dense(6)(x)
        rows = jnp.broadcast_to(mask[:, None], x.shape)
        return nn.tanh(
            nn.BatchNorm(use_running_average=not train, momentum=0.9)(x, mask=rows)
        )


MODEL = tiny_model((DenseLayer(4), NormLayer(), DenseLayer(5)))


def federation_of(cuts, model=MODEL) -> Federation:
    federation = tiny_federation(cuts, model)
    return federation._replace(optimizer=optax.scale(-1.0))


def batches_of(federation, count=4, seed=0, padding=True):
    """Rows of noise for each group; client n of a group lacks n rows at the end."""
    rng = np.random.default_rng(seed)
    found = []
    for group in federation.groups:
        shape = len(group.ids), count
        mask = np.arange(count) < count - np.arange(shape[0])[:, None] * padding
        found.append(
            Batch(
                jnp.asarray(rng.normal(size=(*shape, 5, 5, 1)), jnp.float32),
                jnp.asarray(rng.integers(0, 3, shape), jnp.int32),
                jnp.asarray(mask),
            )
        )
    return tuple(found)


def step(strategy, batches, state=None) -> tuple[RunState, RunState, tuple]:
    """The state before and after a step, and its metrics, with a mean at the end."""
    if state is None:
        state = jax.jit(strategy.init)(jax.random.key(3))
    order = np.arange(sum(len(b.labels) for b in batches), dtype=np.int32)
    after, metrics = jax.jit(strategy.step)(state, batches, order, RATE)
    return state, after, metrics


def joined_loss(federation, params, state, batches, weights):
    """The weighted sum of row losses; clients one by one, rows joined at their cut."""
    clients, server = params
    model, first = federation.model, federation.groups[0].cut
    rows, labels, scale = None, [], []

    def run(stage, own, layer, x):
        variables = {"params": own, "batch_stats": layer.batch_stats}
        return stage.apply(variables, x, jnp.ones(len(x), bool), train=True)[0]

    for depth in range(first, len(model.stages) + 1):
        for g, group in enumerate(federation.groups):
            if group.cut != depth:
                continue
            for m in range(len(group.ids)):
                here = np.asarray(batches[g].mask)[m]
                if not here.any():
                    continue
                x = batches[g].inputs[m][here]
                for i in range(depth):
                    layer = state.clients[g].layers[i]
                    layer = jax.tree.map(lambda leaf, m=m: leaf[m], layer)
                    own = jax.tree.map(lambda leaf, m=m: leaf[m], clients[g][i])
                    x = run(model.stages[i], own, layer, x)
                rows = x if rows is None else jnp.concatenate([rows, x])
                labels += np.asarray(batches[g].labels)[m][here].tolist()
                scale += [weights[g][m]] * int(here.sum())
        if depth < len(model.stages) and rows is not None:
            at = depth - first
            layer = state.servers[0].layers[at]
            rows = run(model.stages[depth], server[at], layer, rows)
    logits = run(model.final_head, server[-1], state.servers[0].head, rows)
    log_p = logits - jax.scipy.special.logsumexp(logits, axis=1, keepdims=True)
    picked = jnp.stack([-log_p[n, label] for n, label in enumerate(labels)])
    return jnp.sum(picked * jnp.asarray(scale, jnp.float32))


def params_of(state):
    clients = [[layer.params for layer in stack.layers] for stack in state.clients]
    server = state.servers[0]
    return clients, [part.params for part in (*server.layers, server.head)]


@pytest.mark.parametrize(
    ("cuts", "options", "absent"),
    [
        ({0: 1, 1: 2, 2: 1}, JOINT, False),
        pytest.param({0: 1, 1: 1, 2: 1}, JOINT, False, marks=pytest.mark.slow),
        pytest.param({0: 1, 1: 3, 2: 1, 3: 2}, TOGETHER, False, marks=pytest.mark.slow),
        pytest.param({0: 1, 1: 2, 2: 2}, TOGETHER, True, marks=pytest.mark.slow),
        pytest.param({0: 1, 1: 3, 2: 1, 3: 2}, JOINT, False, marks=pytest.mark.slow),
    ],
)
def test_a_step_is_the_gradient_of_the_joined_batch(cuts, options, absent):
    """The server moves by it, and with a joint boundary the clients' mean, too."""
    federation = federation_of(cuts)
    batches = batches_of(federation)
    if absent:  # nobody comes to the first layer of the server
        first = batches[0]._replace(mask=jnp.zeros_like(batches[0].mask))
        batches = (first, *batches[1:])
    before, after, _ = step(sequential(federation, **options), batches)
    total = sum(int(batch.mask.sum()) for batch in batches)
    ones = [[1 / total] * len(batch.mask) for batch in batches]
    gradient = jax.grad(
        lambda params: joined_loss(federation, params, before, batches, ones)
    )
    clients, server = jax.jit(gradient)(params_of(before))
    moved = jax.tree.map(
        lambda new, old: (old - new) / RATE, params_of(after), params_of(before)
    )
    assert_same(moved[1], server, rtol=1e-3, atol=1e-5)
    if absent:
        assert_same(after.servers[0].layers[0], before.servers[0].layers[0], rtol=0)
    if "boundary" in options:
        for g, batch in enumerate(batches):
            share = np.asarray(batch.mask.sum(axis=1) / total, np.float32)
            weighted = jax.tree.map(
                lambda leaf, w=share: np.tensordot(w, leaf, 1), moved[0][g]
            )
            joined = jax.tree.map(lambda leaf: leaf.sum(axis=0), clients[g])
            assert_same(weighted, joined, rtol=1e-3, atol=1e-5)


def test_rows_of_different_cuts_join_by_their_weights():
    """A mean counts every client that has the row; the other rows follow in order."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(3, 4, 2)).astype(np.float32)
    there = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], bool)
    early, late = rows_of(x[:2], there[:2], 3), rows_of(x[2:], there[2:], 3)
    found = joined(early, late)
    means = [x[there[:, row], row].mean(axis=0) for row in range(3)]
    np.testing.assert_allclose(found.means, means, rtol=1e-6)
    np.testing.assert_array_equal(found.weights, there[:, :3].sum(axis=0))
    np.testing.assert_array_equal(found.own, x[:, 3])
    np.testing.assert_array_equal(found.mask, there[:, 3])


def test_identical_clients_may_share_all_gradients():
    """Equal rows and weights: phi = 1 is phi = 0, with BatchNorm and running means."""
    federation = federation_of({0: 1, 1: 1, 2: 1})
    (rows,) = batches_of(federation, padding=False)
    rows = jax.tree.map(lambda leaf: jnp.stack([leaf[0]] * 3), rows)
    results = [
        step(splitfed_v2(federation, **TOGETHER, gradient_share=share), (rows,))[1]
        for share in (0.0, 1.0)
    ]
    assert_same(*results, rtol=1e-4, atol=1e-6)


def test_a_shared_gradient_is_refused_where_links_differ():
    codec = topk(keep_share=0.1, link_rates=(1.0, 2.0))
    federation = federation_of({0: 1, 1: 1})._replace(codec=codec)
    splitfed_v2(federation, **TOGETHER)
    with pytest.raises(UserError, match="gradient_share: 0.5 is not allowed where lin"):
        splitfed_v2(federation, **TOGETHER, gradient_share=0.5)


def test_the_shared_gradient_of_a_linear_server_is_the_mean_by_hand():
    """Behind the last layer, gradients of features are those of logits, times W."""
    federation = federation_of({0: 3, 1: 3})
    batches = batches_of(federation)
    strategy = splitfed_v2(federation, **TOGETHER, gradient_share=0.5)
    before, after, _ = step(strategy, batches)
    (head,) = before.servers[0].head.params.values()
    kernel, bias = np.asarray(head["kernel"]), np.asarray(head["bias"])

    def features(params, m):
        x = batches[0].inputs[m]
        for stage, own, layer in zip(
            MODEL.stages, params, before.clients[0].layers, strict=True
        ):
            stats = jax.tree.map(lambda leaf: leaf[m], layer.batch_stats)
            x, _ = stage.apply(
                {"params": own, "batch_stats": stats}, x, batches[0].mask[m], train=True
            )
        return x

    own = [
        [jax.tree.map(lambda a, m=m: a[m], p) for p in params_of(before)[0][0]]
        for m in range(2)
    ]
    values, pullbacks = zip(
        *(jax.vjp(lambda p, m=m: features(p, m), own[m]) for m in range(2)),
        strict=True,
    )
    slopes = (
        np.asarray(jax.nn.softmax(np.stack(values) @ kernel + bias))
        - np.eye(3)[np.asarray(batches[0].labels)]
    )
    counts = np.array([4, 3])
    slopes = slopes * np.asarray(batches[0].mask)[:, :, None] / counts.sum()
    shared = slopes.copy()
    shared[:, :2] = slopes[:, :2].mean(axis=0)
    for m in range(2):
        gradient = shared[m] @ kernel.T * counts.sum() / counts[m]
        (expected,) = pullbacks[m](jnp.asarray(gradient, jnp.float32))
        moved = jax.tree.map(
            lambda new, old, m=m: (old[m] - new[m]) / RATE,
            params_of(after)[0][0],
            params_of(before)[0][0],
        )
        assert_same(moved, expected, rtol=1e-3, atol=1e-5)
    inputs = np.concatenate(
        [np.stack(values)[:, :2].mean(axis=0), values[0][2:], values[1][2:]]
    )
    outputs = np.concatenate([slopes[:, :2].sum(axis=0), slopes[0, 2:], slopes[1, 2:]])
    (after_head,) = after.servers[0].head.params.values()
    np.testing.assert_allclose(
        (kernel - after_head["kernel"]) / RATE, inputs.T @ outputs, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize(
    ("share", "rows"),
    [
        pytest.param(0.0, 12, marks=pytest.mark.slow),
        pytest.param(0.5, 8, marks=pytest.mark.slow),
        (0.7, 6),
        pytest.param(1.0, 4, marks=pytest.mark.slow),
    ],
)
def test_shared_gradients_come_down_once(share, rows):
    """N = 3 clients, B = 4: ceil(phi B) + N (B - ceil(phi B)) rows of 4 floats."""
    federation = federation_of({0: 1, 1: 1, 2: 1})
    strategy = splitfed_v2(federation, **TOGETHER, gradient_share=share)
    batches = batches_of(federation, padding=False)
    _, _, (metrics,) = step(strategy, batches)
    up, down = unpack_bytes(np.asarray(metrics.link)).sum(axis=0)
    assert (up, down) == (12 * 20, rows * 16)


def test_padding_is_not_sent_down():
    """Of rows 4, 3 and 2, with the first two shared: 2 + 2 + 1 + 0 rows."""
    federation = federation_of({0: 1, 1: 1, 2: 1})
    strategy = splitfed_v2(federation, **TOGETHER, gradient_share=0.5)
    _, _, (metrics,) = step(strategy, batches_of(federation))
    link = unpack_bytes(np.asarray(metrics.link))
    assert link[:, 1].tolist() == [4 * 16, 1 * 16, 0]


@pytest.mark.slow
@pytest.mark.parametrize("options", [TOGETHER, JOINT, JOINT | {"gradient_share": 0.5}])
def test_a_broken_client_is_left_out_of_the_step(options):
    """The others step as if it were absent; its own loss is NaN."""
    federation = federation_of({0: 1, 1: 1, 2: 2})
    strategy = sequential(federation, **options)
    batches = batches_of(federation)
    broken = batches[0]._replace(inputs=batches[0].inputs.at[1, 0].set(jnp.nan))
    away = batches[0]._replace(mask=batches[0].mask.at[1].set(False))
    start, one, metrics = step(strategy, (broken, batches[1]))
    _, other, _ = step(strategy, (away, batches[1]))
    assert_same(one, other, rtol=1e-5, atol=1e-6)
    assert np.isnan(metrics[0].server.loss_sum).tolist() == [False, True]
    assert np.isfinite(metrics[1].server.loss_sum).all()
    moved = params_of(one)[1][-1], params_of(start)[1][-1]
    with pytest.raises(AssertionError):
        assert_same(*moved, rtol=1e-3)


@pytest.mark.slow
def test_an_absent_client_with_batch_norm_leaves_the_step_to_the_others():
    """Its features are NaN, because BatchNorm has no row to take a mean of."""
    federation = federation_of({0: 1, 1: 1}, tiny_model())
    (rows,) = batches_of(federation)
    away = rows._replace(mask=rows.mask.at[1].set(False))
    start, after, (metrics,) = step(sequential(federation, **JOINT), (away,))
    assert np.isfinite(metrics.server.loss_sum).all()
    moved = jax.tree.map(
        lambda new, old: np.abs(new - old).max(), params_of(after), params_of(start)
    )
    assert min(moved[1][-1]["Dense_0"].values()) > 1e-3
    present, absent = (
        jax.tree.map(lambda leaf, m=m: leaf[m], (start.clients[0], after.clients[0]))
        for m in range(2)
    )
    assert_same(*absent, rtol=0)
    with pytest.raises(AssertionError):
        assert_same(*present, rtol=1e-3)


CUTS = {7: 1, 2: 3, 5: 2, 0: 1, 3: 2}
SIZES = {7: 7, 2: 4, 5: 7, 0: 3, 3: 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [JOINT | {"gradient_share": 0.5, "average": "clients"}, TOGETHER]
)
def test_it_trains_alike_on_several_devices(options):
    """Three of five clients take part in each of two rounds."""
    results, shards = [], tiny_shards(SIZES)
    for axis, mesh in (("loop", None), ("vmap", first_devices(4))):
        federation = tiny_federation(CUTS, MODEL, mesh)
        strategy = sequential(federation, **options)
        state, log = train(strategy, federation, shards, axis=axis, participation=0.6)
        totals = [jax.tree.map(np.sum, metrics) for _, _, metrics in log]
        results.append((branches(federation, strategy, state), totals))
    assert_same(*results, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{"turn": "together"}, {"boundary": "joint"}])
def test_a_share_of_gradients_needs_gradients_and_one_step(options):
    with pytest.raises(UserError, match="gradient_share: 0.5 is not allowed without"):
        sequential(federation_of({0: 1}), gradient_share=0.5, **options)
