"""The network of interactions, and the scores of them, against closed forms."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import write_run

import hsee_jax as hs
from hsee_jax import cli
from hsee_jax.cli.flags import config_from
from hsee_jax.core import UserError
from hsee_jax.federation.branch import (
    client_spec,
    forward,
    init_client,
    init_server,
    server_spec,
)
from hsee_jax.nn import interaction_effects, layer_inputs, select_interactions, sian
from hsee_jax.systems import layer_costs

CLASSES, COLUMNS, HIDDEN = 3, 5, 8
CHOSEN = ("0,1", "1,3", "4,1", "0,1,3")
MODEL = sian(
    num_classes=CLASSES,
    input_shape=(COLUMNS,),
    order=3,
    interactions=CHOSEN,
    hidden=HIDDEN,
)
SETS = [[(0,), (1,), (2,), (3,), (4,)], [(0, 1), (1, 3), (1, 4)], [(0, 1, 3)]]
OPTIMIZER = hs.optim.adamw()


@pytest.fixture(scope="module")
def network():
    """Weights of noise."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: hs.nn.init_network(MODEL, jax.random.key(0)))
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes
    )


@functools.partial(jax.jit, static_argnums=1)
def answers(network, cut, x):
    """What a client of some cut sends, its exit, and the server behind it."""
    mask = jnp.ones(len(x), bool)
    client, server = (
        init(network, cut, OPTIMIZER) for init in (init_client, init_server)
    )
    specs = client_spec(MODEL, cut, OPTIMIZER), server_spec(MODEL, cut, OPTIMIZER)
    features, exit_logits, _ = forward(specs[0], client, x, mask, train=False)
    logits = forward(specs[1], server, features, mask, train=False)[1]
    return features, exit_logits, logits


def rows(count=6, seed=1):
    return np.random.default_rng(seed).normal(size=(count, COLUMNS)).astype(np.float32)


def test_each_term_reads_its_own_columns(network):
    """A loop over sets and rows in NumPy gives exits and servers of all cuts."""
    x, total = rows(), np.zeros((6, CLASSES))
    found = [answers(network, cut, x) for cut in (1, 2, 3)]
    for k, sets in enumerate(SETS):
        params = jax.tree.map(np.float64, network.layers[k]["params"])
        last = params["sum"]["kernel"].reshape(len(sets), HIDDEN, CLASSES)
        for place, columns in enumerate(sets):
            y = x[:, columns]
            for name in ("dense1", "dense2"):
                own = {key: leaf[place] for key, leaf in params[name].items()}
                y = np.maximum(y @ own["kernel"] + own["bias"], 0)
            total += y @ last[place] / len(sets) ** 0.5
        linear = jax.tree.map(np.float64, network.exit_heads[k]["params"]["linear"])
        expected = total @ linear["kernel"] + linear["bias"]
        np.testing.assert_allclose(found[k][1], expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found[k][0][:, :CLASSES], total, rtol=1e-4)
    linear = jax.tree.map(np.float64, network.final_head["params"]["linear"])
    for _, _, logits in found:
        expected = total @ linear["kernel"] + linear["bias"]
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_only_columns_of_later_interactions_cross_the_link(network):
    """Behind order 1 those of any pair or triple; 2 is in none, 4 in no triple."""
    x = rows()
    sent = [answers(network, cut, x)[0][:, CLASSES:] for cut in (1, 2, 3)]
    np.testing.assert_array_equal(sent[0], x[:, [0, 1, 3, 4]])
    np.testing.assert_array_equal(sent[1], x[:, [0, 1, 3]])
    assert sent[2].shape == (6, 0)
    sizes = [shape.shape[-1] for shape in layer_inputs(MODEL)]
    assert sizes == [COLUMNS, CLASSES + 4, CLASSES + 3, CLASSES]


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_an_exit_joins_no_other_columns(network, cut):
    """The effect of a set is 0 unless a term of the client reads all of it."""
    own = [set(columns) for columns in itertools.chain(*SETS[:cut])]
    sets = [
        columns
        for size in (2, 3)
        for columns in itertools.combinations(range(COLUMNS), size)
    ]
    effects = interaction_effects(
        lambda x: answers(network, cut, x)[1], rows(), rows(seed=2), sets
    )
    for columns, effect in zip(sets, effects, strict=True):
        joined = any(set(columns) <= term for term in own)
        assert (np.abs(effect).max() > 1e-2) == joined, columns


