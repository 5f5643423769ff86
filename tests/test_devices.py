"""Files of devices, and the numbers that devices give to a round."""

import functools
import math
import time
import tomllib
from collections import Counter
from importlib import resources
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny_federation, tiny_model

from hsee_jax.algorithms import averaging, fedavg, sequential
from hsee_jax.algorithms.epsl import shared_rows_of
from hsee_jax.algorithms.rows import forward_rows, rows_of
from hsee_jax.core import Batch, UserError
from hsee_jax.core.rows import read_table
from hsee_jax.federation import Client, branch_step, group_clients
from hsee_jax.federation.branch import init_client
from hsee_jax.nn.model import init_network
from hsee_jax.optim import OPTIMIZERS
from hsee_jax.systems import (
    Device,
    LayerCost,
    Schedule,
    Work,
    catalogue,
    client_memory,
    cut_seconds,
    find_device,
    joules,
    layer_costs,
    make_device,
    optimizer_slots,
    read_devices,
    round_time,
    server_memory,
    traffic_by_cut,
    workload,
)
from hsee_jax.systems.costs import part_cost
from hsee_jax.systems.traffic import Bytes, Traffic

THREE_LINES = """
devices = [
  {device = "raspberry-pi-4", count = 40},
  {device = "jetson-nano", count = 10, name = "camera"},
  {device = "phone-a18-pro", link = "lte", count = 50},
]
"""
OWN = 'name = "mine", forward_flops_per_s = 1e9, up_bytes_per_s = 1e6'
# Two layers, two exits and the final head.
COSTS = tuple(
    LayerCost(name, parameters, flops, output)
    for name, parameters, flops, output in [
        ("a", 10, 100, 40),
        ("b", 20, 200, 20),
        ("exit after a", 1, 3, 8),
        ("exit after b", 2, 6, 8),
        ("final head", 4, 12, 8),
    ]
)


def write(folder, text, name="fleet.toml"):
    path = folder / name
    path.write_text(text)
    return path


def test_a_fleet_is_three_lines(tmp_path):
    fleet = read_devices(write(tmp_path, THREE_LINES))
    names = [device.name for device in fleet.clients]
    assert names == ["raspberry-pi-4"] * 40 + ["camera"] * 10 + ["phone-a18-pro"] * 50
    phone = fleet.clients[-1]
    assert (phone.up_bytes_per_s, phone.down_bytes_per_s) == (6e6 / 8, 13e6 / 8)
    assert fleet.clients[0] == find_device("raspberry-pi-4")
    assert fleet.server == find_device("gpu-server")


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_csv_says_the_same(tmp_path, mark):
    rows = [
        "device,link,count,name",
        "raspberry-pi-4,,40,",
        "",
        "jetson-nano,,10,camera",
        "phone-a18-pro, lte,50",
    ]
    text = "\ufeff" + "\n".join(rows).replace(",", mark)
    path = write(tmp_path, text, "fleet.csv")
    expected = read_devices(write(tmp_path, THREE_LINES))
    assert read_devices(path) == expected


def test_a_quoted_cell_of_csv_may_have_several_lines(tmp_path):
    """As spreadsheets write them; and no other character ends a row."""
    text = 'device,source,count\njetson-nano,"bench\u2028of\r\nJuly",2\nesp32,\x0c,1\n'
    path = tmp_path / "fleet.csv"
    path.write_bytes(text.encode())
    cells = {"device": "jetson-nano", "source": "bench\u2028of\nJuly", "count": "2"}
    assert read_table(path, ("device",), "devices")[0] == (3, cells)
    board = read_devices(path).clients[2]
    assert board.name == "esp32"


