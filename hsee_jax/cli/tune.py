"""The command ``hsee tune``: find the fastest forms of convolutions on this machine."""

from collections.abc import Sequence

import jax

from hsee_jax.cli.arguments import config_parser
from hsee_jax.cli.flags import Parser, config_from, count_of, use_cache
from hsee_jax.cli.terminal import show, show_log, text_table
from hsee_jax.core.errors import UserError
from hsee_jax.engine.round import client_axis
from hsee_jax.federation.accumulation import check_micro_batches
from hsee_jax.nn.convolution_choice import Choice, auto_form
from hsee_jax.nn.model import Model
from hsee_jax.nn.registry import NETWORKS
from hsee_jax.parallel.processes import check_devices
from hsee_jax.runs.build import build_federation
from hsee_jax.runs.data import build_info
from hsee_jax.runs.forms import write_forms
from hsee_jax.runs.model import views_in
from hsee_jax.systems.tuning import Alone, Tuning, tune


def tune_forms(words: Sequence[str]) -> None:
    """Time the forms in a step of a configuration, and keep the fastest."""
    given = vars(_parser(words).parse(words))
    repeats = count_of(given, "repeats", 5)
    config = config_from(given)
    if "conv" not in config.model.active():
        raise UserError(f"network: {config.model.network} has no convolutions to tune")
    batch_size, parts = config.run.batch_size, config.run.micro_batches
    check_micro_batches(parts, batch_size, "detached")
    use_cache(given)
    check_devices()
    show_log()
    info = build_info(config.data)
    federation = build_federation(config, info)
    backend = jax.default_backend()
    stacked = client_axis(config.run.client_axis, backend) == "vmap"
    largest = max(len(group.ids) for group in federation.groups)

    def make_model(conv: str | Choice) -> Model:
        return NETWORKS.make(
            config.model.network,
            options={**config.model.options, "conv": conv},
            num_classes=info.num_classes,
            input_shape=views_in(config, info).shape,
        )

    alone, tuning = tune(
        make_model,
        federation.optimizer,
        batch_size // parts,
        other=auto_form(backend),
        stack=largest if stacked else 0,
        repeats=repeats,
    )
    _print(alone, tuning)
    print(write_forms(tuning.forms))


def _parser(words: Sequence[str]) -> Parser:
    parser = config_parser("tune", words)
    parser.add_argument(
        "--repeats", type=int, help="timed calls of each program; medians count (5)"
    )
    return parser


def _print(alone: Alone, tuning: Tuning) -> None:
    rows = [
        (
            str(place),
            form,
            _ms(alone[place][form]),
            _ms(alone[place]["grouped"]),
        )
        for place, form in tuning.forms.items()
    ]
    head = ("pass", "form", "ms alone", "native")
    show(text_table("The form of each pass", head, rows))
    steps = [
        ("native convolutions", _ms(tuning.native_s)),
        ("auto without measurements", _ms(tuning.default_s)),
        ("auto from now on", _ms(tuning.tuned_s)),
    ]
    show(text_table("A step of the whole network", ("forms", "ms"), steps))


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f}"
