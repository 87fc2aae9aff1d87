"""Pixels and files of the quickstart's pictures and clips.

Shapes are placed in *cells*: one cell is what one merged token sees (patch 14 x merge 2 = 28
pixels) once a picture of `rows x cols` cells has been resized to multiples of 28.
"""

import dataclasses
import io
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
from PIL import Image, ImageDraw

CELL = 28

Colour = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Shape:
    """One filled shape; centre and radius are in pixels of the resized picture."""

    kind: str
    colour: Colour
    x: float
    y: float
    radius: float


@dataclasses.dataclass(frozen=True)
class Clip:
    """Frames uint8 [T H W 3] and the frames a second they are to be played at."""

    frames: np.ndarray
    fps: Fraction


def _outline(kind: str) -> list[tuple[float, float]]:
    """Corners of a shape around (0, 0), each shape about as large as the others."""
    if kind == "square":
        return [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    if kind == "triangle":
        return [(0, -1.05), (1.05, 0.85), (-1.05, 0.85)]
    if kind == "cross":
        a, b = 0.32, 1.0
        return [
            *((-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a)),
            *((a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)),
        ]
    raise ValueError(f"Unknown shape {kind!r}; it must be circle, square, triangle or cross.")


def draw(
    size: tuple[int, int], grid: tuple[int, int], background: Colour, shapes: Sequence[Shape]
) -> np.ndarray:
    """Draws a picture uint8 [H W 3].

    Args:
      size: (H, W) of the picture.
      grid: (rows, cols) of cells that it will have after resizing; shapes are scaled to `size`.
      background: RGB.
      shapes: drawn in order.
    """
    height, width = size
    sy, sx = height / (grid[0] * CELL), width / (grid[1] * CELL)
    picture = Image.new("RGB", (width, height), background)
    pen = ImageDraw.Draw(picture)
    for shape in shapes:
        x, y, r = shape.x, shape.y, shape.radius
        if shape.kind == "circle":
            box = [(x - r) * sx, (y - r) * sy, (x + r) * sx, (y + r) * sy]
            pen.ellipse(box, fill=shape.colour)
        else:
            corners = [((x + r * u) * sx, (y + r * v) * sy) for u, v in _outline(shape.kind)]
            pen.polygon(corners, fill=shape.colour)
    return np.asarray(picture)


def encode_image(pixels: np.ndarray, file_format: str) -> bytes:
    """The bytes of a picture file; `file_format` is "jpg" or "png"."""
    out = io.BytesIO()
    if file_format == "jpg":
        Image.fromarray(pixels).save(out, "JPEG", quality=92)
    else:
        Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def encode_clip(clip: Clip) -> bytes:
    """The bytes of an H.264 MP4 file; the same clip always gives the same bytes (one thread)."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        # B-frames and look-ahead made 1 clip in 400 differ from run to run.
        options = {"preset": "ultrafast", "crf": "18"}
        stream = container.add_stream("libx264", rate=clip.fps, options=options)
        stream.height, stream.width = clip.frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for pixels in clip.frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()
