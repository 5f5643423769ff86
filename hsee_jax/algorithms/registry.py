"""The registry of algorithms, and checks that several algorithms make."""

from hsee_jax.core.errors import UserError
from hsee_jax.core.registry import Registry
from hsee_jax.federation.federation import Federation
from hsee_jax.federation.strategy import Strategy
from hsee_jax.link.codecs import CODECS, FULL

# Factories take a `Federation`.
ALGORITHMS: Registry[Strategy] = Registry("strategy", pure=True)
register = ALGORITHMS.register


def cuts_of(federation: Federation) -> str:
    """Return the cuts of a federation as text, ascending."""
    return " ".join(str(group.cut) for group in federation.groups)


def require_one_cut(federation: Federation, name: str) -> None:
    """Refuse a federation with several cuts with a `UserError`."""
    if len(federation.groups) > 1:
        raise UserError(
            f"cuts: {cuts_of(federation)} is not allowed with {name}, where all "
            "clients have the same cut; allowed is one cut"
        )


def require_full_link(federation: Federation, name: str) -> None:
    """Refuse a codec with a `UserError` where no features are sent."""
    if federation.codec != FULL:
        known = (codec for codec in CODECS if CODECS.make(codec) == federation.codec)
        raise UserError(
            f"link: {next(known, 'this codec')} is not allowed with {name}, where no "
            "features are sent; allowed is full"
        )
