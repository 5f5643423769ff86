"""Gates against both exits computed for every sample."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import CLASSES, DenseLayer, tiny_data, tiny_federation, tiny_model

from hsee_jax.core import UserError
from hsee_jax.federation.branch import (
    client_spec,
    forward,
    init_client,
    init_server,
    server_spec,
)
from hsee_jax.federation.junction import concat_junction, mean_junction
from hsee_jax.inference.criteria import CRITERIA, Criterion, uncertainty_of
from hsee_jax.inference.gate import Gate, make_gate
from hsee_jax.inference.measurement import _sample_costs
from hsee_jax.nn.model import init_network
from hsee_jax.systems import layer_costs

MODEL = tiny_model()
NONE = optax.identity()
NETWORK = jax.jit(lambda: init_network(MODEL, jax.random.key(0)))()


def parts(cut):
    return init_client(NETWORK, cut, NONE), init_server(NETWORK, cut, NONE)


def specs(cut, model=MODEL):
    return client_spec(model, cut, NONE), server_spec(model, cut, NONE)


def images(count):
    return jnp.asarray(tiny_data(count).images, jnp.float32) / 64 - 1


def both(cut, inputs):
    """Return the logits of exit and server for every sample."""
    return without_a_gate(specs(cut), parts(cut), inputs)


def without_a_gate(specs, branches, inputs):
    @jax.jit
    def logits(branches, inputs):
        mask = jnp.ones(len(inputs), bool)
        features, first, _ = forward(specs[0], branches[0], inputs, mask, train=False)
        return first, forward(specs[1], branches[1], features, mask, train=False)[1]

    return jax.device_get(logits(branches, inputs))


def unsure(logits, criterion):
    """Compute the criteria by their definitions, in float64."""
    e = np.exp(logits.astype(np.float64))
    p = np.sort(e / e.sum(axis=-1, keepdims=True), axis=-1)
    if criterion == "entropy":
        return -(p * np.log(p)).sum(axis=-1)
    return 1 - (p[:, -1] if criterion == "confidence" else p[:, -1] - p[:, -2])


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("cut", [1, 3])
def test_a_gate_is_a_choice_between_both_answers(cut, criterion):
    """Thresholds lie between all uncertainties and beyond both ends."""
    inputs = images(13)
    exit_logits, logits = both(cut, inputs)
    doubts = unsure(exit_logits, criterion)
    gate = make_gate(*specs(cut), batch_size=16, criterion=criterion, sizes=(1, 5, 16))
    values = np.sort(doubts)
    largest = CRITERIA.make(criterion).largest(CLASSES)
    for threshold in (0.0, *(values[1:] + values[:-1]) / 2, largest * 1.001):
        answers = gate.answer(*parts(cut), inputs, threshold)
        exited = doubts < threshold
        expected = np.where(exited[:, None], exit_logits, logits)
        np.testing.assert_array_equal(answers.exited, exited)
        np.testing.assert_array_equal(answers.predictions, expected.argmax(axis=-1))
        np.testing.assert_allclose(answers.logits, expected, atol=1e-5)
        np.testing.assert_allclose(answers.exit_logits, exit_logits, atol=1e-5)
        np.testing.assert_allclose(answers.uncertainty, doubts, atol=1e-5)
    assert exited.all()


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_largest_uncertainty_is_that_of_equal_logits(criterion):
    """And the smallest, 0, is that of logits that leave one class alone."""
    logits = jnp.array([[2.0, 2.0, 2.0], [90.0, 0.0, 0.0]])
    measure = CRITERIA.make(criterion)
    values = measure.uncertainty(logits)
    np.testing.assert_allclose(values, [measure.largest(3), 0], atol=1e-6)


def test_at_equality_a_sample_is_sent():
    inputs = images(6)
    gate = make_gate(*specs(2), batch_size=6)
    doubts = gate.answer(*parts(2), inputs, 0.0).uncertainty
    for threshold in doubts.tolist():
        exited = gate.answer(*parts(2), inputs, threshold).exited
        assert (
            exited.sum()
            == (doubts < threshold).sum()
            == exited[np.argsort(doubts)].argmin()
        )


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_server_answers_where_the_exit_is_not_finite(criterion, value):
    """It does at any threshold, whatever the criterion makes of one broken logit."""
    client, server = parts(2)
    bias = client.head.params["Dense_0"]["bias"]
    params = {**client.head.params["Dense_0"], "bias": bias.at[1].set(value)}
    broken = client.replace(head=client.head.replace(params={"Dense_0": params}))
    gate = make_gate(*specs(2), batch_size=4, criterion=criterion, sizes=(4,))
    expected = gate.answer(client, server, images(4), 0.0)
    for threshold in (0.0, 0.5, 99.0, np.inf):
        answers = gate.answer(broken, server, images(4), threshold)
        assert not answers.exited.any()
        assert (answers.uncertainty == np.inf).all()
        np.testing.assert_array_equal(answers.predictions, expected.predictions)


def test_an_uncertainty_that_is_not_finite_is_never_below_a_threshold():
    doubts = np.array([0.1, np.nan, np.inf, -np.inf], np.float32)
    nothing = np.full((4, 2), np.nan, np.float32)
    gate = Gate(
        lambda client, inputs: (inputs, nothing[:, None], doubts[:, None]),
        lambda server, features, rows: features[rows],
    )
    for threshold in (0.5, np.inf):
        answers = gate.answer(None, None, np.eye(4, 2, dtype=np.float32), threshold)
        assert answers.exited.tolist() == [True, False, False, False]
        assert answers.predictions.tolist() == [-1, 1, 0, 0]


@pytest.mark.parametrize("lowest", [-1e-4, -3.0])
def test_a_negative_uncertainty_is_refused(lowest):
    """Such as an energy: at threshold 0 its exits would answer, not the server."""
    doubts = np.array([[np.inf], [0.5], [lowest]], np.float32)
    gate = Gate(
        lambda client, inputs: (inputs, np.zeros((3, 1, 2), np.float32), doubts),
        lambda server, features, rows: features[rows],
    )
    with pytest.raises(UserError, match=r"criterion: .* of -\S+ is not .* 0 or more"):
        gate.answer(None, None, np.eye(3, 2, dtype=np.float32), 0.0)


def test_an_uncertainty_that_rounding_made_negative_is_zero():
    """So at threshold 0 the server answers; what is negative by itself stays so."""
    criterion = Criterion(lambda logits: logits[:, 0], lambda classes: 1.0)
    logits = jnp.array([-1e-7, 0.5, -1e-4, jnp.nan])[:, None]
    np.testing.assert_array_equal(
        uncertainty_of(criterion, logits), np.float32([0, 0.5, -1e-4, np.inf])
    )


def test_the_server_can_run_on_a_whole_batch():
    with pytest.raises(ValueError, match=r"sizes: \[4\]; the batch size 7 is missing"):
        make_gate(*specs(1), batch_size=7, sizes=[4])


def test_every_sample_is_answered_once():
    """In batches of 1 to 7 the server runs on the rows that the exit leaves to it."""
    gate = make_gate(*specs(1), batch_size=7, sizes=(2, 3, 7))
    asked = []

    def on_server(server, features, rows):
        asked.append(rows.tolist())
        return gate.on_server(server, features, rows)

    counting = gate._replace(on_server=on_server)
    exit_logits, logits = both(1, images(7))
    for count in range(1, 8):
        inputs = np.asarray(images(7))[:count]
        doubts = np.sort(gate.answer(*parts(1), inputs, 0.0).uncertainty)
        for count_at_server, threshold in enumerate([9.0, *doubts[::-1].tolist()]):
            asked.clear()
            answers = counting.answer(*parts(1), inputs, threshold)
            calls = [count_at_server] if count_at_server else []
            assert [len(rows) for rows in asked] == calls
            assert sum(asked, []) == np.flatnonzero(~answers.exited).tolist()
            exited = answers.exited[:, None]
            expected = np.where(exited, exit_logits[:count], logits[:count])
            np.testing.assert_allclose(answers.logits, expected, atol=1e-5)
    for count in (0, 8):
        with pytest.raises(ValueError, match=rf"{count} rows; allowed are 1\.\.7"):
            gate.answer(*parts(1), images(count), 0.5)


def test_the_server_is_asked_for_the_views_of_all():
    """Of 3 clients of cut 1: three messages, and the layer of the two that wait.

    Their exits need not run. What mixes 3 x 8 features into 8 takes two operations a
    weight.
    """
    dense = tiny_model((DenseLayer(8), DenseLayer(5)))
    federation, layers = tiny_federation({0: 1, 1: 1, 2: 1}, dense), layer_costs(dense)
    (group,) = federation.groups

    def costs(junction):
        one, *others = _sample_costs(federation, layers, group, "detached", junction)
        assert others == [one, one]
        return one

    alone, merged = costs(None), costs(mean_junction())
    assert alone.feature_bytes == 4 * 8
    assert alone.server_flops == layers[1].flops + layers[-1].flops
    more = 2 * layers[0].flops
    assert merged == alone._replace(
        feature_bytes=3 * 4 * 8, server_flops=alone.server_flops + more
    )
    features = jax.ShapeDtypeStruct((1, 8), jnp.float32)
    mixed = costs(concat_junction(3, features))
    assert mixed.server_flops == merged.server_flops + 2 * 3 * 8 * 8


def test_the_server_is_compiled_once_for_each_size():
    """A batch of 16 has eight sizes, whatever the batches and thresholds."""
    traced = {"exit": 0, "final": 0}

    def counted(name, stage):
        def apply(*args, **options):
            traced[name] += 1
            return stage.apply(*args, **options)

        return stage._replace(apply=apply)

    heads = tuple(counted("exit", head) for head in MODEL.exit_heads)
    model = MODEL._replace(
        exit_heads=heads, final_head=counted("final", MODEL.final_head)
    )
    gate = make_gate(*specs(2, model), batch_size=16)
    for count in (16, 5, 9):
        inputs = images(count)
        for threshold in gate.answer(*parts(2), inputs, 0.0).uncertainty.tolist():
            gate.answer(*parts(2), inputs, threshold)
    assert traced == {"exit": 1, "final": 8}
