"""The forms of convolutions that `hsee tune` measured, kept by processor and JAX."""

import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from hsee_jax.config.schema import Config
from hsee_jax.core.errors import DAMAGE, UserError
from hsee_jax.core.files import replace_file, writing
from hsee_jax.core.user_cache import user_cache
from hsee_jax.nn.convolution_choice import FORMS, Choice, FormTable, Place, auto_form
from hsee_jax.nn.convolution_forms import Geometry
from hsee_jax.parallel.mesh import backend_of

Forms = dict[Place, str]


def convolution_of(
    config: Config, mesh: Mesh | None, *, plain: bool = False
) -> dict[str, Any]:
    """Return the network's option ``conv``, if it has one, with ``auto`` resolved.

    Args:
      config: of the run.
      mesh: the devices whose fastest form is taken; None for the default device.
      plain: take the native convolution, whatever is fastest.
    """
    option = config.model.active().get("conv")
    if option is None:
        return {}
    conv: str | Choice = config.model.options["conv"]
    if plain and "grouped" in option.choices:
        conv = "grouped"
    elif conv == "auto":
        backend = backend_of(mesh)
        # All processes of a run need one program; the file is one of this machine.
        here = backend == backend_of(None) and jax.process_count() == 1
        forms = tuple(read_forms().items()) if here else ()
        conv = FormTable(forms, auto_form(backend)) if forms else auto_form(backend)
    return {"conv": conv}


def forms_file() -> Path:
    """Return the file for the default device and this version of JAX."""
    device = jax.devices()[0]
    name = _processor() if device.platform == "cpu" else device.device_kind
    slug = re.sub(r"[^a-z0-9]+", "-", f"{name}-jax-{jax.__version__}".lower())
    path = user_cache() / "forms" / f"{slug}.json"
    return Path(os.path.expanduser(path))  # as it is where there is no home


def read_forms() -> Forms:
    """Read the measured forms; none where there is no file that can be opened.

    Raises:
      UserError: `write_forms` did not write the file.
    """
    path = forms_file()
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        forms = {_place(entry["place"]): entry["form"] for entry in entries}
        if not set(forms.values()) <= set(FORMS):
            raise ValueError("there is no such form")
    except OSError:  # also where this user may not read the folder
        return {}
    except DAMAGE as error:
        raise _unreadable(path) from error
    return forms


def write_forms(forms: Forms) -> Path:
    """Add forms to the file, replacing those of equal places; return its path.

    Raises:
      UserError: the file cannot be written, or this function did not write it.
    """
    path = forms_file()
    entries = [
        {"place": place, "form": form} for place, form in (read_forms() | forms).items()
    ]
    with writing(path, "forms"):
        path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(entries, indent=1) + "\n", "forms")
    return path


def _place(values: list) -> Place:
    name, geometry, channels, batch, stack, dtype = values
    image, window, strides, (rows, columns), groups = geometry
    return Place(
        name,
        Geometry(
            tuple(image),
            tuple(window),
            tuple(strides),
            (tuple(rows), tuple(columns)),
            groups,
        ),
        tuple(channels),
        batch,
        stack,
        dtype,
    )


def _unreadable(path: Path) -> UserError:
    return UserError(
        f"forms: {path} does not hold the forms of `hsee tune`; delete it, and tune "
        "again"
    )


def _processor() -> str:
    """Return the name of the processor and its number of cores."""
    name = platform.processor() or platform.machine()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    if found := re.search(r"model name\s*:\s*(.+)", text):
        name = found[1]
    return f"{name}-{os.cpu_count()}-cores"