def test_a_new_order_changes_nothing_at_first():
    """All terms begin at 0 and the heads at the identity; biases differ by column."""
    network = jax.jit(lambda: hs.nn.init_network(MODEL, jax.random.key(0)))()
    for cut in (1, 2, 3):
        features, logits, _ = answers(network, cut, rows())
        np.testing.assert_array_equal(features[:, :CLASSES], 0)
        np.testing.assert_array_equal(logits, 0)
    biases = network.layers[0]["params"]["dense1"]["bias"]
    assert np.unique(biases).size == COLUMNS * HIDDEN
    np.testing.assert_array_equal(
        network.final_head["params"]["linear"]["kernel"], np.eye(CLASSES)
    )


def test_costs_by_hand():
    weights = [
        len(sets) * (k * HIDDEN + HIDDEN + HIDDEN**2 + HIDDEN + HIDDEN * CLASSES)
        for k, sets in enumerate(SETS, start=1)
    ]
    costs = layer_costs(MODEL)
    assert [cost.parameters for cost in costs[:3]] == weights
    for k, (sets, cost) in enumerate(zip(SETS, costs, strict=False), start=1):
        products = 2 * len(sets) * HIDDEN * (k + HIDDEN + CLASSES)
        assert products <= cost.flops <= 2 * products


