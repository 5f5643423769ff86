"""A network of your own: MLP-Mixer (Tolstikhin et al., NeurIPS 2021) as a plugin.

A network is a chain of layers with an exit head after each of them. Here the first
layer cuts an image into patches and makes a token of each; every further layer mixes
information over tokens, then over channels. The heads take the mean over the tokens.

Train it from Python, or from the command line in the folder of this file::

    python examples/own_network.py --out runs/mixer
    hsee train --plugin own_network --network mixer --depth 6 --cuts mixer2 mixer4
"""

import argparse
from collections.abc import Sequence
from typing import Annotated

import flax.linen as nn

import hsee_jax as hs
from hsee_jax.core import Array, at_least


class Patches(nn.Module):
    """Square patches as tokens: ``[B, H, W, C] -> [B, tokens, channels]``."""

    size: int
    channels: int

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """Run the layer; ``mask`` is false on rows of padding."""
        batch, height, width, colours = x.shape
        rows, columns = height // self.size, width // self.size
        x = x.reshape(batch, rows, self.size, columns, self.size, colours)
        x = x.swapaxes(2, 3).reshape(batch, rows * columns, -1)
        return nn.Dense(self.channels)(x)


class Mixer(nn.Module):
    """A layer of the Mixer: ``[B, tokens, channels]``, the same shape in and out."""

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """Run the layer."""
        over_tokens = _Perceptron()(nn.LayerNorm()(x).swapaxes(1, 2))
        x = x + over_tokens.swapaxes(1, 2)
        return x + _Perceptron()(nn.LayerNorm()(x))


class _Perceptron(nn.Module):
    """Two dense layers over the last axis."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        hidden = nn.gelu(nn.Dense(2 * x.shape[-1])(x))
        return nn.Dense(x.shape[-1])(hidden)


class Head(nn.Module):
    """The classes: ``[B, tokens, channels] -> [B, K]``."""

    classes: int

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """Run the head."""
        return nn.Dense(self.classes)(nn.LayerNorm()(x).mean(axis=1))


@hs.nn.register
def mixer(
    *,
    num_classes: int,
    input_shape: tuple[int, ...],
    depth: Annotated[int, "mixing layers behind the patches", at_least(1)] = 6,
    channels: Annotated[int, "values of a token", at_least(1)] = 32,
    patch_size: Annotated[int, "pixels on a side of a patch", at_least(1)] = 4,
) -> hs.Model:
    """Build MLP-Mixer; the keywords with a default are its options, and flags."""
    if any(side % patch_size for side in input_shape[:2]):
        sides = " x ".join(map(str, input_shape[:2]))
        raise hs.UserError(
            f"patch_size: {patch_size} does not divide {sides} pixels; allowed is a "
            "divisor of both sides"
        )
    layers = [Patches(patch_size, channels), *(Mixer() for _ in range(depth))]
    head = hs.nn.from_linen(Head(num_classes))
    return hs.Model(
        stages=tuple(map(hs.nn.from_linen, layers)),
        exit_heads=(head,) * len(layers),
        final_head=head,
        layer_names=("patches", *(f"mixer{i}" for i in range(1, depth + 1))),
        input_shape=input_shape,
    )


def main(words: Sequence[str] | None = None) -> None:
    """Train the network on the images of the package, and read it back."""
    parser = argparse.ArgumentParser(description="Train a network of your own.")
    parser.add_argument("--out", default="runs/mixer", help="folder of the run")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--depth", type=int, default=6, help="3 or more")
    given = parser.parse_args(words)
    config = hs.override(
        hs.preset("demo"),
        plugin=("own_network",),  # the run's folder names the module to import
        network="mixer",
        depth=given.depth,
        cuts=(f"mixer{given.depth // 3}", f"mixer{2 * given.depth // 3}"),
        optimizer="adamw",
        learning_rate=1e-3,
        rounds=given.rounds,
    )
    summary = hs.train(config, given.out, overwrite=True)
    for client in summary.scores.clients:
        print(
            f"client {client.id}, cut {client.cut}: exit {client.exit_accuracy:.3f}, "
            f"server {client.server_accuracy:.3f}"
        )
    run = hs.restore(given.out)
    names = run.federation.model.layer_names
    print(f"client 0 holds {', '.join(names[: len(run.client(0).layers)])}")


if __name__ == "__main__":
    main()
