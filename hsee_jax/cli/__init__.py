"""The command line ``hsee``; `hsee_jax.cli.commands` lists its commands.

A command that takes a configuration has a flag for every option of `Config`. `main`
turns an error into a line on standard error and an exit status; `console_main` also
handles the signals and the standard streams of its process.
"""

from hsee_jax.cli.main import console_main, main

__all__ = ["console_main", "main"]