def test_without_interactions_there_are_all_sets():
    model = sian(num_classes=2, input_shape=(4,), order=3)
    shapes = jax.eval_shape(lambda: hs.nn.init_network(model, jax.random.key(0)))
    kernels = [layer["params"]["dense1"]["kernel"].shape for layer in shapes.layers]
    assert kernels == [(4, 1, 16), (6, 2, 16), (4, 3, 16)]
    assert model.layer_names == ("order1", "order2", "order3")
    assert len(sian(num_classes=2, input_shape=(4,)).stages) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 5}, "order: 5 is not allowed for a table of 4 columns"),
        (
            {"interactions": ("0,1,2",)},
            "order: 2 is not allowed with interactions of 3",
        ),
        ({"interactions": ("0,1",), "order": 3}, "order: 3 is not allowed with inter"),
        ({"interactions": ("0,1",), "order": 1}, "order: 1 is not allowed with inter"),
        ({"interactions": ("0,4",)}, r"interactions: 0,4 .* among 0\.\.3"),
        ({"interactions": ("1,1",)}, "interactions: 1,1 is not allowed"),
        pytest.param({"interactions": (f"1,{'9' * 5000}",)}, "among 0", id="long"),
        ({"interactions": ("1",)}, "interactions: 1 is not allowed"),
        ({"interactions": ("a,1",)}, "interactions: a,1 is not allowed"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        sian(num_classes=2, input_shape=(4,), **options)


def test_too_many_sets_and_other_shapes_are_refused():
    with pytest.raises(UserError, match="order: 3 of 100 columns gives 166,750 inter"):
        sian(num_classes=2, input_shape=(100,), order=3)
    with pytest.raises(UserError, match=r"it takes tables \[F\]; allowed are .*conv1d"):
        sian(num_classes=2, input_shape=(16, 3))


def test_the_effect_of_a_product():
    """The example of the paper: x1 x2 + x3, from 0 to 1."""

    def f(x):
        return x[:, 0] * x[:, 1] + x[:, 2]

    effects = interaction_effects(f, np.ones((1, 3)), np.zeros(3), [(0, 1), (0, 2)])
    np.testing.assert_array_equal(effects[:, 0, 0], [1, 0])


def test_effects_are_coefficients_of_a_polynomial():
    """From 0 to 1, those of the products of the columns, whatever the order."""
    sets = [s for size in range(5) for s in itertools.combinations(range(4), size)]
    weights = np.random.default_rng(0).normal(size=(len(sets), 2))

    def f(x):
        return sum(
            x[:, s].prod(axis=1)[:, None] * w
            for s, w in zip(sets, weights, strict=True)
        )

    effects = interaction_effects(f, np.ones((3, 4)), np.zeros(4), sets)
    expected = np.broadcast_to(weights[:, None], effects.shape)
    np.testing.assert_allclose(effects, expected, atol=1e-12)


CUBE = np.array(list(itertools.product((-1, 1), repeat=4)))
PAIRS_OF_ROWS = [np.array(part) for part in zip(*itertools.product(CUBE, CUBE))]  # noqa: B905


def polynomial(x):
    return 2 * x[:, 0] * x[:, 1] + 3 * x[:, 2] + x[:, 0] * x[:, 1] * x[:, 3]


def test_scores_are_shares_of_the_variance():
    """With all pairs of signs for rows, exactly: 4 + 1 of the 14 are due to 0 and 1."""
    assert polynomial(CUBE).var() == 14
    found = select_interactions(polynomial, *PAIRS_OF_ROWS, max_order=4, count=3)
    assert found == (
        ((0, 1), 5.0),
        ((0, 3), 1.0),
        ((1, 3), 1.0),
        ((0, 1, 3), 1.0),
    )
    assert found[3].text == "0,1,3"
    every = select_interactions(polynomial, *PAIRS_OF_ROWS, count=6)
    assert [one.score for one in every] == [5, 1, 1, 0, 0, 0]


def test_a_triple_needs_all_of_its_pairs():
    found = select_interactions(polynomial, *PAIRS_OF_ROWS, max_order=3, count=2)
    assert [one.columns for one in found] == [(0, 1), (0, 3)]


@pytest.mark.parametrize("options", [{"max_order": 1}, {"count": 0}])
def test_options_of_the_selection(options):
    (name,) = options
    with pytest.raises(UserError, match=f"{name}: . is not allowed"):
        select_interactions(polynomial, *PAIRS_OF_ROWS, **options)


def table(count, seed):
    """A class that depends on a product of two columns, and on a third one."""
    x = np.random.default_rng(seed).normal(size=(count, COLUMNS))
    return x.astype(np.float32), (2 * x[:, 0] * x[:, 3] + x[:, 1] > 0).astype(int)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("table")
    hs.data.write_npz(place, (*table(2000, 0), *table(500, 1)))
    return place


def test_the_command_and_its_file(folder, tmp_path, capsys):
    """On weights of noise: what it prints and writes, and who reads it."""
    words = {"dataset": "npz", "data_dir": str(folder), "network": "mlp"}
    config = hs.override(hs.preset("demo"), **words, depth=2, hidden=4, cuts=("1",))
    out = tmp_path / "run"
    write_run(out, config)
    flags = "--count 2 --max-order 3 --max-samples 60 --client 1"
    assert cli.main(["interactions", str(out), *flags.split()]) == 0
    path = out / "interactions" / "interactions.json"
    found = json.loads(path.read_text())
    printed = capsys.readouterr().out
    assert str(path) in printed and path.with_suffix(".png").stat().st_size > 5000
    texts = [",".join(map(str, one["columns"])) for one in found["chosen"]]
    assert len(texts) == 2 and all(text in printed for text in texts)
    assert (found["client"], found["samples"]) == (1, 60)
    assert cli.main(["interactions", str(out), "--json"]) == 0
    every = json.loads(capsys.readouterr().out)
    assert every == json.loads(path.read_text())
    assert (every["client"], every["samples"], len(every["chosen"])) == (0, 300, 10)
    given = {"interactions_file": path, "network": "sian"}
    pairs = [",".join(map(str, pair)) for pair in itertools.combinations(range(5), 2)]
    assert sorted(config_from(given).model.interactions) == pairs


def test_only_the_samples_of_the_run_are_read(folder, tmp_path, capsys):
    """Those with labels; and none where they lie on devices."""
    words = {"dataset": "npz", "data_dir": str(folder), "network": "mlp"}
    config = hs.override(hs.preset("demo"), **words, depth=2, hidden=4, cuts=("1",))
    out = tmp_path / "run"
    config = hs.override(config, labelled_share=0.1)
    write_run(out, config)
    shares = [share._asdict() for share in hs.build(config).manifest]
    (out / "partition.json").write_text(json.dumps(shares))
    assert hs.inference.find_interactions(out).samples == 30
    assert hs.inference.find_interactions(out, data_dir=folder).samples == 30
    own = [share | {"indices": []} for share in shares]  # on the devices
    (out / "partition.json").write_text(json.dumps(own))
    assert cli.main(["interactions", str(out)]) == 2
    assert "have samples of their own" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        ("{", "cannot be read: JSONDecodeError"),
        ('{"chosen": [{"columns": ["a"]}]}', "cannot be read: ValueError"),
        ("[]", "cannot be read: TypeError"),
        ('{"chosen": []}', "holds no interaction"),
    ],
)
def test_a_bad_file_of_interactions(content, message, tmp_path, capsys):
    path = tmp_path / "file.json"
    if content is not None:
        path.write_text(content)
    words = ["info", "--network", "sian", "--interactions-file", str(path)]
    assert cli.main(words) == 2
    assert f"interactions_file: {path} {message}" in capsys.readouterr().err
    both = [*words, "--interactions", "0,1"]
    assert cli.main(both) == 2
    assert "not allowed together with interactions" in capsys.readouterr().err


