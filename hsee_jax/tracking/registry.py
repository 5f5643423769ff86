"""The trackers that can be chosen by name."""

from hsee_jax.core.registry import Registry
from hsee_jax.runs.callbacks import Callback

# Factories take the run's folder.
TRACKERS: Registry[Callback] = Registry("track", with_options=False)
register = TRACKERS.register