def test_own_numbers_win_over_link_and_catalogue(tmp_path):
    entry = (
        'device = "esp32", link = "lora-sf7", down_bytes_per_s = 7, memory_bytes = 1e6'
    )
    server = 'server = {name = "rack", forward_flops_per_s = 1e12}'
    text = f"devices = [{{{entry}}}, {{{OWN}}}]\n{server}"
    fleet = read_devices(write(tmp_path, text))
    board, mine = fleet.clients
    assert (board.up_bytes_per_s, board.down_bytes_per_s) == (683.6, 7)
    assert (board.memory_bytes, board.busy_watts) == (1e6, 0.224)
    assert (mine.backward_flops_per_s, mine.down_bytes_per_s) == (1e9, 1e6)
    assert mine.memory_bytes == math.inf and math.isnan(mine.busy_watts)
    assert (fleet.server.name, fleet.server.backward_flops_per_s) == ("rack", 1e12)


def test_spread_is_lognormal_around_the_entry(tmp_path):
    entry = f"{OWN}, count = 4000, compute_spread = 0.5, link_spread = 0.2"
    path = write(tmp_path, f"devices = [{{{entry}}}]")
    clients = read_devices(path, seed=1).clients
    for name, middle, spread in (
        ("forward_flops_per_s", 1e9, 0.5),
        ("up_bytes_per_s", 1e6, 0.2),
    ):
        logs = np.log([getattr(device, name) for device in clients])
        assert np.mean(logs) == pytest.approx(np.log(middle), abs=0.03)
        assert np.std(logs) == pytest.approx(spread, rel=0.05)
    slow = clients[0].forward_flops_per_s / clients[0].backward_flops_per_s
    assert slow == pytest.approx(1)
    assert read_devices(path, seed=1).clients == clients
    assert read_devices(path, seed=2).clients != clients
    later = write(tmp_path, f"devices = [{{{OWN}}}, {{{entry}}}]", "later.toml")
    assert read_devices(later, seed=1).clients[1:4000] == clients[1:]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "has no entry; allowed is 1 or more"),
        ("devices = 3", "devices: not a list of tables"),
        ("client = []", "table: client is unknown.*allowed are devices, server"),
        ("devices = [", "cannot be read: .*allowed is TOML or CSV"),
        ("devices = " + "9" * 5000, "cannot be read: .*allowed is TOML or CSV"),
        ("devices = " + "[" * 100_000, "cannot be read: .*allowed is TOML or CSV"),
        (f"devices = [{{{OWN}}}, {{}}]", "entry 2: name: missing"),
        ('devices = [{name = "a"}]', "entry 1: forward_flops_per_s: missing"),
        (
            'devices = [{device = "raspbery-pi-4"}]',
            "device: raspbery-pi-4 is unknown .did you mean raspberry-pi-4.*allowed",
        ),
        (
            'devices = [{device = "esp32", link = "5g"}]',
            "link: 5g is unknown.*allowed are ethernet, wifi, lte",
        ),
        (
            'devices = [{device = "esp32", memory = 3}]',
            "field: memory is unknown .did you mean memory_bytes.*allowed",
        ),
        (f"devices = [{{{OWN}, count = 0}}]", "count: 0 is not allowed; allowed is 1"),
        (
            f"devices = [{{{OWN}, idle_watts = -1}}]",
            "idle_watts: -1.0 is not allowed; allowed is 0 or more",
        ),
        (
            f'devices = [{{{OWN}, memory_bytes = "4 GB"}}]',
            'memory_bytes: "4 GB" is not allowed; allowed is a float',
        ),
        (
            f"devices = [{{{OWN}, memory_bytes = nan}}]",
            "memory_bytes: nan is not allowed; allowed is more than 0",
        ),
        (
            f"devices = [{{{OWN}}}]\nserver = {{count = 2}}",
            "server: count: not allowed; there is one server",
        ),
        (
            f"devices = [{{{OWN}, measured = {{batch_size = 0}}}}]",
            "measured.batch_size: 0 is not allowed; allowed is 1 or more",
        ),
        (
            f"devices = [{{{OWN}, measured = {{batch_size = 1, parts = ['a']}}}}]",
            r"measured.forward_s: \[\] is not allowed; allowed is a list of 1 numbers",
        ),
    ],
)
def test_errors_name_file_entry_field_and_value(tmp_path, text, error):
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=error) as caught:
        read_devices(path)
    line = str(caught.value)
    assert line.startswith(f"devices: {path}") and "\n" not in line


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("device,number\nesp32,3", "column: number is unknown"),
        ("device,link,link\nesp32,wifi,lte", "column: link is not allowed twice"),
        ("device,link_spread\nesp32,1000", "line 2: link_spread: 1000.0 is not allow"),
        ("device,count\nesp32,many", "line 2: count: .*many.* allowed is an int"),
        ("device\nesp32,3", "line 2: 2 values for 1 columns"),
        ("device\nesp33", "line 2: device: esp33 is unknown"),
    ],
)
def test_errors_in_csv_name_the_line(tmp_path, text, error):
    with pytest.raises(UserError, match=error):
        read_devices(write(tmp_path, text, "fleet.csv"))
    with pytest.raises(UserError, match="missing.csv cannot be read: No such file"):
        read_devices(tmp_path / "missing.csv")


