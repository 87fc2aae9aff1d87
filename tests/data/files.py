"""A small data set on disk or in a bucket, for the tests of ov2_jax.data."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import av
import fsspec
import numpy as np
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image


def picture(path: Path, height: int, width: int, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def clip(
    path: Path, frames: int, rate: int, codec: str = "libx264", height: int = 48, width: int = 64
) -> Path:
    """Frame i is a flat grey of value about 4*i + 20, which gives its number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for i in range(frames):
            pixels = np.full((height, width, 3), 4 * i + 20, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def chat(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    """Questions and answers in turn as messages."""
    head = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return head + [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]


def write_jsonl(path: Path, samples: list[dict | str]) -> Path:
    """Strings are written as they are, so that a line can be broken."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [s if isinstance(s, str) else json.dumps(s) for s in samples]
    path.write_text("\n".join(lines) + "\n")
    return path


class Bucket(MemoryFileSystem):
    """s3:// in memory: epath opens these paths through fsspec, as it does with real ones."""

    protocol = "s3"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]

    @staticmethod
    def before_read() -> None:
        """A test may replace it, to make files slow."""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(str(path).removeprefix("s3://"))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> io.BytesIO:
        file = super()._open(path, mode, **options)
        if mode != "rb":
            return file
        self.before_read()
        return io.BytesIO(file.getvalue())  # each reader has a place of its own

    def glob(self, path: str, **options: Any) -> list[str]:
        return [found.lstrip("/") for found in super().glob(path, **options)]  # as s3fs does


def fill_bucket(files: Mapping[str, bytes]) -> None:
    """Makes `files` the content of all s3:// buckets of this process, by path (`bucket/name`)."""
    fsspec.register_implementation("s3", Bucket, clobber=True)
    Bucket.store.clear()
    Bucket.pseudo_dirs[:] = [""]
    for path, data in files.items():
        fsspec.filesystem("s3").pipe_file(path, data)
