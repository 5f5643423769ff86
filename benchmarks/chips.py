"""The accelerators that `bench_aot.py` compiles for, without having them.

The figures are those of their makers: the pages of Google Cloud on TPU v5e and v6e, and
NVIDIA's data sheet of the H100 SXM5.
"""

from pathlib import Path
from typing import NamedTuple

from jax.experimental import topologies
from jax.sharding import Mesh

from hsee_jax.parallel import make_mesh

_H100 = Path(__file__).parent / "h100.txtpb"


class Chip(NamedTuple):
    """An accelerator."""

    name: str
    backend: str
    flops: float  # a second, in bfloat16
    memory: float  # bytes
    bandwidth: float  # bytes a second, of the memory
    link: float  # bytes a second that leave a chip, on a ring in both directions
    clock: float | None = None  # Hz; None where XLA does not count cycles


CHIPS = {
    "v5e": Chip("TPU v5e", "tpu", 197e12, 16e9, 819e9, 90e9, 1.5e9),
    "v6e": Chip("TPU v6e", "tpu", 918e12, 32e9, 1640e9, 180e9, 1.75e9),
    "h100": Chip("H100 SXM5", "gpu", 989e12, 80e9, 3350e9, 450e9),
}


def mesh_of(chip: str, count: int) -> Mesh:
    """Return a mesh of chips that need not be there.

    Args:
      chip: a key of `CHIPS`.
      count: the number of chips: 1, 4 or 8.

    Raises:
      RuntimeError: the compiler for the chip is not installed.
    """
    if CHIPS[chip].backend == "tpu":
        # One chip is a part of four.
        shape = {1: "2x2", 4: "2x2", 8: "2x4"}[count]
        found = topologies.get_topology_desc(f"{chip}:{shape}", "tpu")
    else:
        found = topologies.get_topology_desc(
            platform="cuda",
            target_config=_H100.read_text(),
            topology=f"1x1x{count}",
        )
    return make_mesh(found.devices[:count])
