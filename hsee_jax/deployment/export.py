"""A client's layers and exit as a folder that needs neither this package nor the run.

``segment.jaxexport`` is a program of `jax.export`, ``weights.safetensors`` what it
computes with, ``card.json`` says what they are, and ``README.md`` how to load them.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy.typing as npt
import optax

from hsee_jax.core.errors import UserError
from hsee_jax.core.types import Array
from hsee_jax.data.info import DatasetInfo
from hsee_jax.data.pipeline import normalize
from hsee_jax.federation.branch import Branch, BranchSpec, LayerState, forward
from hsee_jax.inference.gate import CRITERIA
from hsee_jax.link.codecs import sample_bytes
from hsee_jax.nn.model import Model, layer_inputs
from hsee_jax.runs.folder import check_writable
from hsee_jax.runs.restore import Restored, restore
from hsee_jax.systems.costs import layer_costs

Figures = dict[str, Any]  # as JSON holds them

_FORMAT = 1  # of the card
_PLATFORMS = ("cpu", "cuda", "tpu")
_PROGRAM, _WEIGHTS, _CARD = "segment.jaxexport", "weights.safetensors", "card.json"
_README = """\
# Client {client}: the layers up to {layer}, and its exit

```python
from pathlib import Path
from jax import export
from safetensors.numpy import load_file

weights = load_file("weights.safetensors")
segment = export.deserialize(bytearray(Path("segment.jaxexport").read_bytes()))
answers = segment.call(weights, images)
```

`images` are {input[dtype]} `[b, {shapes[input]}]`, for any b. They are normalised
inside, to `(images / 255 - mean) / std` with the figures of `card.json`. The answers:

* `logits` of the exit, float32 `[b, {classes}]`,
* `uncertainty` of the exit, float32 `[b]`: {criterion}, the {measure},
* `features`, {features[dtype]} `[b, {shapes[features]}]`: what the server goes on with.

Samples whose uncertainty is below `threshold` are answered by the exit, the others by
the server; if it is null, none was chosen. FLOPs and bytes are those of one sample;
the bytes are what the link `{features[link]}` of the training makes of the features.

