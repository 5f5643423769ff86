"""Files that begin with the digest of their content, so that damage is seen."""

import hashlib
from pathlib import Path

from hsee_jax.core.errors import UserError
from hsee_jax.core.files import replace_file, writing

_BYTES = hashlib.sha256().digest_size


def write(path: Path, content: bytes, field: str, *, sync: bool = True) -> None:
    """Write a file with its digest, completely or not at all.

    Args:
      path: of the file; its folder is made.
      content: what it holds.
      field: the option that names the folder.
      sync: whether it is on the disk when this returns.

    Raises:
      UserError: it cannot be written.
    """
    with writing(path, field):
        path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(content).digest()
    replace_file(path, digest + content, field, sync=sync)


def read(path: Path, field: str) -> bytes:
    """Read what `write` wrote.

    Raises:
      UserError: the file is missing or damaged.
    """
    try:
        whole = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{field}: {path} cannot be read: {error.strerror or error}"
        ) from error
    digest, content = whole[:_BYTES], whole[_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        raise UserError(f"{field}: {path} is damaged; allowed is a new folder")
    return content
