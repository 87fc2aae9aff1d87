"""How much of a frame is new, cell by cell, from the data that stock FFmpeg exports.

H.264 and MPEG-4 export their motion vectors: the residual after motion compensation is close to
what the encoder spent bits on. For other codecs, which export none, it is the difference to the
frame before. Key frames refer to no other frame, and their bits follow their texture.

A cell is a macroblock, 16 x 16 pixels. Only every fourth pixel in both directions is read: on an
H.264 clip that found as many of the truly expensive blocks as all pixels do, and scoring costs less
than decoding. Vectors are followed to the quarter of a pixel, though: rounded to pixels, they found
70 % instead of 75 %.
"""

from collections import deque
from typing import NamedTuple

import av
import numpy as np
from jaxtyping import Float32, Int16, Int32, Integer, Shaped, UInt8

CELL = 16
# Pixels between samples; in pictures of at least _LARGE pixels they are twice as far apart. A
# canvas has some 150 000 pixels, so it shows a large picture more coarsely than that anyway.
_STEP = 4
_LARGE = 500_000
_FINE = 8  # pixels: exported vectors never cover smaller blocks
_DEAD_ZONE = 2  # levels of grey that quantisation swallows
# A macroblock whose motion differs from its neighbours' also pays for its vectors: about as much as
# 0.3 levels over its samples, for each of its four quarters that differ.
_MOTION_COST = 5 / 16
# Displacements in quarters of a pixel are packed as dy * 65536 + dx; codecs allow far less than
# half of either's range.
_HALF, _NO_VECTOR = 1 << 15, -(1 << 31)
_QUARTERS = 4
# Pixels that a picture is continued by on every side. A block that lies wholly outside has only
# copies of the last pixel, so vectors that lead farther out can end here.
_MARGIN = 16
_MAX_WAITING = 16  # B frames in a row, H.264's limit; a broken stream must not fill the memory
_PLANAR = {"yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p", "nv12", "gray"}
_INTRA, _BIDIRECTIONAL = 1, 3  # av.video.frame.PictureType.I and .B, as frame.pict_type gives them


class _Waiting(NamedTuple):
    """A frame whose vectors may point to a frame that is not decoded yet."""

    number: int
    picture: UInt8[np.ndarray, " pixels"]
    vectors: Shaped[np.ndarray, " vectors"]


class EnergyMeter:
    """Takes a clip's frames in the order of display; `energies` has the maps of the wanted ones.

    B frames wait for the I or P frame that follows them, so their maps come later; `finish` ends
    the clip. At most 16 waiting frames and 2 anchors are held, in grey. Raises ValueError if the
    frames change their size.
    """

    def __init__(self) -> None:
        self.energies: dict[int, Float32[np.ndarray, "r c"]] = {}  # by number of the frame
        self.has_vectors = False
        self._grid: _Grid | None = None
        self._anchors: deque[UInt8[np.ndarray, " pixels"]] = deque(maxlen=2)
        self._previous: av.VideoFrame | None = None
        self._waiting: list[_Waiting] = []

    def add(self, number: int, frame: av.VideoFrame, wanted: bool) -> None:
        if self._grid is None:
            self._grid = _Grid(frame.height, frame.width)
        elif (frame.height, frame.width) != (self._grid.height, self._grid.width):
            raise ValueError(
                f"frame {number} is {frame.width}x{frame.height} but the clip began with "
                f"{self._grid.width}x{self._grid.height}"
            )
        side_data = frame.side_data.get("MOTION_VECTORS")
        self.has_vectors |= side_data is not None
        intra = frame.key_frame or frame.pict_type == _INTRA
        anchor = self.has_vectors and frame.pict_type != _BIDIRECTIONAL
        picture = self._grid.continued(frame) if wanted or anchor or intra else None
        if wanted:
            if side_data is not None and not intra:
                self._waiting.append(_Waiting(number, picture, side_data.to_ndarray()))
            elif intra or self.has_vectors or self._previous is None:
                self.energies[number] = self._grid.texture(picture)
            else:
                before = self._grid.continued(self._previous)
                self.energies[number] = self._grid.difference(picture, before)
        if anchor or intra:
            # The B frames before this frame are waiting, and this frame itself if it is a P frame.
            self._settle(picture, number)
            self._anchors.append(picture)
        elif len(self._waiting) >= _MAX_WAITING:
            self._settle(None, number)
        self._previous = frame

    def finish(self) -> None:
        self._settle(None, -1)

    def _settle(self, anchor: UInt8[np.ndarray, " pixels"] | None, number: int) -> None:
        """Scores the waiting frames, which may point forward to `anchor`, frame `number`."""
        for waiting in self._waiting:
            future = None if waiting.number == number else anchor
            self.energies[waiting.number] = self._grid.residual(
                waiting.picture, waiting.vectors, list(self._anchors)[::-1], future
            )
        self._waiting.clear()


