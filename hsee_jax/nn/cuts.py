"""Cuts: the layer that a name stands for, and the cut of each client."""

import difflib
from collections.abc import Sequence

from hsee_jax.core.errors import UserError


def parse_cut(cut: str | int, layer_names: Sequence[str]) -> int:
    """Return the number of the layer that a cut names.

    Args:
      cut: a number ``1..L``, a layer's name, or the name of a group, such as
        ``"layer2"``, for a cut after the group's last block.
      layer_names: the names of the L layers.

    Raises:
      UserError: there is no such layer.
    """
    text = str(cut)
    if text.isdecimal() and len(text) < 10 and 1 <= int(text) <= len(layer_names):
        return int(text)  # of thousands of digits, Python reads no number
    for number in range(len(layer_names), 0, -1):
        name = layer_names[number - 1]
        if text and text in (name, name.rpartition(".")[0]):
            return number
    groups = [name.rpartition(".")[0] for name in layer_names if "." in name]
    near = difflib.get_close_matches(text, [*layer_names, *dict.fromkeys(groups)], 1)
    hint = f" (did you mean {near[0]}?)" if near and not text.isdecimal() else ""
    raise UserError(
        f"cuts: {text} is not a layer{hint}; allowed are 1..{len(layer_names)} or the "
        f"names {', '.join(layer_names)}"
    )


def deal_cuts(
    cuts: Sequence[str | int], num_clients: int, layer_names: Sequence[str]
) -> tuple[int, ...]:
    """Deal one cut to each client, the given cuts in turn: ``3 5 7 3 5 7 ...``.

    Raises:
      UserError: a layer is unknown, or there is no cut, or more cuts than clients.
    """
    if not 1 <= len(cuts) <= num_clients:
        raise UserError(
            f"cuts: {len(cuts)} given for {num_clients} clients; allowed are "
            f"1..{num_clients}"
        )
    numbers = [parse_cut(cut, layer_names) for cut in cuts]
    return tuple(numbers[i % len(numbers)] for i in range(num_clients))
