"""Make batches of network inputs from stored samples, inside the compiled step."""

from typing import Annotated, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp

from hsee_jax.core.errors import UserError
from hsee_jax.core.options import positive
from hsee_jax.core.registry import Registry
from hsee_jax.core.types import Array, Batch, Dataset, Key
from hsee_jax.data.views import ViewFn

_PAD = 4  # pixels, the usual margin for 32x32 images


class AugmentFn(Protocol):
    """Changes training samples at random."""

    def __call__(self, key: Key, images: Array) -> Array:
        """Change each sample independently of the others.

        Args:
          key: a typed key.
          images: ``float32 [B, ...]``, normalised, so that 0 is the mean.

        Returns:
          Samples of the same shape and dtype.

        Raises:
          UserError: the function does not take samples of this shape.
        """


# Factories take only their options.
AUGMENTATIONS: Registry[AugmentFn] = Registry("augment", pure=True)
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


@AUGMENTATIONS.register(summary="normal noise, on samples of any shape")
def noise(
    *,
    noise_std: Annotated[
        float, "standard deviation of the noise, relative to that of the data", positive
    ] = 0.3,
) -> AugmentFn:
    """Add normal noise to each number of a sample."""
    return lambda key, images: (
        images + noise_std * jax.random.normal(key, images.shape, images.dtype)
    )


def _crop(key: Key, images: Array, *, flip: bool) -> Array:
    if images.ndim != 4:
        name = "crop_flip" if flip else "crop"
        raise UserError(
            f"augment: {name} is not allowed for samples of {list(images.shape[1:])}; "
            "it takes images [H, W, C]; allowed are none and noise"
        )
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
    """Centre and scale samples ``[B, ...]`` to ``float32 [B, ...]``.

    Args:
      images: ``uint8 [B, H, W, C]``, which is scaled to 0..1 first, or ``float32
        [B, ...]``, which is taken as it is.
      mean: of each entry of the last axis.
      std: of each entry of the last axis.

    Raises:
      ValueError: there are more or fewer means or deviations than entries.
    """
    if not len(mean) == len(std) == images.shape[-1]:
        raise ValueError(
            f"mean, std: {len(mean)} and {len(std)} numbers are not allowed for a last "
            f"axis of {images.shape[-1]}"
        )
    if images.dtype == jnp.uint8:
        images = images.astype(jnp.float32) / 255.0
    chex.assert_type(images, jnp.float32)
    shape = (1,) * (images.ndim - 1) + (-1,)
    scale = jnp.asarray(std, jnp.float32).reshape(shape)
    shift = jnp.asarray(mean, jnp.float32).reshape(shape)
    return (images - shift) / scale


class InputPipeline(NamedTuple):
    """Makes the batch of a step from stored samples."""

    mean: tuple[float, ...]  # of each entry of the last axis, see `normalize`
    std: tuple[float, ...]
    augment: AugmentFn = none()
    view: ViewFn | None = None  # of each client; None for whole samples
    copies: int = 1  # of each training sample; each is augmented by itself

    def check(self, input_shape: tuple[int, ...]) -> None:
        """Refuse an augmentation that does not take views of this shape.

        Raises:
          UserError: the augmentation raises it, or changes the shape or the type.
        """
        rows = jax.ShapeDtypeStruct((2, *input_shape), jnp.float32)
        found = jax.eval_shape(self.augment, jax.random.key(0), rows)
        if (found.shape, found.dtype) != (rows.shape, rows.dtype):
            raise UserError(
                f"augment: turns float32 {list(rows.shape)} into {found.dtype} "
                f"{list(found.shape)}; allowed is the same shape and type"
            )

    def training(
        self, key: Key, data: Dataset, indices: Array, mask: Array, client: Array
    ) -> Batch:
        """Do what `evaluation` does, and augment the samples.

        With one copy the inputs are ``[B, ...]``. With more they are
        ``[B, copies, ...]``, and the batch has a key for random draws in the layers.
        """
        batch = self.evaluation(data, indices, mask, client)
        if self.copies == 1:
            return batch._replace(inputs=self.augment(key, batch.inputs))
        keys = [jax.random.fold_in(key, copy) for copy in range(self.copies)]
        copies = [self.augment(own, batch.inputs) for own in keys]
        own = jax.random.fold_in(key, self.copies)
        return batch._replace(inputs=jnp.stack(copies, axis=1), key=own)

    def evaluation(
        self, data: Dataset, indices: Array, mask: Array, client: Array
    ) -> Batch:
        """Return a client's view of the samples at ``indices``, normalised.

        Args:
          data: the samples.
          indices: of the batch, ``int32 [B]``.
          mask: ``bool [B]``, false on padding.
          client: the id of the client, ``int32 []``, for its view.
        """
        images = data.images[indices]
        if self.view is not None:
            images = self.view(images, client)
        images = normalize(images, self.mean, self.std)
        return Batch(images, data.labels[indices], mask)
