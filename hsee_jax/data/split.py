"""Shuffle samples that lie class by class, and draw a test set if there is none."""

from typing import Annotated, Any

import numpy as np
import numpy.typing as npt

from hsee_jax.core.errors import UserError
from hsee_jax.core.options import Rule, at_least

TestShare = Annotated[
    float | None,
    "share of each class to set apart as the test set, 0.2 by default; only for data "
    "without a test set of their own",
    Rule("more than 0, less than 1", lambda value: 0 < value < 1),
]
SplitSeed = Annotated[
    int, "seed of the order of the samples and of their test set", at_least(0)
]
# Names of folders and files that hold a split; the first test set found is read.
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "valid", "validation", "dev")
Rows = npt.NDArray[np.intp]

_SHARE = 0.2


def split_rows(
    labels: npt.NDArray[Any],
    num_test: int,
    share: float | None,
    *,
    seed: int,
    place: str,
) -> tuple[Rows, Rows, str]:
    """Choose and order the rows of both splits.

    Args:
      labels: ``[M]``, of the training samples.
      num_test: the number of test samples that are there already, rows M and later; 0
        sets some of the training samples apart.
      share: see `TestShare`.
      seed: the seed of the order and of the test set.
      place: where the test samples are.

    Returns:
      The training and the test rows in random order, and a clause on the test set.

    Raises:
      UserError: there is a test set, and a share was given too; or there is none, and
        no class has 2 samples.
    """
    if num_test == 0:
        share = _SHARE if share is None else share
        if len(np.unique(labels)) == len(labels):
            raise UserError(
                "data_dir: no class has 2 samples, so that no test set can be set "
                "apart; allowed are 2 or more of a class, or a test set of its own"
            )
        note = f"{share:.0%} of each class set apart as the test set (seed {seed})"
        return *set_apart(labels, share, seed=seed), note
    if share is not None:
        raise UserError(
            f"test_share: {share} has no effect, as {place} is the test set; allowed "
            "is data without a test set"
        )
    rng = np.random.default_rng(seed)
    test = rng.permutation(num_test) + len(labels)
    return rng.permutation(len(labels)), test, f"test set from {place}"


def set_apart(
    labels: npt.NDArray[Any], share: float, *, seed: int
) -> tuple[Rows, Rows]:
    """Draw a test set with the same share of each class, in a random order.

    Args:
      labels: ``[M]``, of any type.
      share: more than 0, less than 1.
      seed: the seed of the draw.

    Returns:
      The indices of the training and of the test samples. A class of two samples or
      more has at least one of each; a single sample is for training.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    is_test = np.zeros(len(labels), np.bool_)
    for value in np.unique(labels):
        own = order[labels[order] == value]
        count = min(max(1, round(share * len(own))), len(own) - 1)
        is_test[own[:count]] = True
    return order[~is_test[order]], order[is_test[order]]
