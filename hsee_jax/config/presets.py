"""Named configurations."""

from hsee_jax.config.schema import Config
from hsee_jax.config.values import override
from hsee_jax.core.errors import unknown

PRESETS: dict[str, Config] = {
    # Takes minutes on two CPU cores. A client has only 900 images, so its own layers
    # are averaged as well.
    "demo": override(
        Config(),
        num_clients=6,
        cuts=("2", "4", "6"),
        average="all_holders",
        width=8,
        rounds=12,
        batch_size=16,
        eval_every=6,
        checkpoint_every=6,
        validation_share=0.1,
    ),
    "cifar10": override(Config(), dataset="cifar10", augment="crop_flip"),
    "cifar100": override(Config(), dataset="cifar100", augment="crop_flip"),
    # The 5,000 images of 96x96 pixels give each client about 400.
    "stl10": override(Config(), dataset="stl10", augment="crop_flip", batch_size=64),
}


def preset(name: str) -> Config:
    """Return a named configuration.

    Raises:
      UserError: there is no preset of this name.
    """
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name]
