"""The command ``hsee serve``."""

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsee_jax.cli.arguments import add_run, config_parser, print_figures
from hsee_jax.cli.flags import Parser, config_from, use_cache
from hsee_jax.cli.signals import StopSignals
from hsee_jax.cli.terminal import ProgressBar, show_log
from hsee_jax.core.errors import Stopped, UserError, no_package
from hsee_jax.core.options import Option, positive
from hsee_jax.core.paths import expand_home
from hsee_jax.parallel.processes import check_devices
from hsee_jax.runs.folder import new_folder
from hsee_jax.runs.material import shares

if TYPE_CHECKING:
    from hsee_jax.config import Config
    from hsee_jax.deployment.local import LocalDevices
    from hsee_jax.deployment.reception import Doors
    from hsee_jax.deployment.service import Service

_LOCAL = "127.0.0.1:0"
# Flags of how the images of the run are dealt to its clients.
_DEALING = ("partition", "partition_seed", "validation_share", "max_train_samples")
_COMMON = ("resume", "overwrite", "samples")  # of the command and of `serve`
_MOST_SAMPLES = 100_000_000  # the server keeps a number for each


def serve(words: Sequence[str]) -> int | None:
    """Serve a run to devices; return the exit status of a stop by a signal."""
    given = vars(_parser(words).parse(words))
    try:
        import grpc  # noqa: F401
    except ImportError as error:
        raise no_package("serve", "grpc") from error
    out, options = given.pop("out", None), _options(given)
    if options["resume"] and out is None:
        raise UserError("out: missing; --resume needs the folder of the run")
    config = config_from(given, stored=out if options["resume"] else None)
    use_cache(given)
    check_devices()
    show_log()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_folder(out))
        signals = stack.enter_context(StopSignals())
        try:
            summary = _run(config, folder, given, options, signals)
        except Stopped as stopped:
            line = f"hsee: {stopped}; --resume --out {folder} continues it"
            print(line, file=sys.stderr)
            return 128 + signals.received
    print_figures(summary.rounds, summary.scores, folder, as_json=False)
    return None


def _run(
    config: "Config",
    folder: Path,
    given: dict[str, Any],
    options: dict[str, Any],
    signals: StopSignals,
) -> Any:
    """Serve the run, and start its devices on this machine with ``--local``."""
    from hsee_jax.deployment.local import LocalDevices
    from hsee_jax.deployment.reception import serve as serve_run

    devices = LocalDevices(folder) if "local" in given else None

    def stop() -> bool:
        if devices is not None:
            devices.check()
        return signals()

    return serve_run(
        config,
        folder,
        _doors(config, given, devices),
        callbacks=[ProgressBar(config.run.rounds)],
        stop=stop,
        **options,
    )


def _doors(
    config: "Config", given: dict[str, Any], devices: "LocalDevices | None"
) -> "Doors":
    """Return a function that opens the port and, with ``--local``, starts the devices.

    Raises:
      UserError: the address is not allowed or not free, or the keys are not valid.
    """
    from hsee_jax.deployment.rpc import check_port, open_port

    keys = given.get("keys")
    keys = None if keys is None else expand_home(keys, "keys")
    check_port(given["listen"], keys)  # before a run in the folder is replaced

    @contextlib.contextmanager
    def doors(service: "Service") -> Iterator[None]:
        with open_port(service, given["listen"], keys) as port:
            if devices is None:
                yield
                return
            words = ["--plugin", *config.run.plugin] if config.run.plugin else []
            if "compilation_cache" in given:
                words += ["--compilation-cache", given["compilation_cache"]]
            with devices.started(port, shares(config), words):
                yield

    return doors


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """Return the server's options; add to ``given`` what ``--local`` implies.

    Raises:
      UserError: a flag is missing, or is not allowed.
    """
    from hsee_jax.data import PARTITIONS
    from hsee_jax.deployment.types import FEATURE_BOUND, PATIENT

    _refuse_beside(given, "local", ("listen", "keys", "samples"))
    _refuse_beside(given, "samples", (*_DEALING, *PARTITIONS.options()))
    if "local" in given:
        count = given["local"]
        if given.get("num_clients", count) != count:
            raise UserError(
                f"num_clients: {given['num_clients']} is not allowed with --local "
                f"{count}"
            )
        given |= {"listen": _LOCAL, "num_clients": count}
    if "listen" not in given:
        raise UserError(
            "listen: missing; allowed is HOST:PORT, or --local N for N devices here"
        )
    if sum(given.get("samples", ())) > _MOST_SAMPLES:
        raise UserError(
            f"samples: {sum(given['samples'])} in all are not allowed; allowed are at "
            f"most {_MOST_SAMPLES}"
        )
    options = {name: given.pop(name) for name in _COMMON if name in given}
    options.setdefault("resume", False)
    bound = Option("feature_bound", float, FEATURE_BOUND, rules=(positive,))
    limits = ("min_clients", "max_refusals")
    patience = {name: given[name] for name in limits if name in given}
    return options | {
        "bound": bound.checked(given.get("feature_bound", bound.default)),
        "patience": PATIENT._replace(**patience),
    }


def _refuse_beside(given: dict[str, Any], flag: str, names: Iterable[str]) -> None:
    """Refuse flags that would have no effect beside another."""
    for name in names:
        if flag in given and name in given:
            raise UserError(f"{name}: is not allowed together with --{flag}")


def _folder(out: Path | None) -> contextlib.AbstractContextManager[Path]:
    if out is not None:
        return contextlib.nullcontext(out)
    return new_folder(Path("runs"), f"serve-{time.strftime('%Y%m%d-%H%M%S')}")


def _parser(words: Sequence[str]) -> Parser:
    parser = config_parser("serve", words)
    add_run(
        parser,
        name="serve-DATE",
        resume="continue the run in --out after the last round that ended",
    )
    _add_devices(parser)
    return parser


def _add_devices(parser: Parser) -> None:
    group = parser.add_argument_group("devices")
    group.add_argument(
        "--listen",
        metavar="HOST:PORT",
        help="address at which devices call; without --keys an address of this machine",
    )
    group.add_argument(
        "--keys", type=Path, metavar="FOLDER", help="keys/server of hsee enroll"
    )
    group.add_argument(
        "--local",
        type=int,
        metavar="N",
        help="start N devices on this machine; sets --num-clients",
    )
    group.add_argument(
        "--samples",
        type=int,
        nargs="+",
        metavar="INT",
        help="how many samples each client has, if they are its own; without it, "
        "devices have the shares that --partition deals them",
    )
    group.add_argument(
        "--min-clients",
        type=int,
        metavar="INT",
        help="clients that a round waits for, whatever the deadline (1)",
    )
    group.add_argument(
        "--max-refusals",
        type=int,
        metavar="INT",
        help="refused messages that a client may send; one more leaves it out (3)",
    )
    group.add_argument(
        "--feature-bound",
        type=float,
        metavar="FLOAT",
        help="largest size of a feature; a batch with a larger one is refused (10000)",
    )