def test_the_catalogue_gives_sources_and_sane_numbers():
    file = resources.files("hsee_jax.systems") / "devices.toml"
    content = tomllib.loads(file.read_text())
    for kind in ("links", "devices"):
        assert all(entry["source"] for entry in content[kind].values())
    boards = catalogue()
    assert list(boards) == list(content["devices"])
    for name, device in boards.items():
        assert device.name == name and math.isfinite(device.memory_bytes)
        assert 0 < device.idle_watts < device.busy_watts
        assert device.forward_flops_per_s > 0 < device.up_bytes_per_s
    # HPL and its watts, from the source; training reaches 1.3 of 11.9 GFLOP/s.
    for name, flops, watts in (
        ("raspberry-pi-4", 11.889e9, 7.2),
        ("raspberry-pi-cm4", 11.433e9, 5.2),
        ("raspberry-pi-5", 35.169e9, 12.7),
        ("arduino-uno-q", 9.60e9, 3.5),
        ("radxa-q6a", 48.408e9, 10.1),
        ("orange-pi-5", 53.333e9, 11.5),
        ("intel-n100", 37.224e9, 16.0),
        ("phone-a18-pro", 57.012e9, 10.6),
    ):
        speed = boards[name].forward_flops_per_s
        assert speed == pytest.approx(flops * 1.3 / 11.9, rel=0.01)
        assert boards[name].busy_watts == watts
    assert boards["esp32"].sending_watts == pytest.approx(3.3 * 0.18)
    assert boards["esp32"].up_bytes_per_s == pytest.approx(5660 / 0.0032, rel=1e-3)
    assert find_device("esp32", "lora-sf7").up_bytes_per_s == pytest.approx(
        5469 / 8, 1e-3
    )


MEASURED = {
    "batch_size": 10,
    "parts": [cost.name for cost in COSTS],
    "forward_s": [1.0, 2.0, 0.1, 0.2, 0.4],
    "backward_s": [3.0, 4.0, 0.1, 0.2, 0.6],
}


def test_seconds_of_a_cut_from_flops_and_from_measurements():
    device = Device("d", 1e3, 2e3, 1.0, 1.0)
    seconds = cut_seconds(COSTS, device, 10)
    np.testing.assert_allclose(seconds.client_forward, [1.03, 3.06])
    np.testing.assert_allclose(seconds.client_backward, [1.03, 3.06])  # 2 x, at 2 x
    np.testing.assert_allclose(seconds.server_forward, [2.12, 0.12])

    own = {"name": "m", "up_bytes_per_s": 1.0}
    device = make_device(own | {"measured": MEASURED})
    seconds = cut_seconds(COSTS, device, 5)
    np.testing.assert_allclose(seconds.client_forward, [0.55, 1.6])
    np.testing.assert_allclose(seconds.client_backward, [1.55, 3.6])
    np.testing.assert_allclose(seconds.server_forward, [1.2, 0.2])
    np.testing.assert_allclose(seconds.server_backward, [2.3, 0.3])
    at_end = cut_seconds(COSTS, device, 5, exit_at_end=True)
    np.testing.assert_allclose(at_end.client_forward, [0.5, 1.5])
    np.testing.assert_allclose(at_end.server_forward, [1.3, 0.3])

    steps = {"client_step_s": [2.1, 20.8], "server_step_s": [7.0, 2.0]}
    device = make_device(own | {"measured": MEASURED | steps})
    whole = cut_seconds(COSTS, device, 5)
    np.testing.assert_allclose(whole.client_forward, [0.55 / 2, 3.2])
    np.testing.assert_allclose(whole.server_forward + whole.server_backward, [3.5, 1])
    at_end = cut_seconds(COSTS, device, 5, exit_at_end=True)
    np.testing.assert_allclose(at_end.client_forward, [0.5 / 2, 3.0])
    with pytest.raises(UserError, match="m was measured with the parts a, b, exit"):
        cut_seconds((COSTS[0]._replace(name="z"), *COSTS[1:]), device, 5)


