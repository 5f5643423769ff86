"""Download the published archives; check them, resume them, but do not retry."""

import urllib.error
import urllib.request
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Protocol

from hsee_jax.core.errors import UserError
from hsee_jax.data.archives import Archive

_TIMEOUT_S = 10.0  # to connect, and for each later wait; there are no retries


class OnBytes(Protocol):
    """Receives the progress of a download."""

    def __call__(self, file: str, done: int, total: int | None) -> None:
        """Note that ``done`` bytes of ``total`` (None if unknown) have arrived."""


def download_archive(archive: Archive, folder: Path, on_bytes: OnBytes) -> None:
    """Download the files of an archive that are not in a folder yet.

    A file has the suffix ``.part`` until it is complete. The next call continues at its
    end, or at the start if the server does not answer range requests. pooch gives the
    file its name only if the checksum is right, and removes the file otherwise.

    Args:
      archive: what to download.
      folder: the folder of all datasets; the archive may have a folder below it.
      on_bytes: called with the progress.

    Raises:
      UserError: the server cannot be reached, stops, or sends another file; or the
        folder cannot be written to.
    """
    import pooch

    pooch.get_logger().setLevel("ERROR")  # `on_bytes` shows the progress
    place = folder / archive.folder
    for name, md5 in archive.files.items():
        if (place / name).exists():
            continue
        part = place / f"{name}.part"
        try:
            place.mkdir(parents=True, exist_ok=True)  # a loop of links is an OSError
            pooch.retrieve(
                archive.url + name,
                known_hash=f"md5:{md5}",
                fname=name,
                path=place,
                downloader=partial(_download, part, on_bytes),
            )
        except ValueError as error:
            raise UserError(
                f"data_dir: the file from {archive.url}{name} is not kept: its MD5 "
                f"checksum is not the published checksum {md5}"
            ) from error
        except (OSError, HTTPException) as error:
            kept = f"; {part} is kept, to continue there" if part.exists() else ""
            raise UserError(
                f"data_dir: {place} holds no {name}, and it cannot be downloaded "
                f"({getattr(error, 'reason', error)}){kept}; or copy "
                f"{', '.join(archive.files)} from {archive.url} to this folder"
            ) from error


def _download(part: Path, on_bytes: OnBytes, url: str, file: str, _: object) -> None:
    """Download the rest of ``part``, then rename it to ``file``."""
    done = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={done}-"} if done else {}
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            if answer.status != 206:  # the server sends the whole file
                done = 0
            length = answer.headers["Content-Length"]
            total = None if length is None else done + int(length)
            with part.open("ab" if done else "wb") as out:
                while piece := answer.read1(2**16):
                    out.write(piece)
                    done += len(piece)
                    on_bytes(part.stem, done, total)
        if total is not None and done < total:
            raise ConnectionError(f"it ended after {done} of {total} bytes")
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != 416:  # 416: nothing is left, so the part is complete
            raise
    part.replace(file)
