"""Export a client's layers and exit as a folder that needs neither package nor run.

``segment.jaxexport`` is a program of `jax.export`, ``weights.safetensors`` holds its
weights, ``card.json`` describes both, and ``README.md`` says how to load them.
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

from hsee_jax.core.errors import UserError
from hsee_jax.core.types import Array
from hsee_jax.data.info import DatasetInfo
from hsee_jax.deployment import frozen
from hsee_jax.deployment.onnx_program import onnx_program
from hsee_jax.deployment.segment import Segment, make_segment, up_to
from hsee_jax.federation.branch import Branch, LayerState
from hsee_jax.inference.gate import CRITERIA
from hsee_jax.link.codecs import sample_bytes
from hsee_jax.nn.model import Model, layer_inputs
from hsee_jax.runs.folder import check_writable
from hsee_jax.runs.restore import Restored, restore
from hsee_jax.systems.costs import layer_costs

Figures = dict[str, Any]  # values of JSON

_FORMAT = 1  # version of the card
_PLATFORMS = ("cpu", "cuda", "tpu")
_PROGRAM, _WEIGHTS, _CARD = "segment.jaxexport", "weights.safetensors", "card.json"
_ONNX, _FROZEN = "segment.onnx", "frozen.py"
_README = """\
# Client {client}: the layers up to {layer}, and its exit

```python
from pathlib import Path
from jax import export
from safetensors.numpy import load_file

weights = load_file("weights.safetensors")
segment = export.deserialize(bytearray(Path("segment.jaxexport").read_bytes()))
answers = segment.call(weights, {name})
```

`{name}` are {input[dtype]} `[b, {shapes[input]}]`, for any b. The program normalises
them to `{formula}` with the figures of `card.json`. It returns

* `logits` of the exit, float32 `[b, {classes}]`,
* `uncertainty` of the exit, float32 `[b]`: {criterion}, the {measure},
* `features`, {features[dtype]} `[b, {shapes[features]}]`: what the server goes on with.

The exit answers the samples with an uncertainty below `threshold`, the server answers
the others; `threshold` is null if no threshold was chosen. FLOPs and bytes are for one
sample; the bytes are the size of its features on the link `{features[link]}` of the
training.

This needs jax, flatbuffers and safetensors, and runs on {places}.
The program was written by jax {versions[jax]}; JAX promises that its versions of the
next six months can read it.
"""
_README_ONNX = """
## Without JAX

`segment.onnx` is the same program, with its weights, for onnxruntime:

```python
import onnxruntime

program = onnxruntime.InferenceSession("segment.onnx")
logits, uncertainty = program.run(["logits", "uncertainty"], {{"{name}": {name}}})
```

The outputs whose names begin with `inputs` are the message of the link. `frozen.py` takes
part in a training with it, and trains nothing; `python frozen.py --help` says how. It needs
numpy, onnxruntime and grpcio.
"""


def export_client(
    path: str | os.PathLike[str],
    i: int,
    *,
    which: str = "latest",
    out: str | os.PathLike[str] | None = None,
    onnx: bool = False,
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

    Returns:
      The folder that was written.

    Raises:
      UserError: there is no such run or client, the folder holds other files, it cannot
        be written to, or the client cannot be written as ONNX.
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
    client = up_to(run.plain_model(), cut=len(branch.layers))
    weights = _by_name(branch, client.layer_names)
    segment = make_segment(client, run.info, known["criterion"])
    files = {
        _PROGRAM: _program(segment, branch, weights, run.info),
        _WEIGHTS: save(weights),
    }
    if onnx:
        name, codec = _input_name(run.info.dtype), run.federation.codec
        files |= {
            _ONNX: onnx_program(segment, branch, run.info, codec, name),
            _FROZEN: Path(frozen.__file__).read_bytes(),
        }
    card = _card(run, i, client, known, files)
    texts = {_CARD: json.dumps(card, indent=2) + "\n", "README.md": _readme(card)}
    _write({name: text.encode() for name, text in texts.items()} | files, place)
    return place


def _bare(branch: Branch) -> Branch:
    """Copy a branch to the host, without optimizer and link state."""
    bare = jax.tree.map(
        lambda layer: layer.replace(opt_state=()),
        branch,
        is_leaf=lambda node: isinstance(node, LayerState),
    )
    return jax.device_get(bare.replace(link=()))


def _by_name(branch: Branch, layers: Sequence[str]) -> dict[str, npt.NDArray]:
    """Return the leaves by names such as ``layer1.0/conv1/conv/kernel``, in order."""
    parts = zip((*layers, "exit"), (*branch.layers, branch.head), strict=True)
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
        exported = export.export(jax.jit(program), platforms=_PLATFORMS)(
            weights, images
        )
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
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"run: {path} cannot be read: {error!r}") from error


def _card(
    run: Restored, i: int, client: Model, known: Figures, files: dict[str, bytes]
) -> Figures:
    """Describe client i and its files in values of JSON, with costs of a sample."""
    *layers, exit_head = layer_costs(client)
    own = (*layers[: len(client.stages)], exit_head)
    features = layer_inputs(client)[-1]
    return {
        "format": _FORMAT,
        "client": i,
        "dataset": run.config.data.dataset,
        "network": run.config.model.network,
        "rounds": int(run.state.round),
        "cut": len(client.stages),
        "layer": client.layer_names[-1],
        "input": {"shape": list(client.input_shape), "dtype": run.info.dtype},
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
    stored = card["input"]["dtype"] == "uint8"
    text = _README + (_README_ONNX if _ONNX in card["sha256"] else "")
    return text.format(
        **card,
        name=_input_name(card["input"]["dtype"]),
        formula="(images / 255 - mean) / std" if stored else "(samples - mean) / std",
        shapes=shapes,
        measure=CRITERIA.entry(card["criterion"]).summary,
        places=", ".join(card["platforms"]),
    )


def _input_name(dtype: str) -> str:
    return "images" if dtype == "uint8" else "samples"


def _write(files: dict[str, bytes], folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in {_ONNX, _FROZEN} - files.keys():
            (folder / name).unlink(missing_ok=True)  # of an earlier export
        for name, content in files.items():
            (folder / name).write_bytes(content)
    except OSError as error:
        raise UserError(
            f"out: {folder} cannot be written to: {error.strerror or error}"
        ) from error