def test_a_workload_is_costs_over_devices():
    """By hand: a batch of 10 samples, 100 bytes up and 60 down a sample at cut 1."""
    federation = tiny_federation({0: 1})
    costs = layer_costs(federation.model)
    traffic = traffic_by_cut(federation, sequential, (1, 3))
    assert {cut: t.sample.up_bytes for cut, t in traffic.items()} == {1: 404, 3: 36}
    slow, fast = (
        Device("s", 1e6, 1e6, 1e3, 1e4, 0.5),
        Device("f", 1e8, 2e8, 1e6, 1e6),
    )
    server = Device("server", 1e9, 1e9, 1.0, 1.0)
    cuts, given = (1, 3), {"batch_size": 10, "steps": (4, 2)}
    work = workload(costs, traffic, cuts, (slow, fast), server, **given)
    flops = [cost.flops for cost in costs]
    client = [flops[0] + flops[3], sum(flops[:3]) + flops[5]]
    behind = [sum(flops[1:3]) + flops[6], flops[6]]
    np.testing.assert_allclose(work.forward_s, np.divide(client, [1e5, 1e7]))
    np.testing.assert_allclose(work.backward_s, np.divide(client, [5e4, 1e7]))
    np.testing.assert_allclose(work.server_s, 3 * np.divide(behind, 1e8))
    np.testing.assert_allclose(work.up_s, [0.5 + 4.04, 360 / 1e6])
    assert work.down_s.tolist() == [0, 0] == work.weights_up_s.tolist()
    assert work.up_bytes.tolist() == [4040, 360]
    assert work.steps.tolist() == [4, 2]

    whole = traffic_by_cut(federation, fedavg, (3,))
    given = {"batch_size": 10, "steps": 2, "boundary": "none"}
    work = workload(costs, whole, (3,), (slow,), server, **given)
    np.testing.assert_allclose(work.forward_s, (client[1] + behind[1]) / 1e5)
    assert (work.server_s[0], work.up_s[0]) == (0, 0)
    size = whole[3].weights
    assert work.weights_up_s[0] == pytest.approx(0.5 + size / 1e3)
    assert work.weights_down_s[0] == pytest.approx(0.5 + size / 1e4)


def test_flops_are_counted_on_the_cpu_whatever_device_is_the_default(
    monkeypatch, uncounted
):
    """A library of a GPU computes convolutions that XLA then does not count."""
    count, used = jax.stages.Compiled.cost_analysis, set()

    def counting(compiled):
        used.update(compiled.runtime_executable().local_devices())
        return count(compiled)

    monkeypatch.setattr(jax.stages.Compiled, "cost_analysis", counting)
    model = tiny_model(input_shape=(28, 28, 1))
    with jax.default_device(jax.devices()[3]):
        costs = layer_costs(model)
    assert used == {jax.local_devices(backend="cpu")[0]}
    assert all(cost.flops > 0 for cost in costs)
    part_cost.cache_clear()
    for analysis in (None, {"flops": -1.0}):
        monkeypatch.setattr(
            jax.stages.Compiled, "cost_analysis", lambda _, found=analysis: found
        )
        with pytest.raises(RuntimeError, match="XLA counts no FLOPs"):
            layer_costs(model)


