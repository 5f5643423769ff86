"""Export a client's layers and exit as a folder that needs neither package nor run.

``segment.jaxexport`` is a program of `jax.export`, ``weights.safetensors`` holds its
weights, ``card.json`` describes both, and ``README.md`` says how to load them.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy.typing as npt

from hsee_jax.core.errors import DAMAGE, UserError, unknown
from hsee_jax.core.files import replace_file, writing
from hsee_jax.core.types import Array
from hsee_jax.data.info import DatasetInfo
from hsee_jax.deployment import frozen
from hsee_jax.deployment.box import Box
from hsee_jax.deployment.export_card import (
    FROZEN,
    ONNX,
    PLATFORMS,
    Figures,
    Trained,
    card_of,
    input_name,
    readme_of,
)
from hsee_jax.deployment.forms import client_shapes
from hsee_jax.deployment.onnx_program import onnx_program
from hsee_jax.deployment.segment import Segment, make_segment, up_to
from hsee_jax.federation.branch import Branch, LayerState, variables_of
from hsee_jax.nn.gates import WIDTHS, has_gates, without_gates
from hsee_jax.runs.build import build_model
from hsee_jax.runs.folder import check_writable
from hsee_jax.runs.participant import build_participant
from hsee_jax.runs.restore import restore

_PROGRAM, _WEIGHTS, _CARD = "segment.jaxexport", "weights.safetensors", "card.json"


def export_client(
    path: str | os.PathLike[str],
    i: int,
    *,
    which: str | int = "latest",
    out: str | os.PathLike[str] | None = None,
    onnx: bool = False,
    width: str = "dense",
) -> Path:
    """Write a client's layers and exit to a folder that needs no other files.

    Args:
      path: the run's folder.
      i: the client's id.
      which: see `restore`.
      out: the folder to write; an earlier export there is replaced. None for
        ``export/client-I`` in the run's folder.
      onnx: write the client as ``segment.onnx``, too, for devices without JAX, and the
        program with which they take part in a run.
      width: of `hsee_jax.nn.WIDTHS`. In a run with a target for the width, ``"gated"``
        leaves out the channels whose gates are closed.

    Returns:
      The folder that was written.

    Raises:
      UserError: see `restore`; or there is no such width, ``summary.json`` or
        ``gate/thresholds.json`` of the run is damaged, the folder holds other files, it
        cannot be written to, or the client cannot be written as ONNX.
    """
    folder = Path(path)
    place = folder / "export" / f"client-{i}" if out is None else Path(out)
    _check(place)
    run = restore(folder, which, only=i)
    rounds = int(run.state.round)
    known = _known(folder / "summary.json", rounds, i)
    known |= _known(folder / "gate" / "thresholds.json", rounds, i)
    trained = Trained(
        i,
        run.config,
        run.info,
        run.federation.codec,
        run.strategy.boundary,
        rounds,
        run.client(i),
        run.plain_model(),
    )
    return _export(*_at_width(trained, known, width), place, onnx=onnx)


def export_device(
    state: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    onnx: bool = False,
    plugins: Sequence[str] = (),
) -> Path:
    """Write the client of a device to a folder that needs no other files.

    Args:
      state: the folder of the device, which `take_part` wrote.
      out: see `export_client`; None for ``export`` in the device's folder.
      onnx: see `export_client`.
      plugins: modules that the run of the device needs.

    Returns:
      The folder that was written.

    Raises:
      UserError: see `export_client`, or the device has not trained a round yet.
    """
    box = Box(Path(state))
    place = Path(state) / "export" if out is None else Path(out)
    _check(place)
    part = build_participant(json.loads(box.about()), plugins)
    like, rounds = client_shapes(part.strategy)[0], box.rounds()
    kept = box.load(like, rounds[-1]) if rounds else None
    if kept is None or kept.round == kept.since == 0:  # drawn, and never trained
        raise UserError(
            f"state: {state} holds no trained layers yet; allowed is the folder of a "
            "device that has trained a round"
        )
    trained = Trained(
        part.client,
        part.config,
        part.info,
        part.federation.codec,
        part.strategy.boundary,
        kept.round,
        kept.client,
        build_model(part.config, part.info, plain=True),
    )
    return _export(trained, {}, place, onnx=onnx)


def _check(place: Path) -> None:
    """Refuse a folder that cannot be written to, or holds other files."""
    check_writable(place)
    with writing(place):
        is_used = os.path.exists(place) and any(place.iterdir())
    if is_used and not os.path.isfile(place / _CARD):
        raise UserError(
            f"out: {place} is neither empty nor an export; allowed is a new folder"
        )


def _at_width(trained: Trained, known: Figures, width: str) -> tuple[Trained, Figures]:
    """Return a client without gates at one of its widths, and its figures there.

    Raises:
      UserError: the client does not have this width.
    """
    if width not in WIDTHS:
        raise unknown("width", width, WIDTHS)
    if not has_gates(trained.model):
        if width != "dense":
            raise UserError(
                f"width: {width} is not allowed for a run without channel gates, see "
                "width_target; allowed is dense"
            )
        return trained, known
    branch = trained.branch
    client = up_to(trained.model, cut=len(branch.layers))
    own = [variables_of(layer) for layer in jax.device_get(branch.layers)]
    model, layers = without_gates(client, own, width)
    states = tuple(LayerState(**own, opt_state=()) for own in layers)
    if width == "gated":  # a threshold was chosen for the dense width
        known = {"criterion": "entropy"} | known.get("gated", {})
    trained = trained._replace(branch=branch.replace(layers=states), model=model)
    return trained._replace(width=width), known


def _export(trained: Trained, known: Figures, place: Path, *, onnx: bool) -> Path:
    from safetensors.numpy import save

    branch, known = _bare(trained.branch), {"criterion": "entropy"} | known
    client = up_to(trained.model, cut=len(branch.layers))
    info = trained.info._replace(input_shape=client.input_shape)  # of its own view
    weights = _by_name(branch, client.layer_names)
    segment = make_segment(client, info, known["criterion"], len(branch.exits))
    files = {
        _PROGRAM: _program(segment, branch, weights, info),
        _WEIGHTS: save(weights),
    }
    if onnx:
        name = input_name(info.dtype)
        files |= {
            ONNX: onnx_program(segment, branch, info, trained.codec, name),
            FROZEN: Path(frozen.__file__).read_bytes(),
        }
    card = card_of(trained, client, known, files)
    texts = {_CARD: json.dumps(card, indent=2) + "\n", "README.md": readme_of(card)}
    _write({name: text.encode() for name, text in texts.items()} | files, place)
    return place


def _bare(branch: Branch) -> Branch:
    """Copy a branch to the host, without optimizer and link state."""
    bare = jax.tree.map(
        lambda layer: layer.replace(opt_state=()),
        branch.replace(link=()),
        is_leaf=lambda node: isinstance(node, LayerState),
    )
    return jax.device_get(bare)


def _by_name(branch: Branch, layers: Sequence[str]) -> dict[str, npt.NDArray]:
    """Return the leaves by names such as ``layer1.0/conv1/conv/kernel``, in order."""
    early = tuple(f"exit_{n}" for n in range(1, len(branch.exits) + 1))
    parts = zip(
        (*layers, "exit", *early),
        (*branch.layers, branch.head, *branch.exits),
        strict=True,
    )
    return {
        f"{name}/{jax.tree_util.keystr(path[1:], simple=True, separator='/')}": leaf
        for name, layer in parts
        for path, leaf in jax.tree.leaves_with_path(layer)
    }


def _program(
    segment: Segment,
    branch: Branch,
    weights: dict[str, npt.NDArray],
    info: DatasetInfo,
) -> bytes:
    """Export a function of named weights and samples ``[b, ...]``, for every b."""
    from jax import export

    names, structure = list(weights), jax.tree.structure(branch)

    def program(weights: dict[str, Array], images: Array) -> dict[str, Array]:
        leaves = [weights[name] for name in names]
        return segment(jax.tree.unflatten(structure, leaves), images)

    shape = export.symbolic_shape("b, ...", like=(None, *info.input_shape))
    images = jax.ShapeDtypeStruct(shape, jnp.dtype(info.dtype))
    with _without_sources():
        exported = export.export(jax.jit(program), platforms=PLATFORMS)(weights, images)
    return bytes(exported.serialize())


@contextlib.contextmanager
def _without_sources() -> Iterator[None]:
    """Keep the paths of source files out of programs."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _known(path: Path, rounds: int, i: int) -> Figures:
    """Read the figures of a client from a file of the run, if its rounds agree."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        own = [client for client in content["clients"] if client["id"] == i]
        return content | own[0] if content["rounds"] == rounds else {}
    except FileNotFoundError:
        return {}
    except (OSError, *DAMAGE) as error:
        raise UserError(f"run: {path} cannot be read: {error!r}") from error


def _write(files: dict[str, bytes], folder: Path) -> None:
    """Write an export; its card, which describes the others, comes last."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    others = [name for name in files if name != _CARD]
    for name in (*others, _CARD):
        replace_file(folder / name, files[name])
    with writing(folder):
        for name in {ONNX, FROZEN} - files.keys():
            (folder / name).unlink(missing_ok=True)  # of an earlier export
