"""The command ``hsee profile``: time this machine, and write it as a device."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from hsee_jax.cli.arguments import config_parser
from hsee_jax.cli.flags import Parser, config_from, count_of, use_cache
from hsee_jax.cli.terminal import show, show_log, text_table
from hsee_jax.core.errors import UserError
from hsee_jax.core.files import replace_file
from hsee_jax.federation.accumulation import check_micro_batches
from hsee_jax.parallel.processes import check_devices
from hsee_jax.runs.build import build_federation, build_model
from hsee_jax.runs.data import build_info
from hsee_jax.runs.folder import check_writable
from hsee_jax.systems.costs import LayerCost, layer_costs
from hsee_jax.systems.profile import Profile, profile
from hsee_jax.systems.workload import BACKWARD_FLOPS

_HEAD = """\
# Written by `hsee profile`. The table measured wins over the FLOP/s; remove it for
# another network, and the FLOP/s count. Not measured, so say it here: the link, and,
# for energy, busy_watts, sending_watts, receiving_watts and idle_watts.
"""


def profile_machine(words: Sequence[str]) -> None:
    """Time the network of a configuration, print the times and write a device."""
    given = vars(_parser(words).parse(words))
    out, repeats = given.get("out"), count_of(given, "repeats", 5)
    if out is None:
        raise UserError("out: missing; allowed is a new file such as me.toml")
    _check_new(out)
    name = given.get("name", "this-machine")
    if not name.strip() or not name.isprintable():
        raise UserError(f"name: {name!a} is not allowed; allowed is printable text")
    config = config_from(given)
    if config.clients.exits != "cut":
        raise UserError(
            f"exits: {config.clients.exits} is not allowed with hsee profile, which "
            "times each exit alone; allowed is cut"
        )
    batch_size = config.run.batch_size
    check_micro_batches(config.run.micro_batches, batch_size, "detached")
    use_cache(given)
    check_devices()
    show_log()
    info = build_info(config.data)
    federation = build_federation(config, info)
    costs = layer_costs(build_model(config, info, plain=True))
    times = profile(federation, batch_size, repeats=repeats)
    replace_file(out, _entry(name, times, costs))
    _print(times, out)


def _parser(words: Sequence[str]) -> Parser:
    parser = config_parser("profile", words)
    parser.add_argument("--out", type=Path, help="the file to write, such as me.toml")
    parser.add_argument("--name", help="name of the device (this-machine)")
    parser.add_argument(
        "--repeats", type=int, help="timed calls of each program; medians count (5)"
    )
    return parser


def _check_new(out: Path) -> None:
    if os.path.exists(out):
        raise UserError(f"out: {out} exists; allowed is a new file")
    if out.suffix != ".toml":
        raise UserError(f"out: {out} is not allowed; allowed is a name in .toml")
    if not os.path.isdir(out.parent):
        raise UserError(f"out: {out.parent} is not a folder; allowed is a folder")
    check_writable(out)


def _entry(name: str, times: Profile, costs: Sequence[LayerCost]) -> str:
    """Return a file of devices with this machine as its only entry."""
    measured = times.measured()
    flops = times.batch_size * sum(cost.flops for cost in costs)
    forward, backward = sum(measured.forward_s), sum(measured.backward_s)
    entry = {
        "name": name,
        "forward_flops_per_s": flops / forward,
        "backward_flops_per_s": BACKWARD_FLOPS * flops / max(backward, 1e-12),
        "memory_bytes": _memory_bytes(),
        "link": "ethernet",
        "source": f"hsee profile on {jax.devices()[0].device_kind}; whole steps "
        f"within {times.spread():.1%} of their median",
    }
    lines = [_HEAD, "[[devices]]", *_toml(entry), "", "[devices.measured]"]
    measured = replace(measured, flops=tuple(cost.flops for cost in costs))
    return "\n".join([*lines, *_toml(vars(measured)), ""])


def _toml(fields: Mapping[str, Any]) -> list[str]:
    """Return fields as lines of TOML, with values as JSON writes them."""
    as_text = partial(json.dumps, ensure_ascii=False)
    return [f"{name} = {as_text(value)}" for name, value in fields.items()]


def _memory_bytes() -> int:
    """Return the memory of the accelerator, or of the machine on a CPU."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    return limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _print(times: Profile, out: Path) -> None:
    measured = times.measured()
    rows = [
        (name, _ms(forward), _ms(backward), f"{both.spread:.1%}")
        for name, forward, backward, both in zip(
            times.parts,
            measured.forward_s,
            measured.backward_s,
            times.both,
            strict=True,
        )
    ]
    title = f"{out}: ms of a batch of {times.batch_size}"
    show(text_table(title, ("part", "forward", "backward", "range"), rows))
    steps = zip(times.client_step, times.server_step, strict=True)
    rows = [
        (
            str(cut),
            _ms(client.median),
            _ms(server.median),
            f"{max(client.spread, server.spread):.1%}",
        )
        for cut, (client, server) in enumerate(steps, start=1)
    ]
    show(text_table("ms of whole steps", ("cut", "client", "server", "range"), rows))


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3f}"
