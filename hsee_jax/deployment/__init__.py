"""Export trained clients for use without this package."""

from hsee_jax.deployment.export import export_client

__all__ = ["export_client"]
