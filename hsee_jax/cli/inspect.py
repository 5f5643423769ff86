"""The commands ``hsee eval`` and ``hsee info``: scores of a run, costs of a network."""

from collections.abc import Sequence

from hsee_jax.cli.arguments import (
    add_figures,
    config_parser,
    parse_run,
    print_figures,
    run_parser,
)
from hsee_jax.cli.flags import config_from, use_cache
from hsee_jax.cli.terminal import cost_table, show
from hsee_jax.nn.model import layer_inputs
from hsee_jax.parallel.processes import check_devices
from hsee_jax.runs.build import build_federation, build_strategy
from hsee_jax.runs.data import build_info
from hsee_jax.runs.reopen import evaluate as evaluate_run
from hsee_jax.systems.costs import layer_costs
from hsee_jax.systems.traffic import logits_down, training_bytes


def evaluate(words: Sequence[str]) -> None:
    """Evaluate a checkpoint of a run, and print its figures."""
    parser = run_parser("eval")
    add_figures(parser, file="summary.json")
    given = parse_run(parser, words)
    rounds, scores = evaluate_run(given.run, given.checkpoint, data_dir=given.data_dir)
    print_figures(rounds, scores, given.run, as_json=given.json)


def info(words: Sequence[str]) -> None:
    """Print a row for each layer and cut of a configuration's network."""
    given = vars(config_parser("info", words).parse(words))
    config = config_from(given)
    use_cache(given)
    check_devices()
    # Count the FLOPs of the plain convolution, unless a flag asks for another form.
    federation = build_federation(
        config, build_info(config.data), plain="conv" not in given
    )
    strategy = build_strategy(config, federation)
    logits = logits_down(federation.model, strategy)
    crossing = [
        training_bytes(features, federation.codec, strategy.boundary, logits)
        for features in layer_inputs(federation.model)[1:]
    ]
    show(cost_table(layer_costs(federation.model, federation.exits), crossing))
