"""``python -m hsee_jax`` is the command ``hsee``."""

from hsee_jax.cli import console_main

if __name__ == "__main__":
    console_main()