def test_flops_without_a_cpu_are_refused(monkeypatch, uncounted):
    def nowhere(backend=None):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", nowhere)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(UserError, match=r"^JAX_PLATFORMS: cuda .* is cuda,cpu$"):
        layer_costs(tiny_model(input_shape=(28, 28, 1)))


def test_a_shared_gradient_saves_the_server_and_not_the_link():
    """Of 10 rows 5 are shared: by 2 clients in layers 2 and 3, by all in the head."""
    federation = tiny_federation({0: 1})
    costs = layer_costs(federation.model)
    joint = functools.partial(sequential, boundary="joint", turn="together")
    traffic = traffic_by_cut(federation, joint, (1, 3))
    devices, server = [Device("d", 1e6, 1e6, 1e3, 1e4)] * 3, find_device("gpu-server")
    given = {"batch_size": 10, "steps": 1, "boundary": "joint"}
    plain, shared = (
        workload(costs, traffic, (1, 1, 3), devices, server, **given, gradient_share=g)
        for g in (0.0, 0.45)
    )
    saved = plain.server_s - shared.server_s
    layers, head = (
        2 * 10 * sum(cost.flops for cost in some) / server.backward_flops_per_s
        for some in (costs[1:3], costs[-1:])
    )
    of_each = [layers / 4 + head / 3, layers / 4 + head / 3, head / 3]
    np.testing.assert_allclose(saved, of_each, rtol=1e-9)
    assert shared.down_s.tolist() == plain.down_s.tolist()
    assert (shared.down_bytes / plain.down_bytes).tolist() == [0.75, 0.75, 1.0]


@pytest.mark.parametrize("cuts", [(1, 1, 3), (1, 2, 2, 3), (2, 2)])
def test_shared_gradients_take_the_server_as_long_as_rows_pass_its_layers(cuts):
    """Against the server's own pass over clients that join, of four layers."""
    passed, first = [], min(cuts)

    def note(variables, inputs, mask, *, train):
        passed.append(len(inputs))
        return inputs, {}

    shared_rows = shared_rows_of(0.3, 8)
    joining = {
        cut - first: rows_of(jnp.ones((n, 8, 2)), jnp.ones((n, 8), bool), shared_rows)
        for cut, n in Counter(cuts).items()
    }
    parts = [SimpleNamespace(apply=note, params={}, batch_stats={})] * (5 - first)
    forward_rows(SimpleNamespace(stages=parts[1:], head=parts[0]), parts, joining)

    costs = [LayerCost(str(part), 0, 1, 4) for part in range(9)]
    server = Device("s", math.inf, 2.0, 1.0, 1.0)  # a second backward for each row
    work = workload(
        costs,
        {cut: Traffic(cut, Bytes(4, 4), 0) for cut in cuts},
        cuts,
        [Device("d", 1.0, 1.0, 1.0, 1.0)] * len(cuts),
        server,
        batch_size=8,
        steps=1,
        boundary="joint",
        gradient_share=0.3,
    )
    assert work.server_s.sum() == pytest.approx(sum(passed))


def test_traffic_by_cut_is_that_of_a_mixed_federation():
    def everything(federation):
        return averaging(federation, average="all_holders")

    from test_traffic import traffic_with

    federation = tiny_federation({0: 1, 1: 2, 2: 3})
    mixed = traffic_with(federation, everything(federation))
    assert tuple(traffic_by_cut(federation, everything, (1, 2, 3)).values()) == mixed


def test_energy_is_watts_times_seconds():
    """Two seconds of computing, one of sending beside it, three of waiting."""
    watts = {"busy_watts": 5, "sending_watts": 3, "receiving_watts": 2, "idle_watts": 1}
    device = Device("d", 1, 1, 1, 1, **watts)
    unknown = Device("u", 1, 1, 1, 1)
    work = Work(2, [0.5, 0.5], 0.5, up_s=0.25, server_s=2.0)
    time = round_time(work, Schedule(shared=True))
    assert time.seconds == pytest.approx(8.75)
    assert time.idle_s[0] == pytest.approx(8.75 - 2)
    expected = 8.75 * 1 + 2 * (5 - 1) + 0.5 * (3 - 1)
    found = joules(time, (device, unknown))
    assert found[0] == pytest.approx(expected) and math.isnan(found[1])

    alone = Work(1, 1.0, 1.0, up_s=1.0, server_s=4.0, down_s=2.0)
    time = round_time(alone, Schedule(shared=True, boundary="joint"))
    assert joules(time, (device,))[0] == 5 * 2 + 3 * 1 + 2 * 2 + 1 * 4


