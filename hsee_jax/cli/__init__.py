"""The command line: ``hsee train | eval | gate | export | info | report | data``.

Every field of `Config` is a flag. `main` turns an error into a line on standard error
and an exit status; `console_main` also handles the signals and the standard streams of
its process.
"""

from hsee_jax.cli.main import console_main, main

__all__ = ["console_main", "main"]
