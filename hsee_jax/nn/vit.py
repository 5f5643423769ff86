"""The layers of a vision transformer, ViT (Dosovitskiy et al., ICLR 2021).

They follow torchvision and timm: pre-norm blocks, a class token, learned positions, and
GELU. There is no dropout, and biases start at 0. The defaults are ViT-tiny (Touvron et
al., ICML 2021: 192 values, 12 blocks, 3 heads), with patches of 4 pixels for images of
up to 64 pixels [ours].

The first layer holds the patches and a block: without a block the class token would not
have seen the image, and an exit would have nothing to answer from.
"""

from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp

from hsee_jax.core.errors import UserError
from hsee_jax.core.options import at_least
from hsee_jax.core.types import Array
from hsee_jax.nn.layers import DtypeName
from hsee_jax.nn.mlp import Depth, Hidden
from hsee_jax.nn.model import Model, cached_stage
from hsee_jax.nn.registry import NETWORKS, images_only

_EPSILON = 1e-6  # of LayerNorm
_xavier = nn.initializers.xavier_uniform()


class Block(nn.Module):
    """Attention and a perceptron, each behind a LayerNorm: ``[B, P, F] -> [B, P, F]``.

    Rows do not mix, so the mask is not needed.
    """

    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """Run the block."""
        del mask, train
        width = x.shape[-1]
        y = nn.LayerNorm(_EPSILON, self.dtype, name="norm1")(x)
        x = x + self._attention(y)
        y = nn.LayerNorm(_EPSILON, self.dtype, name="norm2")(x)
        y = nn.gelu(self._dense(4 * width, "up")(y), approximate=False)
        return x + self._dense(width, "down")(y)

    def _attention(self, x: Array) -> Array:
        *places, width = x.shape
        split = (*places, 3, self.heads, width // self.heads)
        parts = self._dense(3 * width, "qkv")(x).reshape(split)
        query, key, value = jnp.moveaxis(parts, 2, 0)
        y = jax.nn.dot_product_attention(query, key, value)
        return self._dense(width, "out")(y.reshape(x.shape))

    def _dense(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(features, dtype=self.dtype, kernel_init=_xavier, name=name)


class Patches(nn.Module):
    """Patches and a class token with their positions: ``[B, H, W, C] -> [B, P, F]``.

    P is 1 + H W / size^2; the class token comes first.
    """

    features: int
    size: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Cut the images, and add the token and the positions."""
        window = (self.size, self.size)
        conv = nn.Conv(
            self.features,
            window,
            strides=window,
            padding="VALID",
            dtype=self.dtype,
            kernel_init=nn.initializers.lecun_normal(),
            name="conv",
        )
        tokens = conv(x).reshape(x.shape[0], -1, self.features)
        first = self.param("token", nn.initializers.zeros, (1, 1, self.features))
        shape = (1, tokens.shape[1] + 1, self.features)
        places = self.param("positions", nn.initializers.normal(0.02), shape)
        first = jnp.broadcast_to(first, (x.shape[0], 1, self.features))
        x = jnp.concatenate([first.astype(self.dtype), tokens], axis=1)
        return x + places.astype(self.dtype)


class FirstBlock(nn.Module):
    """`Patches` and a `Block`: ``[B, H, W, C] -> [B, P, F]``."""

    features: int
    size: int
    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """Run the layer."""
        x = Patches(self.features, self.size, self.dtype, name="patches")(x)
        return Block(self.heads, self.dtype, name="block")(x, mask, train=train)


class TokenHead(nn.Module):
    """LayerNorm and a linear layer on the class token: ``[B, P, F] -> [B, K]``.

    The logits are float32 and start at 0; K is ``classes``.
    """

    classes: int

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """Run the head."""
        del mask, train
        token = nn.LayerNorm(_EPSILON, name="norm")(x[:, 0].astype(jnp.float32))
        zeros = nn.initializers.zeros
        return nn.Dense(self.classes, kernel_init=zeros, name="linear")(token)


@NETWORKS.register(summary="a vision transformer; the defaults are those of ViT-tiny")
@images_only
def vit(
    *,
    num_classes: int,
    input_shape: tuple[int, ...],
    hidden: Hidden = 192,
    depth: Depth = 12,
    heads: Annotated[int, "heads of the attention", at_least(1)] = 3,
    patch_size: Annotated[
        int | None,
        "pixels on a side of a patch; by default 4 up to 64 pixels, 16 above [ours]",
        at_least(1),
    ] = None,
    dtype: DtypeName = "float32",
) -> Model:
    """Build a vision transformer with an exit after each block.

    Args:
      num_classes: K.
      input_shape: ``(H, W, C)``; the patch size divides H and W.
      hidden: the values of a token, a multiple of ``heads``.
      depth: the number of blocks, which are named ``block1``, ``block2`` and so on.
      heads: the number of heads of the attention.
      patch_size: pixels on a side of a patch; None for 4 up to 64 pixels, 16 above.
      dtype: of the computation; parameters and logits stay float32.

    Returns:
      The model. With the defaults, 10 classes and 32x32x3 images its layers and final
      head have 5,362,762 parameters.

    Raises:
      UserError: the patch size does not divide H and W, ``heads`` does not divide
        ``hidden``, or the samples are not images.
    """
    height, width, _ = input_shape
    size = patch_size or (4 if max(height, width) <= 64 else 16)
    if height % size or width % size:
        raise UserError(
            f"patch_size: {size} is not allowed for images of {height}x{width}; "
            "allowed is what divides both"
        )
    if hidden % heads:
        raise UserError(
            f"heads: {heads} is not allowed for {hidden} values of a token; allowed is "
            "what divides them (see hidden)"
        )
    compute = jnp.dtype(dtype)
    block = cached_stage(Block(heads, compute))
    head = cached_stage(TokenHead(num_classes))
    first = cached_stage(FirstBlock(hidden, size, heads, compute))
    return Model(
        stages=(first, *(block,) * (depth - 1)),
        exit_heads=(head,) * depth,
        final_head=head,
        layer_names=tuple(f"block{number + 1}" for number in range(depth)),
        input_shape=tuple(input_shape),
        weight_names=(_torchvision_names, _timm_names),
    )


def _torchvision_names(layer: str) -> dict[str, str]:
    """Return the modules of a layer as torchvision names them."""
    if layer == "head":
        return {"norm": "encoder.ln", "linear": "heads.head"}
    number = int(layer.removeprefix("block")) - 1
    place = f"encoder.layers.encoder_layer_{number}"
    names = {
        "norm1": f"{place}.ln_1",
        "qkv/kernel": f"{place}.self_attention.in_proj_weight",
        "qkv/bias": f"{place}.self_attention.in_proj_bias",
        "out": f"{place}.self_attention.out_proj",
        "norm2": f"{place}.ln_2",
        "up": f"{place}.mlp.0",
        "down": f"{place}.mlp.3",
    }
    first = {
        "patches/conv": "conv_proj",
        "patches/token": "class_token",
        "patches/positions": "encoder.pos_embedding",
    }
    return names | {f"block/{name}": place for name, place in names.items()} | first


def _timm_names(layer: str) -> dict[str, str]:
    """Return the modules of a layer as timm names them."""
    if layer == "head":
        return {"norm": "norm", "linear": "head"}
    place = f"blocks.{int(layer.removeprefix('block')) - 1}"
    names = {
        "norm1": f"{place}.norm1",
        "qkv": f"{place}.attn.qkv",
        "out": f"{place}.attn.proj",
        "norm2": f"{place}.norm2",
        "up": f"{place}.mlp.fc1",
        "down": f"{place}.mlp.fc2",
    }
    first = {
        "patches/conv": "patch_embed.proj",
        "patches/token": "cls_token",
        "patches/positions": "pos_embed",
    }
    return names | {f"block/{name}": place for name, place in names.items()} | first
