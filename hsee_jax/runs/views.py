"""What a strategy with two views of each sample asks of the rest of a run."""

from hsee_jax.config.schema import Config
from hsee_jax.core.errors import UserError
from hsee_jax.data.pipeline import AUGMENTATIONS
from hsee_jax.federation.strategy import Strategy


def check_views_differ(config: Config, strategy: Strategy) -> None:
    """Refuse views that would be equal.

    Raises:
      UserError: the strategy compares views, and nothing changes samples at random.
    """
    if strategy.views > 1 and config.data.augment == "none":
        others = ", ".join(name for name in AUGMENTATIONS if name != "none")
        raise UserError(
            f"augment: none is not allowed with {config.strategy.strategy}, which "
            f"compares views of a sample; allowed are {others}"
        )


def check_one_view(config: Config, strategy: Strategy) -> None:
    """Refuse to reckon the time of two views, of which only some rows are sent.

    Raises:
      UserError: the strategy takes two views of a sample.
    """
    if strategy.views > 1:
        raise UserError(
            f"devices: not allowed with strategy {config.strategy.strategy}, whose "
            "steps take two views of a sample and send a part of the rows; allowed are "
            "the other strategies"
        )
