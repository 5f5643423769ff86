"""Which form a convolution takes: by name, by backend, or as it was measured."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import jax

from hsee_jax.core.types import Array
from hsee_jax.nn.convolution_forms import Form, Geometry
from hsee_jax.nn.winograd import suits_winograd

WITHOUT_GROUPS = ("patches", "winograd", "winograd4")  # forms of single convolutions
FORMS = ("auto", "grouped", "unrolled", *WITHOUT_GROUPS, "mixed")


class Place(NamedTuple):
    """A pass of a convolution with its static sizes: what a form is chosen for."""

    name: str  # forward, wrt_input or wrt_weights
    geometry: Geometry
    channels: tuple[int, int]  # of the weights [k, k, C, F]
    batch: int  # N, of each client where the weights are stacked
    stack: int  # clients with stacked weights, 0 for one set of weights
    dtype: str

    def __str__(self) -> str:
        """Return the pass, channels, window and stride, and the size of the image."""
        geometry, (inputs, features) = self.geometry, self.channels
        sizes = "x".join(map(str, geometry.window)), "x".join(map(str, geometry.image))
        window = f"{sizes[0]}/{geometry.strides[0]} on {sizes[1]}"
        return f"{self.name} {inputs} to {features}, {window}"

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of the pass's two arrays, without the clients in front."""
        geometry, (inputs, features) = self.geometry, self.channels
        x = self.batch, *geometry.image, inputs * geometry.groups
        y = self.batch, *geometry.output, features
        w = *geometry.window, inputs, features
        arrays = {"forward": (x, w), "wrt_input": (y, w), "wrt_weights": (x, y)}
        return arrays[self.name]


Choice = Callable[[Place], str]  # hashable; returns the name of a form


def place_of(name: str, geometry: Geometry, a: Array, b: Array, stack: int) -> Place:
    """Describe a pass by its two arrays, which have ``stack`` clients in front, if any.

    Args:
      name: of the pass, a field of `Form`.
      geometry: its sizes.
      a: ``[..., N, H, W, C]`` images, or the gradient of the output.
      b: weights ``[..., k, k, C, F]``, or for ``wrt_weights`` the gradient of the
        output.
      stack: the size of the leading axis; 0 if there is none.
    """
    inputs, features = b.shape[-2:]
    if name == "wrt_weights":
        inputs = a.shape[-1] // geometry.groups
    return Place(name, geometry, (inputs, features), a.shape[-4], stack, str(a.dtype))


@dataclass(frozen=True)
class FormTable:
    """The forms of some places, and the name of a form for all others."""

    forms: tuple[tuple[Place, str], ...]
    other: str

    def __call__(self, place: Place) -> str:
        """Return the form of a place."""
        return dict(self.forms).get(place) or choice_of(self.other)(place)


def forms_of(place: Place, backend: str) -> tuple[str, ...]:
    """Return the forms whose programs differ at a place of a backend.

    Args:
      place: a pass of a convolution.
      backend: see `auto_form`; on a GPU ``patches`` can abort XLA's compiler.
    """
    forms = ["grouped"]
    if place.stack:
        forms.append("unrolled")
    if backend != "gpu":
        forms.append("patches")
    if place.geometry.groups == 1 and suits_winograd(place.geometry):
        forms += ["winograd", "winograd4"]
    return tuple(forms)


def auto_form(backend: str) -> str:
    """Return the form that ``auto`` takes on a backend where nothing was measured.

    On a GPU the gradients of grouped convolutions by the weights become forward
    convolutions with windows as large as the image, so each client gets its own
    convolution: benchmarks/bench_forms.py measured rounds 1.6 times as fast as with
    groups. XLA for TPU makes one convolution of a group, with the client as a spatial
    axis: benchmarks/bench_aot.py shows what XLA expects of whole rounds.

    Args:
      backend: ``"cpu"``, ``"gpu"``, ``"tpu"`` or another.
    """
    return {"cpu": "mixed", "gpu": "unrolled"}.get(backend, "grouped")


def choice_of(mode: str) -> Choice:
    """Return the choice of a mode, see `hsee_jax.nn.convolution`.

    Raises:
      ValueError: the mode is unknown.
    """
    if mode not in FORMS:
        raise ValueError(f"{mode} is none of {', '.join(FORMS)}")
    form = auto_form(jax.default_backend()) if mode == "auto" else mode
    return _mixed if form == "mixed" else always(form)


@cache
def always(form: str) -> Choice:
    """Return the choice of one form for all places."""
    return lambda place: form


# Each row holds a window, a stride (None for any), the least number of channels (input
# and output), the least number of places in a channel of the output, all images
# together, and the forms of the three passes; the first row that fits counts.
# benchmarks/bench_conv.py times the forms on CPUs: with 128 places of 64 channels no
# form is faster than the native one; with 512 winograd is slower in no pass, and faster
# in the gradient by the weights. Where others are no faster the native form is taken,
# which compiles in less time.
_CPU = (
    (1, None, 1, 1, ("patches", "patches", "patches")),
    (3, 1, 64, 384, ("winograd", "winograd", "winograd")),
    (3, 1, 128, 1, ("grouped", "grouped", "winograd")),
    (3, 2, 64, 1, ("grouped", "grouped", "patches")),
)


def _mixed(place: Place) -> str:
    """Choose a form by shape, for a CPU on which nothing was measured.

    Stacked weights never get a native convolution: XLA runs it slowly inside a scan.
    """
    other = "patches" if place.stack else "grouped"
    window, strides = place.geometry.window, place.geometry.strides
    height, width = place.geometry.output
    images = place.batch * max(place.stack, 1)
    for size, stride, channels, places, forms in _CPU:
        if (
            window == (size, size)
            and strides == (stride or strides[0],) * 2
            and min(place.channels) >= channels
            and images * height * width >= places
        ):
            form = forms[Form._fields.index(place.name)]
            return other if form == "grouped" else form
    return other
