"""The networks that can be trained by name."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from hsee_jax.core.errors import UserError
from hsee_jax.core.registry import Registry
from hsee_jax.nn.model import Model, layer_inputs

F = TypeVar("F", bound=Callable[..., Model])

# Factories take ``num_classes`` and ``input_shape``, ``(H, W, C)`` for images.
NETWORKS: Registry[Model] = Registry(
    "network", context=("num_classes", "input_shape"), pure=True
)
register = NETWORKS.register


def images_only(make: F) -> F:
    """Decorate the factory of a network that takes only images.

    If ``input_shape`` is not ``(H, W, C)``, the factory then raises a `UserError` that
    names the registered networks that take this shape. Apply this below `register`.
    """
    return _only(make, "images", "[H, W, C]", 3)


def series_only(make: F) -> F:
    """Decorate the factory of a network that takes only series.

    This is `images_only` for an ``input_shape`` of ``(T, C)``.
    """
    return _only(make, "series", "[T, C]", 2)


def tables_only(make: F) -> F:
    """Decorate the factory of a network that takes only tables.

    This is `images_only` for an ``input_shape`` of ``(F,)``.
    """
    return _only(make, "tables", "[F]", 1)


def _only(make: F, kind: str, letters: str, rank: int) -> F:
    @functools.wraps(make)
    def checked(
        *, num_classes: int, input_shape: tuple[int, ...], **options: Any
    ) -> Model:
        if len(input_shape) != rank:
            others = [n for n in NETWORKS if n != make.__name__]
            fitting = [n for n in others if _takes(n, num_classes, input_shape)]
            raise UserError(
                f"network: {make.__name__} is not allowed for samples of "
                f"{list(input_shape)}; it takes {kind} {letters}; allowed are "
                f"{', '.join(fitting)}"
            )
        return make(num_classes=num_classes, input_shape=input_shape, **options)

    checked.input_rank = rank  # type: ignore[attr-defined]
    return cast(F, checked)


def _takes(name: str, num_classes: int, input_shape: tuple[int, ...]) -> bool:
    """Return whether a network takes inputs of this shape, by trying it."""
    make = NETWORKS[name].make
    rank = getattr(make, "input_rank", None)
    if rank not in (None, len(input_shape)):
        return False
    try:
        model = make(num_classes=num_classes, input_shape=input_shape)
        if rank is None:  # it says nothing about its inputs
            layer_inputs(model)
    except Exception:  # what a network makes of a wrong shape may raise anything
        return False
    return True
