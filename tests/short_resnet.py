"""The first four layers of ResNet-18, which compile in half the time."""

import functools

from hsee_jax.nn import NETWORKS, Model, resnet18

# In a configuration: the network, and its module.
SHORT_RESNET = {"network": "short_resnet", "plugin": ("short_resnet",)}


@functools.wraps(resnet18)
def short_resnet(**options) -> Model:
    model = resnet18(**options)
    return model._replace(
        stages=model.stages[:4],
        gated_stages=model.gated_stages[:4],
        exit_heads=model.exit_heads[:4],
        layer_names=model.layer_names[:4],
    )


short_resnet.__name__, short_resnet.__module__ = "short_resnet", __name__
if "short_resnet" not in NETWORKS:  # this module may be imported under two names
    NETWORKS.register(short_resnet)
