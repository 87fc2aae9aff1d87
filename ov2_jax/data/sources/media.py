"""Pictures and clips that are not decoded yet: paths, local or remote, or bytes; and the section of
a clip that a sample is about."""

import io
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

from ov2_jax.core.errors import describe
from ov2_jax.core.files import is_file, is_remote, open_binary
from ov2_jax.data.rejected import SampleError


class Embedded(NamedTuple):
    """A file that came inside its record. The name is for messages; nothing opens it."""

    data: bytes
    name: str

    def __str__(self) -> str:
        return self.name


Media = str | Embedded  # a picture or clip
MediaValue = Media | Shaped[np.ndarray, "..."]  # arrays: decoded by TFDS, unchecked


def check_exists(media: Media, what: str) -> None:
    """Raises SampleError missing_file unless it is a file; a reader would wait for a pipe.

    `what` names it in the message: "picture", "clip".
    """
    try:
        if isinstance(media, Embedded) or is_file(media):
            return
    except (OSError, ValueError) as error:  # a name that is too long, a folder that is closed
        detail = f"the {what} cannot be looked up: {describe(error)}; it is {media}"
        raise SampleError("missing_file", detail) from error
    raise SampleError("missing_file", f"there is no {what} {media}, or it is no file")


def decodable(media: Media) -> str | io.IOBase:
    """For Pillow and PyAV: a local path, or a new file object for anything else."""
    if isinstance(media, Embedded):
        return io.BytesIO(media.data)
    return open_binary(media) if is_remote(media) else media


class Section(NamedTuple):
    """The part of a clip that a sample is about, in seconds, both ends included. It is read as a
    clip of its own: frames and times count from its start. Without `end` the clip's end ends it."""

    start: float = 0.0
    end: float | None = None

    def span(self, path: Media, frames: int, fps: float) -> range:
        """The numbers of its frames in a clip of `frames` at `fps`. Raises SampleError."""
        first = math.ceil(self.start * fps - 1e-6)
        stop = frames if self.end is None else min(frames, math.floor(self.end * fps + 1e-6) + 1)
        if first >= stop:
            raise SampleError(
                "bad_video",
                f"{path} has {frames} frames at {fps:g} a second and none of them from "
                f"{self.start:g} to {self.end} seconds",
            )
        return range(first, stop)


WHOLE = Section()  # all of a clip
