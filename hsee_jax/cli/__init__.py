"""The command line: ``hsee train | eval | gate | export | info | report | data``.

Every field of `Config` is a flag. `main` maps what goes wrong to a line on standard
error and an exit status; `console_main` adds what only a process of its own can have:
its signals and its standard streams.
"""

from hsee_jax.cli.main import console_main, main

__all__ = ["console_main", "main"]
