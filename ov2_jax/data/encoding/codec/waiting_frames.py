"""Sampled frames that wait at canvas size until their blocks are chosen.

They keep the decoder's own 4:2:0, which takes half of RGB's memory: 768 of them at 313 600 pixels
take 345 MiB.
"""

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from jaxtyping import Bool, UInt8

from ov2_jax.data.encoding.codec.bad_frames import is_bad_frame

# Only frames that look flat or green at a glance are converted to be judged: their brightness
# hardly varies (the limit in bad_frames.py is 6), or both colour differences are well below their
# middle, 128.
_FLAT = 8.0
_GREENISH = 120


class WaitingFrames:
    """Up to `count` sampled frames of `hw` (height, width) pixels.

    They lie in one array. Frames that FFmpeg allocates one by one take half as much again: the
    memory that decoding leaves between them on the heap is never given back.
    """

    def __init__(self, count: int, hw: tuple[int, int]) -> None:
        self._height, self._width = hw
        self._pixels = np.empty((count, hw[0] * 3 // 2, hw[1]), np.uint8)
        self._looks: list[tuple[int, int]] = []  # colour space and range
        self._bad: list[bool] = []
        self._shrink, self._to_rgb = VideoReformatter(), VideoReformatter()  # they keep tables

    def __len__(self) -> int:
        return len(self._looks)

    @property
    def bad(self) -> Bool[np.ndarray, " sampled"]:
        """Frames that must not be chosen from, see bad_frames.py."""
        return np.array(self._bad, bool)

    def add(self, frame: av.VideoFrame) -> None:
        small = self._shrink.reformat(
            frame,
            height=self._height,
            width=self._width,
            format="yuv420p",
            interpolation=Interpolation.AREA,
        )
        y, u, v = (
            np.frombuffer(p, np.uint8).reshape(p.height, p.line_size)[:, : p.width]
            for p in small.planes
        )
        end = 0
        flat = self._pixels[len(self)].reshape(-1)
        for plane in (y, u, v):
            start, end = end, end + plane.size
            flat[start:end].reshape(plane.shape)[:] = plane
        self._looks.append((int(small.colorspace), int(small.color_range)))
        y, u, v = (plane[::4, ::4] for plane in (y, u, v))
        greenish = np.count_nonzero((u < _GREENISH) & (v < _GREENISH)) > u.size // 5
        suspect = y.std() <= _FLAT or greenish
        self._bad.append(bool(suspect and is_bad_frame(self.rgb(len(self) - 1))))

    def rgb(self, index: int) -> UInt8[np.ndarray, "height width 3"]:
        frame = av.VideoFrame.from_ndarray(self._pixels[index], format="yuv420p")
        frame.colorspace, frame.color_range = self._looks[index]
        return self._to_rgb.reformat(frame, format="rgb24").to_ndarray()
