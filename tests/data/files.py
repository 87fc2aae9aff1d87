"""A small data set on disk and the configs to read it, for the tests of ov2_jax.data."""

import json
from pathlib import Path

import av
import numpy as np
from PIL import Image


def picture(path: Path, height: int, width: int, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def clip(
    path: Path, frames: int, rate: int, codec: str = "libx264", height: int = 48, width: int = 64
) -> Path:
    """Frame i is a flat grey of value about 4*i + 20, so that a frame tells its number."""
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
