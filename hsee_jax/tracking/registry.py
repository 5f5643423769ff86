"""The trackers that can be chosen by name."""

from hsee_jax.core.errors import UserError
from hsee_jax.core.registry import Registry
from hsee_jax.runs.callbacks import Callback

# Factories take the run's folder.
TRACKERS: Registry[Callback] = Registry("track", with_options=False)
register = TRACKERS.register


def no_package(name: str) -> UserError:
    """Return the error for a tracker whose library is not installed."""
    return UserError(f"{name}: needs a package; `pip install 'hsee-jax[{name}]'`")