def test_memory_by_the_formula():
    """4 B x parameters x (weight, gradient, slots) + batch x activations.

    A part without a count of what it keeps keeps its output.
    """
    given = {"batch_size": 10, "slots": 1}
    assert client_memory(COSTS, **given).tolist() == [
        12 * 11 + 10 * 48,
        12 * 32 + 10 * 68,
    ]
    none = client_memory(COSTS, **given, boundary="none")
    assert none.tolist() == [12 * 35 + 10 * 76, 12 * 36 + 10 * 76]
    server = {1: (12 * 24, 10 * 28), 2: (12 * 4, 10 * 8)}
    kept = (COSTS[0]._replace(kept_bytes=100), *COSTS[1:])
    assert client_memory(kept, **given)[0] == 12 * 11 + 10 * 108
    shared = server_memory(COSTS, (2, 1, 1), **given, shared=True, workers=3)
    assert shared == sum(server[1])
    given_all = given | {"shared": True, "together": True}
    one = server_memory(COSTS, (2, 1, 1), **given_all)
    assert one == server[1][0] + 2 * server[1][1] + server[2][1]
    replicas = server_memory(COSTS, (2, 1, 1), **given, shared=False, workers=2)
    assert replicas == 2 * server[1][0] + server[2][0] + 2 * server[1][1]


def test_memory_is_enough_for_the_compiled_step():
    """What XLA allocates for the step of a client, and not much more."""
    cut = 3
    model = tiny_model(input_shape=(28, 28, 1))
    federation = tiny_federation({0: cut}, model)
    spec = federation.specs(0)[0]

    def init(key):
        return init_client(init_network(model, key), cut, federation.optimizer)

    def step(client, images, labels, mask):
        batch = Batch(images, labels, mask)
        return branch_step(spec, client, batch, jnp.float32(0.1))

    data = (((28, 28, 1), jnp.float32), ((), jnp.int32), ((), jnp.bool_))
    shapes = [jax.ShapeDtypeStruct((64, *shape), dtype) for shape, dtype in data]
    client = jax.eval_shape(init, jax.random.key(0))
    compiled = jax.jit(step).lower(client, *shapes).compile().memory_analysis()
    real = compiled.temp_size_in_bytes + compiled.argument_size_in_bytes
    costs = layer_costs(model)
    found = client_memory(costs, batch_size=64, slots=1)[cut - 1]
    assert real <= found <= 4 * real


def test_slots_of_optimizers():
    assert optimizer_slots(OPTIMIZERS.make("sgd")) == 1
    assert optimizer_slots(OPTIMIZERS.make("adamw")) == 2
    assert optimizer_slots(optax.sgd(1.0)) == 0


def test_a_federation_is_timed_within_a_second():
    """1,000 unlike devices, 20 steps, at cuts 1 to 3."""
    federation = tiny_federation({0: 1})._replace(groups=group_clients([Client(0, 1)]))
    costs = layer_costs(federation.model)
    traffic = traffic_by_cut(federation, sequential, (1, 2, 3))
    rng = np.random.default_rng(0)
    devices = [Device("d", *rng.uniform(1e6, 1e9, 4)) for _ in range(1000)]
    cuts = rng.integers(1, 4, 1000).tolist()
    server = find_device("gpu-server")
    work = workload(costs, traffic, cuts, devices, server, batch_size=8, steps=20)
    begin = time.process_time()
    found = round_time(work, Schedule(shared=True))
    assert time.process_time() - begin < 1
    assert found.seconds > 0 and len(found.binds) == 1000