This needs jax, flatbuffers and safetensors, and runs on {places}.
It was written by jax {versions[jax]}; JAX promises that its versions of the next six
months read it.
"""


def export_client(
    path: str | os.PathLike[str],
    i: int,
    *,
    which: str = "latest",
    out: str | os.PathLike[str] | None = None,
) -> Path:
    """Write a client's layers and exit as a folder that stands alone.

    Args:
      path: of the run's folder.
      i: the client's id.
      which: see `restore`.
      out: where to; an earlier export is replaced. None is ``export/client-I`` of the
        run.

    Returns:
      Where it is.

    Raises:
      UserError: there is no such run or client, or the folder cannot be written to.
    """
    folder = Path(path)
    place = folder / "export" / f"client-{i}" if out is None else Path(out)
    check_writable(place)
    if place.exists() and any(place.iterdir()) and not (place / _CARD).is_file():
        raise UserError(
            f"out: {place} is neither empty nor an export; allowed is a new folder"
        )
    from safetensors.numpy import save

    run = restore(folder, which, only=i)
    rounds = int(run.state.round)
    known = _known(folder / "summary.json", rounds, i)
    known |= _known(folder / "gate" / "thresholds.json", rounds, i)
    known.setdefault("criterion", "entropy")
    branch = _bare(run.client(i))
    client = _up_to(run.plain_model(), cut=len(branch.layers))
    weights = _by_name(branch, client.layer_names)
    files = {
        _PROGRAM: _program(client, branch, weights, run.info, known["criterion"]),
        _WEIGHTS: save(weights),
    }
    card = _card(run, i, client, known, files)
    texts = {_CARD: json.dumps(card, indent=2) + "\n", "README.md": _readme(card)}
    _write({name: text.encode() for name, text in texts.items()} | files, place)
    return place


def _up_to(model: Model, cut: int) -> Model:
    """Return the network of a client, which ends with its exit."""
    return model._replace(
        stages=model.stages[:cut],
        exit_heads=model.exit_heads[:cut],
        final_head=model.exit_heads[cut - 1],
        layer_names=model.layer_names[:cut],
    )


def _bare(branch: Branch) -> Branch:
    """Bring a branch to the host, without optimizer and link state."""
    bare = jax.tree.map(
        lambda layer: layer.replace(opt_state=()),
        branch,
        is_leaf=lambda node: isinstance(node, LayerState),
    )
    return jax.device_get(bare.replace(link=()))


def _by_name(branch: Branch, layers: Sequence[str]) -> dict[str, npt.NDArray]:
    """Name the leaves in order, such as ``layer1.0/conv1/conv/kernel``."""
    parts = zip((*layers, "exit"), (*branch.layers, branch.head), strict=True)
    return {
        f"{name}/{jax.tree_util.keystr(path[1:], simple=True, separator='/')}": leaf
        for name, layer in parts
        for path, leaf in jax.tree.leaves_with_path(layer)
    }


def _program(
    client: Model,
    branch: Branch,
    weights: dict[str, npt.NDArray],
    info: DatasetInfo,
    criterion: str,
) -> bytes:
    """Export the function of named weights and ``uint8 [b, H, W, C]``, for every b."""
    from jax import export

    spec = BranchSpec(client.stages, client.final_head, optax.identity())
    uncertainty = CRITERIA.make(criterion).uncertainty
    names, structure = list(weights), jax.tree.structure(branch)

    def segment(weights: dict[str, Array], images: Array) -> dict[str, Array]:
        branch = jax.tree.unflatten(structure, [weights[name] for name in names])
        mask = jnp.ones(images.shape[:1], bool)
        inputs = normalize(images, info.mean, info.std)
        features, logits, _ = forward(spec, branch, inputs, mask, train=False)
        return {
            "logits": logits,
            "uncertainty": uncertainty(logits),
            "features": features,
        }

    shape = export.symbolic_shape("b, ...", like=(None, *info.input_shape))
    images = jax.ShapeDtypeStruct(shape, jnp.uint8)
    with _without_sources():
        program = export.export(jax.jit(segment), platforms=_PLATFORMS)(weights, images)
    return bytes(program.serialize())


@contextlib.contextmanager
def _without_sources() -> Iterator[None]:
    """Keep paths of this machine out of programs."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _known(path: Path, rounds: int, i: int) -> Figures:
    """Read what a file of the run says of a client after so many rounds."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        own = [client for client in content["clients"] if client["id"] == i]
        return content | own[0] if content["rounds"] == rounds else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"run: {path} cannot be read: {error!r}") from error


def _card(
    run: Restored, i: int, client: Model, known: Figures, files: dict[str, bytes]
) -> Figures:
    """Describe client i and its files, as JSON holds it; costs are of a sample."""
    *layers, exit_head = layer_costs(client)
    own = (*layers[: len(client.stages)], exit_head)
    features = layer_inputs(client)[-1]
    return {
        "format": _FORMAT,
        "client": i,
        "dataset": run.config.data.dataset,
        "rounds": int(run.state.round),
        "cut": len(client.stages),
        "layer": client.layer_names[-1],
        "input": {"shape": list(client.input_shape), "dtype": "uint8"},
        "classes": run.info.num_classes,
        "label_values": run.info.label_values,
        "mean": run.info.mean,
        "std": run.info.std,
        "criterion": known["criterion"],
        "threshold": known.get("threshold"),
        "exit_accuracy": known.get("exit_accuracy"),
        "server_accuracy": known.get("server_accuracy"),
        "parameters": sum(cost.parameters for cost in own),
        "flops": sum(cost.flops for cost in own),
        "features": {
            "shape": features.shape[1:],
            "dtype": features.dtype.name,
            "link": run.config.clients.link,
            "bytes": sample_bytes(run.federation.codec, features),
        },
        "platforms": _PLATFORMS,
        "versions": {name: metadata.version(name) for name in ("hsee-jax", "jax")},
        "sha256": {
            name: hashlib.sha256(content).hexdigest() for name, content in files.items()
        },
    }


def _readme(card: Figures) -> str:
    shapes = {
        name: ", ".join(map(str, card[name]["shape"])) for name in ("input", "features")
    }
    return _README.format(
        **card,
        shapes=shapes,
        measure=CRITERIA.entry(card["criterion"]).summary,
        places=", ".join(card["platforms"]),
    )


def _write(files: dict[str, bytes], folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
    except OSError as error:
        raise UserError(
            f"out: {folder} cannot be written to: {error.strerror or error}"
        ) from error
