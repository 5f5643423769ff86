"""``hsee eval`` and ``hsee info``: what a run scores, what a network costs."""

from collections.abc import Sequence

from hsee_jax import runs
from hsee_jax.cli.arguments import (
    add_figures,
    config_parser,
    parse_run,
    print_figures,
    run_parser,
)
from hsee_jax.cli.terminal import cost_table, show, show_log
from hsee_jax.data import dataset_info
from hsee_jax.experiment import build_federation, build_strategy
from hsee_jax.flags import config_from, use_cache
from hsee_jax.model import layer_costs, layer_inputs
from hsee_jax.processes import check_devices
from hsee_jax.traffic import sample_bytes


def evaluate(words: Sequence[str]) -> None:
    """Print the figures of a run's checkpoint."""
    parser = run_parser("eval")
    add_figures(parser, file="summary.json")
    given = parse_run(parser, words)
    show_log()
    figures = runs.evaluate(given.run, given.checkpoint, data_dir=given.data_dir)
    print_figures(figures, given.run, as_json=given.json)


def info(words: Sequence[str]) -> None:
    """Print a row for each layer and cut of a configuration's network."""
    # FLOPs of the convolution itself, unless a flag asks for one of its other forms.
    given = {"conv": "grouped"} | vars(config_parser("info").parse(words))
    config = config_from(given)
    use_cache(given)
    check_devices()
    federation = build_federation(config, dataset_info(config.data))
    boundary = build_strategy(config, federation).boundary
    crossing = [
        sample_bytes(features, federation.link, boundary)
        for features in layer_inputs(federation.model)[1:]
    ]
    show(cost_table(layer_costs(federation.model), crossing))
