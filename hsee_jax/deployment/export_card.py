"""The description of an exported client: ``card.json``, and how to load the rest."""

import hashlib
from collections.abc import Mapping
from importlib import metadata
from typing import Any, NamedTuple

from hsee_jax.data.info import DatasetInfo
from hsee_jax.federation.branch import Branch
from hsee_jax.inference.criteria import CRITERIA
from hsee_jax.link.codecs import Codec
from hsee_jax.nn.model import Model, layer_inputs
from hsee_jax.systems.costs import layer_costs
from hsee_jax.systems.traffic import feature_bytes

Figures = dict[str, Any]  # values of JSON

PLATFORMS = ("cpu", "cuda", "tpu")
ONNX, FROZEN = "segment.onnx", "frozen.py"
_FORMAT = 1  # version of the card
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
* `uncertainty` of the exit, float32 `[b]`: {criterion}, the {measure}; infinite where
  a logit is not finite,
* `features`, {features[dtype]} `[b, {shapes[features]}]`: what the server goes on with.
{exits}{width}
The exit answers the samples with an uncertainty below `threshold`, the server answers
the others; `threshold` is null if no threshold was chosen, and `target` is what it was
chosen for. FLOPs and bytes are for one sample; the bytes are the size of its features
on the link `{features[link]}` of the training, or 0 if no features crossed it.

This needs jax, flatbuffers and safetensors, and runs on {places}.
The program was written by jax {versions[jax]}; JAX promises that its versions of the
next six months can read it.
"""
_README_EXITS = """\
* `logits_N` and `uncertainty_N` of the exit behind layer N, from 1 to {early_exits}.

The earliest exit with an uncertainty below `threshold` answers; a device stops there.
"""
_README_GATED = """\

The client is at its gated width: channels whose gates are closed are not in it.
"""
_README_ONNX = """
## Without JAX

`segment.onnx` is the same program, with its weights, for onnxruntime:

```python
import onnxruntime

program = onnxruntime.InferenceSession("segment.onnx")
logits, uncertainty = program.run(["logits", "uncertainty"], {{"{name}": {name}}})
```

The outputs whose names begin with `inputs` are the message of the link; without such
outputs, it is `features`. `frozen.py` takes part in a training with it, and trains
nothing; `python frozen.py --help` says how. It needs numpy, onnxruntime and grpcio.
"""


class Trained(NamedTuple):
    """A trained client, wherever its layers were kept."""

    id: int
    config: Any  # of its run, an `hsee_jax.Config`
    info: DatasetInfo
    codec: Codec  # of its link
    boundary: str  # of its strategy
    rounds: int  # finished rounds
    branch: Branch  # its layers and exit
    model: Model  # of its run, with the native convolution
    width: str | None = None  # of a client with gates, of `hsee_jax.nn.WIDTHS`


def card_of(
    trained: Trained, client: Model, known: Figures, files: Mapping[str, bytes]
) -> Figures:
    """Describe a client and its files as values of JSON, with the costs of one sample.

    Args:
      trained: the client.
      client: its network, see `hsee_jax.deployment.segment.up_to`.
      known: ``criterion`` of its exit, and figures of its run, if there are any.
      files: their content by name.
    """
    early, count = len(trained.branch.exits), len(client.stages)
    *parts, exit_head = layer_costs(client)
    own = (*parts[: count + early], exit_head)
    further = {"early_exits": early, "width": trained.width}
    features, config, info = layer_inputs(client)[-1], trained.config, trained.info
    (sent,) = feature_bytes(features, trained.codec, trained.boundary, [trained.id])
    return {
        "format": _FORMAT,
        "client": trained.id,
        "dataset": config.data.dataset,
        "network": config.model.network,
        "rounds": trained.rounds,
        "cut": len(client.stages),
        "layer": client.layer_names[-1],
        "input": {"shape": list(client.input_shape), "dtype": info.dtype},
        "classes": info.num_classes,
        "label_values": info.label_values,
        "mean": info.mean,
        "std": info.std,
        "criterion": known["criterion"],
        "threshold": known.get("threshold"),
        "target": known.get("target"),
        "exit_accuracy": known.get("exit_accuracy"),
        "server_accuracy": known.get("server_accuracy"),
        "parameters": sum(cost.parameters for cost in own),
        "flops": sum(cost.flops for cost in own),
        "features": {
            "shape": features.shape[1:],
            "dtype": features.dtype.name,
            "link": config.clients.link,
            "bytes": sent,
        },
        "platforms": PLATFORMS,
        "versions": {name: metadata.version(name) for name in ("hsee-jax", "jax")},
        "sha256": {
            name: hashlib.sha256(content).hexdigest() for name, content in files.items()
        },
    } | {name: value for name, value in further.items() if value}


def readme_of(card: Figures) -> str:
    """Return the text that says how to load an export."""
    shapes = {
        name: ", ".join(map(str, card[name]["shape"])) for name in ("input", "features")
    }
    stored = card["input"]["dtype"] == "uint8"
    text = _README + (_README_ONNX if ONNX in card["sha256"] else "")
    several = _README_EXITS.format(**card) if "early_exits" in card else ""
    return text.format(
        **{name: value for name, value in card.items() if name != "width"},
        exits=several,
        width=_README_GATED if card.get("width") == "gated" else "",
        name=input_name(card["input"]["dtype"]),
        formula="(images / 255 - mean) / std" if stored else "(samples - mean) / std",
        shapes=shapes,
        measure=CRITERIA.entry(card["criterion"]).summary,
        places=", ".join(card["platforms"]),
    )


def input_name(dtype: str) -> str:
    """Return the name that programs give to samples of a dtype."""
    return "images" if dtype == "uint8" else "samples"
