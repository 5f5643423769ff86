"""Meshes of devices for clients, with the one axis ``clients``.

Functions of one client are vmapped, and under `jax.shard_map` each device runs the
clients that it holds, without communication. Otherwise XLA would gather the stacked
convolutions of all devices on each device.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hsee_jax.core.types import PyTree

CLIENTS = "clients"
SPREAD = P(CLIENTS)  # the leading axis over the devices
SAME = P()  # the same on every device


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh of some devices; None for all devices of all processes."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(
        (len(devices),), (CLIENTS,), axis_types=(AxisType.Auto,), devices=devices
    )


def backend_of(mesh: Mesh | None) -> str:
    """Return the kind of a mesh's devices: ``"cpu"``, ``"gpu"`` or ``"tpu"``.

    Args:
      mesh: the devices; None for the default device.
    """
    if mesh is None:
        return jax.default_backend()
    platform = mesh.devices.flat[0].platform
    return "gpu" if platform in ("cuda", "rocm") else platform


def on_devices(fn: Callable, mesh: Mesh | None, in_specs: Any, out_specs: Any) -> Any:
    """Make a function run on each device's own part; without a mesh, on the whole."""
    if mesh is None:
        return fn
    return jax.shard_map(
        fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def over_clients(
    fn: Callable,
    mesh: Mesh | None,
    in_axes: Sequence[int | None],
    *,
    block: int = -1,
    each: Callable[[Callable, tuple[int | None, ...]], Callable] = jax.vmap,
) -> Any:
    """Map a function of one client over stacks of clients, with no communication.

    Args:
      fn: the function of one client.
      mesh: the leading axes of the stacks are spread over it; None for one device.
      in_axes: for each argument 0 for a stack with a leading axis of clients, or None
        for a value that all clients share.
      block: the position of an argument that is not a stack but is cut along its
        leading axis into one block for the clients of each device; -1 for none.
      each: makes from ``fn`` and ``in_axes`` the function that maps over the clients
        of one device.
    """
    specs = [SAME if axis is None else SPREAD for axis in in_axes]
    if block >= 0:
        specs[block] = SPREAD
    return on_devices(each(fn, tuple(in_axes)), mesh, tuple(specs), SPREAD)


def constrain(tree: PyTree, mesh: Mesh | None, specs: PyTree) -> PyTree:
    """Constrain the sharding of a value inside a compiled function.

    Args:
      tree: the value.
      mesh: the devices; None for the default device.
      specs: a `PartitionSpec`, or a tree of them that is a prefix of ``tree``.
    """
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, shardings(mesh, specs))


def shardings(mesh: Mesh, specs: PyTree) -> PyTree:
    """Return the shardings over a mesh for a tree of `PartitionSpec`s."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def to_devices(tree: PyTree, mesh: Mesh | None, specs: PyTree) -> PyTree:
    """Put host arrays on the devices.

    Args:
      tree: numpy arrays, with equal values in every process that reads them.
      mesh: the devices; None for the default device.
      specs: a `PartitionSpec`, or a tree of them that is a prefix of ``tree``.
    """
    if mesh is None:
        return jax.device_put(tree)

    def put(spec: P, leaf: Any) -> jax.Array:
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(
            np.shape(leaf), sharding, partial(_at, leaf)
        )

    return _map_by_spec(put, specs, tree)


def shapes_on(mesh: Mesh | None, tree: PyTree, specs: PyTree) -> PyTree:
    """Return the shapes of arrays, with the shardings that `to_devices` gives them."""

    def shape(spec: P, leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = None if mesh is None else NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return _map_by_spec(shape, specs, tree)


def _map_by_spec(fn: Callable[[P, Any], Any], specs: PyTree, tree: PyTree) -> PyTree:
    """Map each leaf, with the spec of the prefix tree that it belongs to."""
    return jax.tree.map(
        lambda spec, part: jax.tree.map(partial(fn, spec), part),
        specs,
        tree,
        is_leaf=lambda node: isinstance(node, P),
    )


def place_blocks(tree: PyTree, mesh: Mesh) -> PyTree:
    """Put this process's arrays on each of its devices, as blocks of larger arrays.

    Args:
      tree: numpy arrays ``[M, ...]``, of the same shape in every process.
      mesh: D devices.

    Returns:
      Arrays ``[D M, ...]``.
    """
    sharding = NamedSharding(mesh, SPREAD)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_callback(
            (mesh.size * leaf.shape[0], *leaf.shape[1:]), sharding, lambda _: leaf
        ),
        tree,
    )


def process_of_slots(mesh: Mesh, count: int) -> list[int]:
    """Return the process that holds each of ``count`` slots of a stack."""
    each = count // mesh.size
    return [d.process_index for d in mesh.devices.flat for _ in range(each)]


def _at(leaf: Any, index: Any) -> Any:
    return np.asarray(leaf)[index]


def to_host(tree: PyTree) -> PyTree:
    """Return device arrays as numpy arrays, complete in every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)
