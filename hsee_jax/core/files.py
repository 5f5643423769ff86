"""Files that are written completely or not at all."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from hsee_jax.core.errors import UserError


@contextlib.contextmanager
def writing(path: Path, field: str = "out", *, hint: str = "") -> Iterator[Path]:
    """Yield a file or a folder to write to, and say in one line why that failed.

    Args:
      path: of the file or the folder.
      field: the option that names it.
      hint: what the line says at its end of how to go on.

    Raises:
      UserError: an `OSError` in the body.
    """
    try:
        yield path
    except OSError as error:
        end = f"; {hint}" if hint else ""
        raise UserError(
            f"{field}: {path} cannot be written: {error.strerror or error}{end}"
        ) from error


def replace_file(
    path: Path,
    content: str | bytes,
    field: str = "out",
    *,
    hint: str = "",
    sync: bool = False,
) -> None:
    """Write a file completely or not at all.

    Args:
      path: of the file; its folder exists.
      content: of the file; text is written in UTF-8.
      field: see `writing`.
      hint: see `writing`.
      sync: whether the file is on the disk when this returns.

    Raises:
      UserError: it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        content = content.encode() if isinstance(content, str) else content
    except UnicodeEncodeError as error:
        letter = error.object[error.start]
        raise UserError(f"{field}: {path} cannot hold {letter!a}") from error
    with writing(path, field, hint=hint):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:  # as on a full disk, which half a file would fill
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        if sync:
            sync_to_disk(path.parent)


def sync_to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some file systems do not sync folders
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until a folder and all that is in it are on the disk."""
    for path in (*folder.rglob("*"), folder):
        sync_to_disk(path)
