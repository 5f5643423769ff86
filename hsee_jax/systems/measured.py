"""Measured seconds of the parts of one network on one device."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hsee_jax.core.errors import UserError


@dataclass(frozen=True)
class Measured:
    """Seconds of a batch, as ``hsee profile`` times them.

    The parts are those of `hsee_jax.systems.layer_costs`: L layers, L exit heads and
    the final head.
    """

    batch_size: int
    parts: tuple[str, ...]  # 2 L + 1 names
    forward_s: tuple[float, ...]  # 2 L + 1
    backward_s: tuple[float, ...]  # 2 L + 1, with the optimizer's update
    # Whole steps of a client and of a server at each cut, L each, or none. A whole step
    # is one program, so it wins over the sum of its parts.
    client_step_s: tuple[float, ...] = ()
    server_step_s: tuple[float, ...] = ()
    # FLOPs of the forward pass of a sample in each part, 2 L + 1, which tell networks
    # with equal parts apart; none in files of version 0.2.
    flops: tuple[float, ...] = ()

    def scaled(self, factor: float) -> "Measured":
        """Return the seconds of a device that takes ``factor`` times as long."""
        series: dict[str, Any] = {
            name: tuple(factor * second for second in getattr(self, name))
            for name in _SERIES
        }
        return replace(self, **series)


_SERIES = ("forward_s", "backward_s", "client_step_s", "server_step_s")


def read_measured(table: Any) -> Measured:
    """Read the table ``measured`` of an entry.

    Args:
      table: the fields of `Measured`, lists for tuples.

    Raises:
      UserError: a field is unknown or missing, or has a value that is not allowed.
    """
    if not isinstance(table, Mapping):
        raise UserError(f"measured: {table} is not allowed; allowed is a table")
    allowed = ("batch_size", "parts", *_SERIES, "flops")
    for name in table:
        if name not in allowed:
            raise UserError(
                f"measured.{name}: unknown; allowed are {', '.join(allowed)}"
            )
    batch_size: Any = table.get("batch_size")
    parts: Any = table.get("parts")
    if (
        not isinstance(batch_size, int)
        or isinstance(batch_size, bool)
        or batch_size < 1
    ):
        raise _refusal("batch_size", batch_size, "1 or more")
    if not _is_list(parts, str) or len(parts) % 2 == 0:
        raise _refusal("parts", parts, "an odd number of names: layers, exits, head")
    count = len(parts)
    cuts = count // 2
    sizes = (count,), (count,), (0, cuts), (0, cuts), (0, count)
    series = [
        _numbers(name, table.get(name, []), size)
        for name, size in zip((*_SERIES, "flops"), sizes, strict=True)
    ]
    return Measured(batch_size, tuple(parts), *series)


def _numbers(name: str, values: Any, sizes: Sequence[int]) -> tuple[float, ...]:
    if (
        not _is_list(values, int | float)
        or len(values) not in sizes
        or not all(0 <= value <= sys.float_info.max for value in values)
    ):
        count = " or ".join(map(str, sizes))
        raise _refusal(name, values, f"a list of {count} numbers, each 0 or more")
    return tuple(map(float, values))


def _is_list(values: Any, kind: Any) -> bool:
    return isinstance(values, list | tuple) and not any(
        isinstance(value, bool) or not isinstance(value, kind) for value in values
    )


def _refusal(name: str, value: Any, allowed: str) -> UserError:
    shown = str(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return UserError(f"measured.{name}: {shown} is not allowed; allowed is {allowed}")
