"""From stored samples to a batch of network inputs, inside the compiled step."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from hsee_jax.base import Array, Batch, Dataset, Key
from hsee_jax.fields import unknown

_KINDS = ("none", "crop", "crop_flip")
_PAD = 4  # pixels, the usual margin for 32x32 images


def normalize(images: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """Centres and scales ``uint8 [B, H, W, C]`` to ``float32 [B, H, W, C]``.

    Args:
      images: values 0..255.
      mean: of each channel, on the scale 0..1.
      std: of each channel, on the scale 0..1.
    """
    chex.assert_rank(images, 4)
    chex.assert_type(images, jnp.uint8)
    scale = jnp.asarray(std, jnp.float32).reshape(1, 1, 1, -1)
    shift = jnp.asarray(mean, jnp.float32).reshape(1, 1, 1, -1)
    return (images.astype(jnp.float32) / 255.0 - shift) / scale


def augment(key: Key, images: Array, kind: str, *, draws: int | None = None) -> Array:
    """Crop and flip every image by itself, at random.

    Args:
      key: a typed key.
      images: ``float32 [B, H, W, C]``, normalised, so that the margin is mean grey.
      kind: ``"none"``, ``"crop"``: a window of the image padded by 4 pixels of 0, or
        ``"crop_flip"``: also mirrored left to right with probability one half.
      draws: the images that are drawn for, at least B; None is B. A batch and its first
        rows, with equal ``draws``, are augmented alike.
    """
    if kind not in _KINDS:
        raise unknown("augment", kind, _KINDS)
    if kind == "none":
        return images
    chex.assert_rank(images, 4)
    batch, height, width, _ = images.shape
    crop_key, flip_key = jax.random.split(key)
    draws = batch if draws is None else draws
    offsets = jax.random.randint(crop_key, (2, draws, 1), 0, 2 * _PAD + 1)[:, :batch]
    rows = jnp.arange(height)[None, :] + offsets[0] - _PAD
    columns = jnp.arange(width)[None, :]
    if kind == "crop_flip":
        flip = jax.random.bernoulli(flip_key, shape=(draws, 1))[:batch]
        columns = jnp.where(flip, width - 1 - columns, columns)
    columns = columns + offsets[1] - _PAD
    inside = ((rows >= 0) & (rows < height))[:, :, None] & (
        (columns >= 0) & (columns < width)
    )[:, None, :]
    picked = images[
        jnp.arange(batch)[:, None, None],
        jnp.clip(rows, 0, height - 1)[:, :, None],
        jnp.clip(columns, 0, width - 1)[:, None, :],
    ]
    return jnp.where(inside[..., None], picked, 0.0)


class InputPipeline(NamedTuple):
    """From stored samples to the batch of a step."""

    mean: tuple[float, ...]  # of each channel, scale 0..1
    std: tuple[float, ...]
    augment: str  # see `augment`
    draws: int | None = None  # see `augment`

    def training(self, key: Key, data: Dataset, indices: Array, mask: Array) -> Batch:
        """The samples at ``int32 [B]``, normalised and augmented."""
        batch = self.evaluation(data, indices, mask)
        inputs = augment(key, batch.inputs, self.augment, draws=self.draws)
        return batch._replace(inputs=inputs)

    def evaluation(self, data: Dataset, indices: Array, mask: Array) -> Batch:
        """The samples at ``int32 [B]``, normalised."""
        images = normalize(data.images[indices], self.mean, self.std)
        return Batch(images, data.labels[indices], mask)
