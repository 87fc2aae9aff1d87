"""Pictures and clips as paths or as bytes, and files that may be local or remote.

A path with a scheme (`gs://`, `s3://`, `memory://`, ...) is opened by fsspec, any other one is a
local file. fsspec's files can be sought in, so what is random-access here is so remotely as well.
"""

import io
from pathlib import Path
from typing import BinaryIO, NamedTuple

import fsspec

from ov2_jax.data.errors import SampleError, describe


class Embedded(NamedTuple):
    """A file that came inside its record; the name is for people and never opened."""

    data: bytes
    name: str

    def __str__(self) -> str:
        return self.name


Media = str | Embedded


def is_remote(path: str) -> bool:
    return "://" in path


def open_binary(path: str) -> BinaryIO:
    """A readable file that can be sought in."""
    return fsspec.open(path, "rb").open() if is_remote(path) else Path(path).open("rb")


def is_file(path: str) -> bool:
    if not is_remote(path):
        return Path(path).is_file()
    files, inner = fsspec.core.url_to_fs(path)
    return files.isfile(inner)


def check_exists(media: Media, what: str) -> None:
    """Raises SampleError missing_file unless it is a file: pipes and devices would be waited for.

    `what` it is, for the message.
    """
    try:
        if isinstance(media, Embedded) or is_file(media):
            return
    except (OSError, ValueError) as error:  # a name that is too long, a folder that is closed
        detail = f"the {what} cannot be looked up: {describe(error)}; it is {media}"
        raise SampleError("missing_file", detail) from error
    raise SampleError("missing_file", f"there is no {what} {media}, or it is no file")


def decodable(media: Media) -> str | BinaryIO:
    """What Pillow and PyAV open: a local path, or a new file object for anything else."""
    if isinstance(media, Embedded):
        return io.BytesIO(media.data)
    return open_binary(media) if is_remote(media) else media


def expand(path: str) -> list[str]:
    """The files that a pattern with `*`, `?` or `[` stands for, sorted; other paths as they are."""
    if not any(mark in path for mark in "*?["):
        return [path]
    files, inner = fsspec.core.url_to_fs(path)
    found = sorted(files.glob(inner))
    return [files.unstrip_protocol(f) for f in found] if is_remote(path) else found


def parent(path: str) -> str:
    """The folder of a file, local or remote."""
    return path.rpartition("/")[0] if is_remote(path) else str(Path(path).parent)
