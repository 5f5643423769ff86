"""What a strategy that takes two copies of each sample asks of a run."""

from hsee_jax.config.schema import Config
from hsee_jax.core.errors import UserError
from hsee_jax.data.pipeline import AUGMENTATIONS
from hsee_jax.federation.strategy import Strategy


def copies_of(config: Config, strategy: Strategy) -> int:
    """Return how many copies of a sample a strategy takes; refuse equal ones.

    Raises:
      UserError: the strategy compares copies, and nothing changes samples at random.
    """
    if strategy.copies > 1 and config.data.augment == "none":
        others = ", ".join(name for name in AUGMENTATIONS if name != "none")
        raise UserError(
            f"augment: none is not allowed with {config.strategy.strategy}, which "
            f"compares copies of a sample; allowed are {others}"
        )
    return strategy.copies


def check_all_labelled(config: Config) -> None:
    """Refuse a share of labels where clients have samples of their own.

    Raises:
      UserError: the configuration asks for it.
    """
    if config.data.labelled_share < 1:
        raise UserError(
            f"labelled_share: {config.data.labelled_share} is not allowed where "
            "clients have samples of their own; allowed is 1"
        )


def check_one_copy(config: Config, strategy: Strategy) -> None:
    """Refuse to compute the time of two copies, of which only some rows are sent.

    Raises:
      UserError: the strategy takes two copies of a sample.
    """
    if strategy.copies > 1:
        raise UserError(
            f"devices: not allowed with strategy {config.strategy.strategy}, whose "
            "steps take two copies of a sample and send some of the rows; allowed are "
            "the other strategies"
        )
