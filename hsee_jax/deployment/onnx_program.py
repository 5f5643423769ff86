"""A client's layers, exit and link as ONNX, for devices without JAX."""

import contextlib
import io
import warnings
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from hsee_jax.core.errors import UserError, no_package
from hsee_jax.core.types import Array
from hsee_jax.data.info import DatasetInfo
from hsee_jax.deployment.protocol import named
from hsee_jax.deployment.segment import Segment
from hsee_jax.federation.branch import Branch
from hsee_jax.link.codecs import Codec

_OPSET = 21


def onnx_program(
    segment: Segment, branch: Branch, info: DatasetInfo, codec: Codec, name: str
) -> bytes:
    """Convert a client to ONNX, with its weights, for any number of samples.

    The outputs are those of the segment, and behind them the message of the link, with
    the names that it has in the protocol, which begin with ``inputs``. The message is
    left out if it is the features as they are.

    Args:
      segment: of the client.
      branch: its layers and exit.
      info: on the data.
      codec: of the link.
      name: of the input.

    Raises:
      UserError: the converter is not installed, or cannot convert this network or link;
        or the link keeps a state.
    """
    inputs = jax.ShapeDtypeStruct((1, *info.input_shape), jnp.dtype(info.dtype))
    features = jax.eval_shape(segment, branch, inputs)["features"]
    if jax.tree.leaves(codec.init(features)):
        raise UserError(
            "onnx: this link keeps a state for each client, which an exported program "
            "cannot; allowed are full, float16 and int8"
        )

    def outputs(samples: Array) -> dict[str, Array]:
        answers = segment(branch, samples)
        mask = jnp.ones(samples.shape[:1], bool)
        message, _ = codec.encode(answers["features"], (), mask)
        if message is answers["features"]:
            return answers
        return answers | named(message, "inputs")

    names = sorted(jax.eval_shape(outputs, inputs))  # in the order of leaves
    shape = jax.ShapeDtypeStruct(("b", *info.input_shape), inputs.dtype)
    return _convert(outputs, shape, name, names)


def _convert(
    outputs: Callable[[Array], dict[str, Array]],
    samples: jax.ShapeDtypeStruct,
    name: str,
    names: Sequence[str],
) -> bytes:
    """Convert a function of samples, quietly; see `onnx_program`."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
        jax.numpy_rank_promotion("allow"),  # the converter's own layers need it
    ):
        warnings.simplefilter("ignore")  # about deprecated names in JAX
        try:
            from jax2onnx import to_onnx
        except ImportError as error:
            raise no_package("onnx", "onnx") from error
        try:
            model = to_onnx(
                outputs,
                [samples],
                model_name="client",
                opset=_OPSET,
                input_names=[name],
                output_names=names,
            )
        except Exception as error:  # of any kind, from any primitive
            line = str(error).partition("\n")[0]
            raise UserError(
                "onnx: jax2onnx cannot convert this network: "
                f"{type(error).__name__}: {line}"
            ) from error
    return model.SerializeToString()
