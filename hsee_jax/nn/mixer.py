"""A layer that mixes the channels of several views of one event."""

import flax.linen as nn
import jax.numpy as jnp

from hsee_jax.core.types import Array, Key


class Mixer(nn.Module):
    """A dense layer over the channels of all views: ``[B, ..., V C] -> [B, ..., C]``.

    For images it is a 1x1 convolution. It starts as the mean over the V views.
    """

    num_views: int  # V
    features: int  # C, the channels of one view

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """Mix; ``mask`` and ``train`` change nothing."""
        del mask, train
        dense = nn.Dense(
            self.features, use_bias=False, dtype=x.dtype, kernel_init=self._mean
        )
        return dense(x)

    def _mean(self, key: Key, shape: tuple[int, int], dtype: jnp.dtype) -> Array:
        del key
        same = jnp.eye(self.features, dtype=dtype) / self.num_views
        return jnp.tile(same, (self.num_views, 1)).reshape(shape)
