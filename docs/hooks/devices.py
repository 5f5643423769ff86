"""Make the page of the catalogue of devices and of the fields of a file of devices."""

import math
from collections.abc import Mapping
from typing import Any

from hsee_jax.systems.devices import catalogue, entry_fields, links

_INTRODUCTION = """\
# Devices and links

`hsee plan --devices FILE` and `hsee train --cuts auto --devices FILE` read a file of
devices, see [plan the cuts](../how-to/plan-cuts.md). An entry starts from a device and
a link of this catalogue, or gives all numbers itself. Most speeds are derived, not
measured: the column *source* says which. `hsee profile` measures a machine of your own.
"""
_CSV = """\
## Forms of a file

In TOML, a list of tables `devices`, and a table `server` if it is not `gpu-server`:

```toml
devices = [{device = "raspberry-pi-4", link = "wifi", count = 40}]
server = {device = "gpu-server"}
```

In CSV, a header of the same fields, and a row for each entry:

```text
device,link,count
raspberry-pi-4,wifi,40
```
"""


def devices() -> str:
    """Return the page."""
    parts = [
        _INTRODUCTION,
        _CSV,
        "## Fields\n",
        _table(
            ("field", "meaning"),
            [(f"`{n}`", option.help) for n, option in entry_fields().items()],
        ),
        "## Devices\n",
        _table(
            ("device", "forward GFLOP/s", "memory GB", "up MB/s", "busy W", "source"),
            [
                (
                    f"`{name}`",
                    _number(device.forward_flops_per_s / 1e9),
                    _number(device.memory_bytes / 1e9),
                    _number(device.up_bytes_per_s / 1e6),
                    _number(device.busy_watts),
                    device.source,
                )
                for name, device in catalogue().items()
            ],
        ),
        "## Links\n",
        _table(("link", "up MB/s", "down MB/s", "source"), map(_link, links().items())),
    ]
    return "\n".join(parts)


def _link(entry: tuple[str, Mapping[str, Any]]) -> tuple[str, ...]:
    name, fields = entry
    speeds = (fields[f"{way}_bytes_per_s"] / 1e6 for way in ("up", "down"))
    return (f"`{name}`", *map(_number, speeds), str(fields["source"]))


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "not known"


def _table(columns: tuple[str, ...], rows: Any) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
