"""The command line: ``hsee train | eval | info``.

Every field of `Config` is a flag. The parser is argparse over those fields; errors are
one line on standard error and exit status 2, divergence is one line and status 3.
"""

import argparse
import difflib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax

from hsee_jax.base import DivergenceError, UserError
from hsee_jax.config import (
    PRESETS,
    Config,
    options,
    override,
    preset,
    takes_many,
    unknown,
    value_type,
)

_SEEDS = ("model_seed", "data_seed", "partition_seed")


class _Parser(argparse.ArgumentParser):
    """Raises `UserError` instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Like ``parse_args``, but names the nearest flag to an unknown one."""
        values, rest = self.parse_known_args(arguments)
        if rest:
            flags = tuple(flag for flag in self._option_string_actions if len(flag) > 2)
            flag = rest[0].partition("=")[0]
            near = difflib.get_close_matches(flag, flags, 1)
            if flag.startswith("-"):
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise UserError(
                    f"flag: {flag} is unknown{hint}; allowed are those of "
                    f"`{self.prog} --help`"
                )
            raise UserError(f"argument: {rest[0]} is one too many; see {self.prog} -h")
        return values


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status."""
    parser = _Parser(prog="hsee", description=__doc__, allow_abbrev=False)
    commands = {"train": _train, "eval": _evaluate, "info": _info}
    parser.add_argument("command", metavar="{train,eval,info}")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if not words:
            raise UserError("command: none given; allowed are train, eval, info")
        if words[0] in ("-h", "--help"):
            parser.print_help()
            return 0
        if words[0] not in commands:
            raise unknown("command", words[0], tuple(commands))
        commands[words[0]](words[1:])
    except UserError as error:
        print(f"hsee: {error}", file=sys.stderr)
        return 2
    except DivergenceError as error:
        print(f"hsee: {error}", file=sys.stderr)
        return 3
    return 0


def _train(words: Sequence[str]) -> None:
    parser = _Parser(
        prog="hsee train",
        description="Train a federation and write a run folder.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "preset", nargs="?", help=f"{', '.join(PRESETS)}; without one, demo"
    )
    parser.add_argument(
        "--config", type=Path, help="a config.json to start from, in place of a preset"
    )
    parser.add_argument(
        "--out", type=Path, help="the run's folder; without one, runs/PRESET-DATE"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out; --rounds may be raised, which stretches the "
        "schedule of the learning rate",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the run in --out"
    )
    several = parser.add_argument_group(
        "several processes", "found by themselves on TPU pods and in Slurm steps"
    )
    several.add_argument(
        "--coordinator", metavar="HOST:PORT", help="of the first; or auto"
    )
    several.add_argument("--num-processes", type=int, help="how many there are")
    several.add_argument("--process-id", type=int, help="which one this is, from 0")
    _add_cache(parser)
    _add_options(parser)
    given = vars(parser.parse(words))
    resume, overwrite = given.pop("resume", False), given.pop("overwrite", False)
    if resume and "out" not in given:
        raise UserError("out: missing; --resume needs the folder of the run")
    out = given.pop("out", None)
    name = given.get("preset", "run" if "config" in given else "demo")
    config = _config(given, stored=out if resume else None)

    from hsee_jax import processes

    processes.join(*map(given.get, ("coordinator", "num_processes", "process_id")))
    _use_cache(given)
    if out is None:
        if jax.process_count() > 1:
            raise UserError("out: missing; several processes need a folder they share")
        out = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"

    from hsee_jax import runs

    with _Progress(config.run.rounds, out) as progress:
        summary = runs.train(
            config,
            out,
            resume=resume,
            overwrite=overwrite,
            on_round=progress.show if processes.is_first() else lambda record: None,
        )
    if processes.is_first():
        _print_results(summary, out)


def _evaluate(words: Sequence[str]) -> None:
    parser = _Parser(
        prog="hsee eval",
        description="Restore a run and evaluate it on its test set.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument(
        "--checkpoint",
        default="latest",
        help="latest, or best by mean server accuracy",
    )
    parser.add_argument("--data-dir", help="where the data are, if not where they were")
    parser.add_argument(
        "--json", action="store_true", help="print all digits, as in summary.json"
    )
    _add_cache(parser)
    given = parser.parse(words)
    _use_cache(vars(given))
    if given.checkpoint not in ("latest", "best"):
        raise unknown("checkpoint", given.checkpoint, ("latest", "best"))

    from hsee_jax import runs

    figures = runs.evaluate(given.run, given.checkpoint, data_dir=given.data_dir)
    if given.json:
        print(json.dumps(figures, indent=2))
    else:
        _print_results(figures, given.run)


def _info(words: Sequence[str]) -> None:
    parser = _Parser(
        prog="hsee info",
        description="What each layer of a configuration's network costs.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "preset", nargs="?", help=f"{', '.join(PRESETS)}; without one, demo"
    )
    _add_cache(parser)
    _add_options(parser)
    # FLOPs of the convolution itself, unless one of its other forms is asked for.
    given = {"conv": "grouped"} | vars(parser.parse(words))
    config = _config(given)
    _use_cache(given)

    from hsee_jax.experiment import build_model
    from hsee_jax.model import layer_costs
    from hsee_jax.report import cost_table

    _print(cost_table(layer_costs(build_model(config))))


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--compilation-cache",
        metavar="FOLDER",
        default=argparse.SUPPRESS,
        help="where compiled programs are kept for the next call, or off; without it, "
        "JAX_COMPILATION_CACHE_DIR or hsee_jax in the user's cache folder",
    )


def _use_cache(given: dict[str, Any]) -> None:
    chosen = given.get("compilation_cache")
    if chosen is None:
        if "JAX_COMPILATION_CACHE_DIR" in os.environ:
            return
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        chosen = str(Path(home) / "hsee_jax")
    if chosen == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    folder = Path(chosen).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if "compilation_cache" not in given:  # a home that cannot be written to
            return
        raise UserError(
            f"compilation_cache: {folder} is not a folder that can be written to"
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _add_options(parser: argparse.ArgumentParser) -> None:
    for name, (section, item) in options().items():
        choices = item.metadata["choices"]
        default = getattr(getattr(PRESETS["demo"], section), name)
        shown = " ".join(default) if takes_many(item) else default
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=value_type(item),
            nargs="+" if takes_many(item) else None,
            metavar="|".join(choices) or value_type(item).__name__.upper(),
            help=f"{item.metadata['help']} (demo: {shown})".replace("%", "%%"),
        )
    parser.add_argument("--seed", type=int, metavar="INT", help="sets all three seeds")


def _config(given: dict[str, Any], *, stored: Path | None = None) -> Config:
    """The preset, file or stored run that was named, with the given flags applied."""
    from hsee_jax import runs

    changes = {name: given[name] for name in options() if name in given}
    if "data_dir" in changes:
        changes["data_dir"] = str(Path(changes["data_dir"]).expanduser().resolve())
    if "seed" in given:
        changes = {name: given["seed"] for name in _SEEDS} | changes
    if "preset" in given and "config" in given:
        raise UserError("config: is not allowed together with a preset")
    if "config" in given:
        base = runs.load_config(given["config"])
    elif "preset" in given:
        base = preset(given["preset"])
    else:
        base = preset("demo") if stored is None else runs.read_config(stored)
    return override(base, **changes)


class _Progress:
    """A bar over the rounds, and a line for each evaluation, on standard error."""

    def __init__(self, rounds: int, out: Path) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._rounds = rounds
        self._out = out
        self._task = self._bar.add_task("rounds", total=rounds)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    def show(self, record: dict[str, Any]) -> None:
        """Advances to a round."""
        self._bar.start()
        self._bar.update(self._task, completed=record["round"])
        line = "  ".join(
            f"{name} {record['train'][f'{name}_loss']:.3f}"
            for name in ("exit", "server")
        )
        text = f"round {record['round']}/{self._rounds}: training loss {line}"
        if "test" in record:
            text += (
                f"; test accuracy exit {record['test']['mean_exit_accuracy']:.4f}"
                f"  server {record['test']['mean_server_accuracy']:.4f}"
            )
        self._bar.console.print(text, highlight=False, soft_wrap=True)


def _print_results(figures: dict[str, Any], folder: Path) -> None:
    from hsee_jax.report import results_table

    title = f"{folder}: test accuracy after {figures['rounds']} rounds"
    _print(results_table(figures, title=title))


def _print(table: Any) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:  # a pipe or a file: no folding at 80 columns
        console = Console(width=120)
    console.print(table)


def console_main() -> None:
    """The entry point of the ``hsee`` command."""
    try:
        status = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = 130
        print(
            "hsee: stopped; --resume goes on from the last checkpoint", file=sys.stderr
        )
    except BrokenPipeError:  # the reader of a pipe has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    raise SystemExit(status)


if __name__ == "__main__":
    console_main()
