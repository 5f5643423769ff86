"""Whether the data that are found now are those of a run in a folder."""

import json
from collections.abc import Sequence
from pathlib import Path

from hsee_jax.core.errors import DAMAGE, UserError
from hsee_jax.data.info import DatasetInfo, difference
from hsee_jax.data.partition import Share
from hsee_jax.runs.folder import read_info


def check_info(folder: Path, found: DatasetInfo, field: str = "data_dir") -> None:
    """Refuse data that are not a run's.

    Args:
      folder: of the run.
      found: what is known of the data.
      field: the option that the data were given with, for errors.

    Raises:
      UserError: the data are not those of the run.
    """
    try:
        stored = read_info(folder)
    except UserError:
        return  # it is lost, and `train` writes it anew
    name = difference(stored, found)
    if name is not None:
        raise UserError(
            f"{field}: the data found now, of {name} {getattr(found, name)}, are not "
            f"those of {folder}; allowed is {getattr(stored, name)}"
        )


def check_partition(
    folder: Path, shares: Sequence[Share], *, test_only: bool = False
) -> None:
    """Refuse training samples that are not a run's, judged by their labels.

    The same indices name other images if a dataset is stored in another form. Cuts do
    not count: a run may have changed them.

    Args:
      folder: of the run.
      shares: of its clients now.
      test_only: whether the form matters for the test samples alone; where clients
        have training samples of their own, nothing tells it.

    Raises:
      UserError: the samples are not those of the run.
    """
    try:
        stored = json.loads((folder / "partition.json").read_text(encoding="utf-8"))
    except (OSError, *DAMAGE):
        return  # it is lost, and `train` writes it anew
    if not isinstance(stored, list) or not all(isinstance(o, dict) for o in stored):
        raise UserError(
            f"run: {folder / 'partition.json'} is damaged; allowed are shares, or no "
            "such file"
        )
    found = [share._asdict() | {"cut": 0} for share in shares]
    same = [one | {"cut": 0} for one in stored] == found
    own = [str(one.get("samples")) for one in stored if one.get("indices") == []]
    if own and test_only:
        return
    if own and not same:
        raise UserError(
            f"samples: the clients of {folder} have samples of their own, which are "
            f"not here; `hsee serve --resume` needs --samples {' '.join(own)}"
        )
    if not same:
        raise UserError(
            f"data_dir: the training samples found now are not those of {folder}; "
            "allowed is the same dataset in the same form, be it prepared by "
            "tensorflow-datasets, an archive or npz"
        )
