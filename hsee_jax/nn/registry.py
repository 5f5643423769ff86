"""The networks that can be trained by name."""

from hsee_jax.core.registry import Registry
from hsee_jax.nn.model import Model

# Factories take ``num_classes`` and ``input_shape``, ``(H, W, C)`` for images.
NETWORKS: Registry[Model] = Registry("network")
register = NETWORKS.register
