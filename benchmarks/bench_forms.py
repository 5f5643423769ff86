"""Time whole rounds by the form of the stacked convolutions, against plain networks.

Shows: images trained a second for each form of `hsee_jax.nn.convolution` when clients
are stacked (`--client-axis vmap`), for clients one after another in the same program
(`map`), for a loop over the clients, and for one ResNet-18 trained on as many images by
`branch_step` in one program. The cost of a form is its time for an image relative to
that plain network: 1 means that many clients cost no more than one network on all of
their images. `auto` rests on this table. On an accelerator there are two sizes: width
64 in bfloat16, and a thin network with small batches. Without --forms a GPU leaves out
the forms that can abort XLA's compiler there.
Cost: about 5 minutes a size on a GPU; a small size on a CPU takes 10.
Command: python benchmarks/bench_forms.py [--forms unrolled grouped ...]
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import bench
import jax
import numpy as np
from federations import STRATEGIES, Runner, federation, plain_branch, plain_program

from hsee_jax.nn.convolution_choice import FORMS

PLACE = ("strategy", "client axis", "form")
COLUMNS = (
    "width",
    "batch_size",
    *PLACE,
    "images/s",
    "range",
    "cost in plain networks",
)


class Size(NamedTuple):
    """The size of a federation to time."""

    width: int
    batch_size: int
    clients: int
    steps: int  # in a round
    dtype: str

    @property
    def images(self) -> int:
        """Return the number of images in a round."""
        return self.clients * self.batch_size * self.steps


ACCELERATOR = (Size(64, 128, 12, 4, "bfloat16"), Size(16, 32, 12, 8, "float32"))
CPU = (Size(8, 8, 6, 2, "float32"),)
QUICK = (Size(2, 4, 3, 1, "float32"),)


def plain_network(size: Size) -> Callable[[], Any]:
    """Return a call that trains one network on a round's images, batch by batch."""
    experiment = federation(
        clients=1,
        batch_size=size.batch_size,
        steps=size.clients * size.steps,
        width=size.width,
        dtype=size.dtype,
        conv="grouped",
        client_axis="vmap",
    )
    model, optimizer = experiment.federation.model, experiment.federation.optimizer
    run = plain_program(model, optimizer, "cifar10")
    rows = np.arange(size.images, dtype=np.int32).reshape(-1, size.batch_size)

    init = jax.jit(partial(plain_branch, model, optimizer))
    state = [init(jax.random.key(0))]

    def call() -> None:
        state[0] = jax.block_until_ready(run(state[0], experiment.train, rows))

    return call


def rounds(size: Size, strategy: str, axis: str, form: str) -> Runner:
    """Return a call that trains a round of clients with the cuts 3, 5 and 7."""
    return Runner(
        federation(
            clients=size.clients,
            batch_size=size.batch_size,
            steps=size.steps,
            width=size.width,
            strategy=strategy,
            dtype=size.dtype,
            conv=form,
            client_axis=axis,
        )
    )


def measure(size: Size, forms: Sequence[str], *, repeats: int) -> list[bench.Row]:
    """Time the plain network and all forms in turns."""
    plain = ("plain", "", "grouped")
    places = [(s, "vmap", form) for s in STRATEGIES for form in forms]
    places += [(s, "map", "grouped") for s in STRATEGIES]
    places.append(("averaging", "loop", "grouped"))
    calls: dict[str, Callable[[], Any]] = {" ".join(plain): plain_network(size)}
    calls |= {" ".join(place): rounds(size, *place) for place in places}
    times = bench.time_in_turns(calls, repeats=repeats)
    rows = []
    for place in (plain, *places):
        time = times[" ".join(place)]
        rows.append(
            {
                **dict(zip(PLACE, place, strict=True)),
                **size._asdict(),
                "images/s": size.images / time.median,
                "range": f"{size.images / time.high:.3g}-{size.images / time.low:.3g}",
                "cost in plain networks": time.median / times[" ".join(plain)].median,
            }
        )
    return rows


def main() -> None:
    """Print the table, and write its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny, for tests")
    parser.add_argument("--forms", nargs="+", choices=FORMS, metavar="FORM")
    parser.add_argument("--out", type=Path, default=bench.RESULTS)
    arguments = parser.parse_args()
    forms = arguments.forms or bench.forms_here([f for f in FORMS if f != "auto"])
    sizes, repeats = (CPU if jax.default_backend() == "cpu" else ACCELERATOR), 7
    if arguments.quick:
        sizes, repeats, forms = QUICK, 1, ["unrolled"]
    rows = [row for size in sizes for row in measure(size, forms, repeats=repeats)]
    print(bench.table(rows, COLUMNS))
    print(f"\nwrote {bench.write('forms', rows, out=arguments.out)}")


if __name__ == "__main__":
    main()
