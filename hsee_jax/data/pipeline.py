"""Make batches of network inputs from stored samples, inside the compiled step."""

from typing import NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp

from hsee_jax.core.registry import Registry
from hsee_jax.core.types import Array, Batch, Dataset, Key

_PAD = 4  # pixels, the usual margin for 32x32 images


class AugmentFn(Protocol):
    """Changes training images at random."""

    def __call__(self, key: Key, images: Array) -> Array:
        """Change each image independently of the others.

        Args:
          key: a typed key.
          images: ``float32 [B, H, W, C]``, normalised, so that 0 is mean grey.

        Returns:
          The images, ``float32 [B, H, W, C]``.
        """


# Factories take only their options.
AUGMENTATIONS: Registry[AugmentFn] = Registry("augment")
register = AUGMENTATIONS.register


@AUGMENTATIONS.register(summary="leaves images as they are")
def none() -> AugmentFn:
    """Leave images as they are."""
    return lambda key, images: images


@AUGMENTATIONS.register(summary="a random window of the image padded by 4")
def crop() -> AugmentFn:
    """Take a random window of each image, padded by 4 pixels of 0."""
    return lambda key, images: _crop(key, images, flip=False)


@AUGMENTATIONS.register(summary="crop, and a mirror image with probability one half")
def crop_flip() -> AugmentFn:
    """Take a random window, and mirror it left to right with probability one half."""
    return lambda key, images: _crop(key, images, flip=True)


def _crop(key: Key, images: Array, *, flip: bool) -> Array:
    chex.assert_rank(images, 4)
    batch, height, width, _ = images.shape
    crop_key, flip_key = jax.random.split(key)
    offsets = jax.random.randint(crop_key, (2, batch, 1), 0, 2 * _PAD + 1)
    rows = jnp.arange(height)[None, :] + offsets[0] - _PAD
    columns = jnp.arange(width)[None, :]
    if flip:
        mirrored = jax.random.bernoulli(flip_key, shape=(batch, 1))
        columns = jnp.where(mirrored, width - 1 - columns, columns)
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


def normalize(images: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """Centre and scale ``uint8 [B, H, W, C]`` to ``float32 [B, H, W, C]``.

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


class InputPipeline(NamedTuple):
    """Makes the batch of a step from stored samples."""

    mean: tuple[float, ...]  # of each channel, on the scale 0..1
    std: tuple[float, ...]
    augment: AugmentFn = none()

    def training(self, key: Key, data: Dataset, indices: Array, mask: Array) -> Batch:
        """Return the samples at ``int32 [B]``, normalised and augmented."""
        batch = self.evaluation(data, indices, mask)
        return batch._replace(inputs=self.augment(key, batch.inputs))

    def evaluation(self, data: Dataset, indices: Array, mask: Array) -> Batch:
        """Return the samples at ``int32 [B]``, normalised."""
        images = normalize(data.images[indices], self.mean, self.std)
        return Batch(images, data.labels[indices], mask)
