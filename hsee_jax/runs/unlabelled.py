"""What a strategy that takes two copies of each sample asks of a run."""

from hsee_jax.config.schema import Config
from hsee_jax.core.errors import UserError
from hsee_jax.data.pipeline import AUGMENTATIONS
from hsee_jax.federation.strategy import Strategy


def check_copies_differ(config: Config, strategy: Strategy) -> None:
    """Refuse copies that would be equal.

    Raises:
      UserError: the strategy compares copies, and nothing changes samples at random.
    """
    if strategy.copies > 1 and config.data.augment == "none":
        others = ", ".join(name for name in AUGMENTATIONS if name != "none")
        raise UserError(
            f"augment: none is not allowed with {config.strategy.strategy}, which "
            f"compares copies of a sample; allowed are {others}"
        )


def check_one_copy(config: Config, strategy: Strategy) -> None:
    """Refuse to reckon the time of two copies, of which only some rows are sent.

    Raises:
      UserError: the strategy takes two copies of a sample.
    """
    if strategy.copies > 1:
        raise UserError(
            f"devices: not allowed with strategy {config.strategy.strategy}, whose "
            "steps take two copies of a sample and send some of the rows; allowed are "
            "the other strategies"
        )