def test_images_have_no_interactions(tmp_path, capsys):
    config = hs.override(
        hs.preset("demo"), network="mlp", depth=2, hidden=4, cuts=("1",)
    )
    write_run(tmp_path, config)
    assert cli.main(["interactions", str(tmp_path)]) == 2
    assert "has samples of [28, 28, 1]; allowed are rows" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("lenient")
def test_orders_1_and_2_train_together(folder, tmp_path, capsys):
    """A perceptron shows the pair; the clients with it answer better than without."""
    common = f"--dataset npz --data-dir {folder} --optimizer adamw --learning-rate 0.01"
    reference = "--network mlp --depth 2 --hidden 32 --strategy centralized "
    reference += "--num-clients 1 --cuts 1 --rounds 20 --batch-size 64"
    first, out = tmp_path / "mlp", tmp_path / "sian"
    words = f"train {common} {reference} --out {first}"
    assert cli.main(words.split()) == 0
    assert cli.main(["interactions", str(first), "--count", "2"]) == 0
    path = first / "interactions" / "interactions.json"
    found = json.loads(path.read_text())["chosen"]
    assert found[0]["columns"] == [0, 3]
    assert found[0]["score"] > 2 * found[1]["score"]
    words = f"train {common} --network sian --interactions-file {path} --num-clients 4 "
    words += "--cuts 1 2 --rounds 20 --batch-size 32 --validation-share 0.1 "
    assert cli.main([*words.split(), "--out", str(out)]) == 0
    scores = json.loads((out / "summary.json").read_text())["clients"]
    exits = {cut: [] for cut in (1, 2)}
    for one in scores:
        exits[one["cut"]].append(one["exit_accuracy"])
    means = {cut: np.mean(found) for cut, found in exits.items()}
    with capsys.disabled():
        print(
            f"\nexits {means}, server {np.mean([s['server_accuracy'] for s in scores])}"
        )
    assert means[2] > means[1] + 0.1 > 0.6
    assert min(one["server_accuracy"] for one in scores) > 0.8
    assert hs.restore(out).config.model.interactions[0] == "0,3"
    assert cli.main(["gate", str(out), "--target-offload", "0.5"]) == 0
    assert cli.main(["export", str(out), "--client", "1"]) == 0
    assert cli.main(["refit", str(out)]) == 0
    assert cli.main(["interactions", str(out), "--client", "0"]) == 0
    again = json.loads((out / "interactions" / "interactions.json").read_text())
    assert again["chosen"][0]["columns"] == [0, 3]
    assert again["chosen"][2]["score"] < 1e-6 * again["chosen"][0]["score"]
