"""Decode PNG and JPEG pictures to one array, with Pillow.

All pictures get one size and one number of channels: 1 if all are grey, else 3.
Transparency is dropped, and colours of a palette are looked up.
"""

import io
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from hsee_jax.core.errors import UserError, one_line
from hsee_jax.core.options import between

ImageSize = Annotated[
    int | None, "resize every image to this many pixels each way", between(1, 10_000)
]
_FORMATS = ("PNG", "JPEG")  # Pillow starts other programs for some of the others
_GREY = ("1", "L", "LA", "La")
_DEEP = ("I", "I;16", "I;16B", "I;16L", "F")  # more than 8 bits


class Picture(NamedTuple):
    """An encoded picture."""

    name: str  # where it is, for errors
    content: Path | bytes

    def open(self) -> Image.Image:
        """Read the header; Pillow reads the pixels when they are needed."""
        content = self.content
        file = io.BytesIO(content) if isinstance(content, bytes) else content
        return Image.open(file, formats=_FORMATS)


class _Header(NamedTuple):
    mode: str  # as Pillow calls it
    size: tuple[int, int]  # width and height
    transparent: bool


def decode(
    pictures: Sequence[Picture], image_size: int | None
) -> tuple[npt.NDArray[np.uint8], list[str]]:
    """Decode pictures.

    Args:
      pictures: M pictures, at least one.
      image_size: resize them all to this width and height; None refuses pictures of
        different sizes.

    Returns:
      The images, ``uint8 [M, H, W, C]``, and what was done to them, in clauses.

    Raises:
      UserError: a picture cannot be read or has more than 8 bits per channel, or the
        sizes differ and ``image_size`` is None.
    """
    with ThreadPoolExecutor() as pool:
        headers = list(pool.map(_header, pictures))
        width, height = _size(pictures, headers, image_size)
        mode = "L" if all(header.mode in _GREY for header in headers) else "RGB"
        channels = len(mode)
        images = np.empty((len(pictures), height, width, channels), np.uint8)

        def fill(number: int) -> None:
            pixels = _pixels(pictures[number], mode, (width, height))
            images[number] = pixels.reshape(height, width, channels)

        list(pool.map(fill, range(len(pictures))))
    return images, _notes(headers, mode, (width, height))


def _header(picture: Picture) -> _Header:
    try:
        with picture.open() as image:
            transparent = image.has_transparency_data
            header = _Header(image.mode, image.size, transparent)
            # Pillow opens colours of 16 bits as if they had 8, and drops the others.
            tiles: Any = getattr(image, "tile", ())
            deep = header.mode in _DEEP or any(";16" in str(t[3]) for t in tiles)
    except Exception as error:  # readers of many formats raise many types
        raise _unreadable(picture, error) from error
    if deep:
        raise UserError(
            f"data_dir: {picture.name} has more than 8 bits per pixel; allowed are 8, "
            "or arrays of uint16 with --dataset npz"
        )
    return header


def _pixels(
    picture: Picture, mode: str, size: tuple[int, int]
) -> npt.NDArray[np.uint8]:
    try:
        with picture.open() as image:
            if image.mode == "P" and mode == "RGB":
                image = image.convert("RGBA")  # else Pillow warns of transparency
            converted = image.convert(mode)
            if converted.size != size:
                converted = converted.resize(size, Image.Resampling.BILINEAR)
            return np.asarray(converted)
    except Exception as error:
        raise _unreadable(picture, error) from error


def _unreadable(picture: Picture, error: Exception) -> UserError:
    reason = one_line(error)
    if isinstance(error, UnidentifiedImageError):
        reason = "its content is neither PNG nor JPEG"
    return UserError(
        f"data_dir: {picture.name} cannot be read as an image ({reason}); allowed are "
        "whole PNG and JPEG files"
    )


def _size(
    pictures: Sequence[Picture], headers: Sequence[_Header], image_size: int | None
) -> tuple[int, int]:
    """Return width and height of all pictures."""
    if image_size is not None:
        return image_size, image_size
    first = headers[0].size
    for picture, header in zip(pictures, headers, strict=True):
        if header.size != first:
            one, other = ("x".join(map(str, size)) for size in (first, header.size))
            raise UserError(
                f"data_dir: {pictures[0].name} has {one} pixels and {picture.name} "
                f"{other}; allowed is one size; --image-size {min(first)} resizes them "
                "all"
            )
    return first


def _notes(headers: Sequence[_Header], mode: str, size: tuple[int, int]) -> list[str]:
    """Say in clauses what was done to the pictures."""
    done: Counter[str] = Counter()
    for header in headers:
        if header.size != size:
            done[f"resized to {size[0]}x{size[1]}"] += 1
        if header.mode in _GREY and mode == "RGB":
            done["grey, turned to RGB"] += 1
        elif header.mode not in (*_GREY, "RGB", "RGBA", "P"):
            done[f"{header.mode}, turned to RGB"] += 1
        if header.mode == "P":
            done["with a palette, turned to RGB"] += 1
        if header.transparent:
            done["transparent, made opaque"] += 1
    total = len(headers)
    return [
        f"{'all' if count == total else f'{count:,}'} images {what}"
        for what, count in done.items()
    ]
