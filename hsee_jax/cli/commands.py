"""The commands of ``hsee``, with their modules and the first lines of their help."""

import importlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

Run = Callable[[Sequence[str]], int | None]  # words after the command -> exit status


class Command(NamedTuple):
    """A command; only running it imports its module."""

    module: str  # in this package
    function: str
    description: str  # one line
    after_interrupt: str = ""  # how to continue after Ctrl-C

    def load(self) -> Run:
        """Import the command, and JAX with it."""
        module = importlib.import_module(f"hsee_jax.cli.{self.module}")
        return getattr(module, self.function)


COMMANDS = {
    "train": Command(
        "train",
        "train",
        "Train a federation and write a run folder.",
        "--resume continues from the last checkpoint",
    ),
    "sweep": Command(
        "sweep",
        "sweep",
        "Train the rows and seeds of a study, and compare them.",
        "the same command goes on",
    ),
    "eval": Command(
        "inspect", "evaluate", "Restore a run and evaluate it on its test set."
    ),
    "gate": Command("gate", "gate", "Find thresholds for early exits."),
    "refit": Command(
        "refit", "refit", "Fit the exits of a run exactly, in one round of messages."
    ),
    "interactions": Command(
        "interactions",
        "interactions",
        "Find the interactions of columns in a run on a table.",
    ),
    "export": Command(
        "export", "export", "Write a client's layers and exit as a portable folder."
    ),
    "serve": Command(
        "serve",
        "serve",
        "Train a run whose clients are devices on a network.",
        "--resume continues after the last round that ended",
    ),
    "join": Command(
        "join",
        "join",
        "Take part in a served run as one of its devices.",
        "the same command goes on",
    ),
    "enroll": Command(
        "enroll", "enroll", "Write certificates for a server and its clients."
    ),
    "info": Command(
        "inspect", "info", "Show the costs of each layer of a configuration's network."
    ),
    "profile": Command(
        "profile",
        "profile_machine",
        "Time the layers on this machine, and write it as a device for hsee plan.",
    ),
    "tune": Command(
        "tune",
        "tune_forms",
        "Find the fastest form of each convolution on this machine, and keep it.",
    ),
    "plan": Command("plan", "plan", "Choose the cut of each device, and draw a round."),
    "report": Command("report", "report", "Draw and compare runs on one page."),
    "data": Command(
        "data",
        "data",
        "Look for a dataset and download it if it is missing.",
        "the next call continues with the part that is there",
    ),
}


def usage() -> str:
    """Return the help of ``hsee`` without a command."""
    lines = [f"  {name:14}{command.description}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: hsee COMMAND ...; hsee COMMAND --help lists its flags", "", *lines]
    )