class _Grid:
    """The places of the samples in a picture of `height` x `width` pixels.

    Pictures are flat, continued by their last pixels to whole cells (as encoders do) and by a
    margin on every side. A cell has four quarters, blocks of 8 x 8 pixels. Samples are [inside
    inside quarter_rows quarter_columns]: first the row and column inside a quarter (2 x 2 of them,
    in large pictures 1), so that the values of a quarter broadcast over its samples.
    """

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.rows, self.columns = -(-height // CELL), -(-width // CELL)
        self._size = self.rows * CELL + 2 * _MARGIN, self.columns * CELL + 2 * _MARGIN
        self._pitch = self._size[1]
        self._top = _MARGIN + np.arange(0, self.rows * CELL, _FINE)[:, None]
        self._left = _MARGIN + np.arange(0, self.columns * CELL, _FINE)
        step = _STEP if height * width < _LARGE else 2 * _STEP
        self._motion_cost = _MOTION_COST * (CELL // step) ** 2
        inside = np.arange(step - _STEP, _FINE, step)
        self._inside = (inside[:, None] * self._pitch + inside)[:, :, None, None]
        self._here = self._inside + self._top * self._pitch + self._left

    def continued(self, frame: av.VideoFrame) -> UInt8[np.ndarray, " pixels"]:
        """The brightness of a frame, flat and continued."""
        if frame.format.name not in _PLANAR:
            frame = frame.reformat(format="gray")
        plane = frame.planes[0]
        luma = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
        luma = luma[: self.height, : self.width]
        picture = np.empty(self._size, np.uint8)
        rows = slice(_MARGIN, _MARGIN + self.height)
        columns = slice(_MARGIN, _MARGIN + self.width)
        picture[rows, columns] = luma
        picture[: rows.start, columns] = luma[0]
        picture[rows.stop :, columns] = luma[-1]
        picture[:, : columns.start] = picture[:, columns.start, None]
        picture[:, columns.stop :] = picture[:, columns.stop - 1, None]
        return picture.reshape(-1)

    def texture(self, picture: UInt8[np.ndarray, " pixels"]) -> Float32[np.ndarray, "r c"]:
        """How much pixels differ from their right and lower neighbours."""
        here = _take(picture, self._here)
        right, below = (_take(picture[n:], self._here) for n in (1, self._pitch))
        return _sum(np.abs(here - right) + np.abs(here - below))

    def difference(
        self, picture: UInt8[np.ndarray, " pixels"], before: UInt8[np.ndarray, " pixels"]
    ) -> Float32[np.ndarray, "r c"]:
        """How much changed at the same place."""
        return _left_over(_take(picture, self._here), _take(before, self._here))

    def residual(
        self,
        picture: UInt8[np.ndarray, " pixels"],
        vectors: Shaped[np.ndarray, " vectors"],
        past: list[UInt8[np.ndarray, " pixels"]],
        future: UInt8[np.ndarray, " pixels"] | None,
    ) -> Float32[np.ndarray, "r c"]:
        """What motion compensation from the anchors leaves.

        FFmpeg exports the direction of a vector but not the frame that it refers to: the nearest
        anchor is taken. If a block has a vector to the past only, it is the anchor before that if
        that one fits better. Blocks without a vector are intra-coded and cost their texture.
        """
        here = _take(picture, self._here)
        backward = vectors["source"] < 0
        back = self._field(vectors[backward])
        ahead = self._field(vectors[~backward])
        total = self._motion_cost * (_unsteady(back) + _unsteady(ahead))
        by_back = (back != _NO_VECTOR) & bool(past)
        by_ahead = (ahead != _NO_VECTOR) & (future is not None)
        # Blocks without a vector are their own prediction: they leave nothing over.
        predicted = np.where(by_back, self._compensated(past[0], back), here) if past else here
        if by_ahead.any():
            from_future = self._compensated(future, ahead)
            both = (predicted + from_future) >> 1
            predicted = np.where(by_ahead, np.where(by_back, both, from_future), predicted)
        left = _left_over(here, predicted)
        alone = by_back & ~by_ahead
        if len(past) > 1 and alone.any():
            predicted = np.where(alone, self._compensated(past[1], back), predicted)
            left = np.minimum(left, _left_over(here, predicted))
        bare = ~(by_back | by_ahead)
        if bare.any():
            left = left + _cells(bare) / (CELL // _FINE) ** 2 * self.texture(picture)
        return total + left

    def _field(
        self, vectors: Shaped[np.ndarray, " vectors"]
    ) -> Int32[np.ndarray, "quarter_rows quarter_columns"]:
        """The packed displacements of one direction's vectors, else _NO_VECTOR."""
        rows, columns = self.rows * CELL // _FINE, self.columns * CELL // _FINE
        field = np.full(rows * columns, _NO_VECTOR, np.int32)
        if not len(vectors):
            return field.reshape(rows, columns)
        scale = np.maximum(vectors["motion_scale"].astype(np.int32), 1)
        dy, dx = (_QUARTERS * vectors[name] // scale for name in ("motion_y", "motion_x"))
        packed = (dy << 16) + dx
        w, h = vectors["w"].astype(np.int32), vectors["h"].astype(np.int32)
        top, left = (vectors["dst_y"] - h // 2) // _FINE, (vectors["dst_x"] - w // 2) // _FINE
        for i in range(max(int(h.max()) // _FINE, 1)):
            for j in range(max(int(w.max()) // _FINE, 1)):
                row, column = top + i, left + j
                good = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
                good &= (i == 0) | (i * _FINE < h)
                good &= (j == 0) | (j * _FINE < w)
                field[row[good] * columns + column[good]] = packed[good]
        return field.reshape(rows, columns)

    def _compensated(
        self,
        source: UInt8[np.ndarray, " pixels"],
        packed: Int32[np.ndarray, "quarter_rows quarter_columns"],
    ) -> Int16[np.ndarray, "inside inside quarter_rows quarter_columns"]:
        """The samples that vectors point to, interpolated linearly."""
        dy = (packed + _HALF) >> 16
        dx = packed - (dy << 16)
        top = np.clip(self._top + (dy >> 2), 0, self._size[0] - _FINE - 1)
        left = np.clip(self._left + (dx >> 2), 0, self._size[1] - _FINE - 1)
        at = top * self._pitch + left + self._inside
        y, x = (dy & 3).astype(np.int16), (dx & 3).astype(np.int16)
        upper = _between(source, at, x)
        if not y.any():
            return (upper + 2) >> 2
        lower = _between(source[self._pitch :], at, x)
        return (_QUARTERS * upper + y * (lower - upper) + 8) >> 4


def _between(
    source: UInt8[np.ndarray, " pixels"],
    at: Integer[np.ndarray, "inside inside quarter_rows quarter_columns"],
    x: Int16[np.ndarray, "quarter_rows quarter_columns"],
) -> Int16[np.ndarray, "inside inside quarter_rows quarter_columns"]:
    """4 times the value at x quarters of a pixel to the right of pixels `at`."""
    value = _take(source, at)
    if not x.any():
        return _QUARTERS * value
    return _QUARTERS * value + x * (_take(source[1:], at) - value)


def _take(
    picture: UInt8[np.ndarray, " pixels"], at: Integer[np.ndarray, "*any"]
) -> Int16[np.ndarray, "*any"]:
    return picture.take(at).astype(np.int16)


def _sum(
    samples: Int16[np.ndarray, "inside inside quarter_rows quarter_columns"],
) -> Float32[np.ndarray, "r c"]:
    """Sums of samples over cells."""
    return _cells(samples.sum((0, 1), dtype=np.int32))


def _cells(
    quarters: Shaped[np.ndarray, "quarter_rows quarter_columns"],
) -> Float32[np.ndarray, "r c"]:
    """Sums over the four quarters of cells."""
    quarters = quarters.astype(np.float32)
    rows = quarters[0::2] + quarters[1::2]
    return rows[:, 0::2] + rows[:, 1::2]


def _left_over(
    here: Int16[np.ndarray, "inside inside quarter_rows quarter_columns"],
    predicted: Int16[np.ndarray, "inside inside quarter_rows quarter_columns"],
) -> Float32[np.ndarray, "r c"]:
    """What a prediction leaves to be coded."""
    return _sum(np.maximum(np.abs(here - predicted) - np.int16(_DEAD_ZONE), 0))


def _unsteady(
    field: Int32[np.ndarray, "quarter_rows quarter_columns"],
) -> Float32[np.ndarray, "r c"]:
    """The number of a cell's quarters that move otherwise than the one to the left or above."""
    changed = np.zeros(field.shape, bool)
    changed[:, 1:] = field[:, 1:] != field[:, :-1]
    changed[1:] |= field[1:] != field[:-1]
    return _cells(changed)
