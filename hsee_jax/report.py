"""Tables of what was trained and of what it costs, for the terminal."""

from typing import Any

from rich.table import Table

from hsee_jax.model import LayerCost


def results_table(figures: dict[str, Any], *, title: str) -> Table:
    """A row for each client: its cut and the accuracy of its two answers.

    Args:
      figures: ``clients`` and means, as in ``summary.json``.
      title: above the table.
    """
    table = Table(title=title, show_footer=True)
    table.add_column("client", "mean", justify="right")
    table.add_column("cut", justify="right")
    for name in ("exit", "server"):
        mean = figures[f"mean_{name}_accuracy"]
        table.add_column(f"{name} accuracy", f"{mean:.4f}", justify="right")
    for client in figures["clients"]:
        table.add_row(
            str(client["id"]),
            str(client["cut"]),
            f"{client['exit_accuracy']:.4f}",
            f"{client['server_accuracy']:.4f}",
        )
    return table


def cost_table(costs: tuple[LayerCost, ...]) -> Table:
    """A row for each cut: its last layer's cost, and the client's share of the network.

    Args:
      costs: of L layers, L exit heads and the final head (see `layer_costs`).
    """
    count = len(costs) // 2
    layers, heads, final = costs[:count], costs[count:-1], costs[-1]
    total_parameters = sum(layer.parameters for layer in layers) + final.parameters
    total_flops = sum(layer.flops for layer in layers) + final.flops
    table = Table(
        title="per layer, and per cut after it (one sample, forward)",
        caption="A client holds the layers up to its cut, and an exit head; shares "
        "are of the network without exits.",
    )
    for name in (
        "cut",
        "layer",
        "parameters",
        "MFLOPs",
        "output bytes",
        "client parameters",
        "client MFLOPs",
        "share",
    ):
        table.add_column(name, justify="left" if name == "layer" else "right")
    for cut, (layer, head) in enumerate(zip(layers, heads, strict=True), start=1):
        parameters = sum(part.parameters for part in layers[:cut]) + head.parameters
        flops = sum(part.flops for part in layers[:cut]) + head.flops
        table.add_row(
            str(cut),
            layer.name,
            f"{layer.parameters:,}",
            f"{layer.flops / 1e6:,.3f}",
            f"{layer.output_bytes:,}",
            f"{parameters:,}",
            f"{flops / 1e6:,.3f}",
            f"{flops / total_flops:.1%}",
        )
    table.add_row("", final.name, f"{final.parameters:,}", f"{final.flops / 1e6:,.3f}")
    table.add_row("", "total", f"{total_parameters:,}", f"{total_flops / 1e6:,.3f}")
    return table
