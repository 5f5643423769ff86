"""Downloads of the published archives: checked, resumed, without retries."""

import urllib.error
import urllib.request
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Protocol

from hsee_jax.core.errors import UserError
from hsee_jax.data.archives import Archive

_TIMEOUT_S = 10.0  # to connect, and for each wait thereafter; there are no retries


class OnBytes(Protocol):
    """Is told how far a download is."""

    def __call__(self, file: str, done: int, total: int | None) -> None:
        """Take note that ``done`` bytes of ``total``, None if unknown, are here."""


def download_archive(archive: Archive, folder: Path, on_bytes: OnBytes) -> None:
    """Download the files of an archive that are not in a folder yet.

    A file has the suffix ``.part`` until all of it is there. The next call goes on at
    its end, or at the start if the server does not answer range requests. pooch gives
    the file its name only if the checksum is right, and removes it otherwise.

    Args:
      archive: what to download.
      folder: of all datasets; the archive may have a folder below it.
      on_bytes: called with the progress.

    Raises:
      UserError: the server cannot be reached, stops, or sends another file; or the
        folder cannot be written to.
    """
    import pooch

    pooch.get_logger().setLevel("ERROR")  # else it announces what on_bytes shows
    place = folder / archive.folder
    for name, md5 in archive.files.items():
        if (place / name).exists():
            continue
        part = place / f"{name}.part"
        try:
            pooch.retrieve(
                archive.url + name,
                known_hash=f"md5:{md5}",
                fname=name,
                path=place,
                downloader=partial(_download, part, on_bytes),
            )
        except ValueError as error:
            raise UserError(
                f"data_dir: what {archive.url}{name} sends is not kept: its MD5 "
                f"checksum is not the published one, {md5}"
            ) from error
        except (OSError, HTTPException) as error:
            kept = f"; {part} is kept, to go on there" if part.exists() else ""
            raise UserError(
                f"data_dir: {place} holds no {name}, and it cannot be downloaded "
                f"({getattr(error, 'reason', error)}){kept}; put there "
                f"{', '.join(archive.files)} from {archive.url}"
            ) from error


def _download(part: Path, on_bytes: OnBytes, url: str, file: str, _: object) -> None:
    """Download the rest of ``part``, then give it the name ``file``."""
    done = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={done}-"} if done else {}
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            if answer.status != 206:  # not the rest, but everything
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
        if error.code != 416:  # nothing is behind the part's end: it is whole
            raise
    part.replace(file)
