"""How much of a frame is new, cell by cell, from what stock FFmpeg tells while it decodes.

H.264 and MPEG-4 export their motion vectors: what is left after motion compensation is close to
what the encoder spent bits on. Other codecs export none, and the difference to the frame before
takes its place. Key frames have no past: there texture costs the bits.

Letters: r c rows and columns of cells (16 pixels, a macroblock), H W pixels. Only every fourth
pixel in both directions is looked at: on an H.264 clip that found as many of the truly expensive
blocks as all pixels do, and it leaves the cost of scoring below the cost of decoding. Vectors are
followed to the quarter of a pixel, though: rounded to pixels, they found 70 % instead of 75 %.
"""

from collections import deque
from typing import NamedTuple

import av
import numpy as np

CELL = 16
# Pixels between samples, and from how many pixels a picture on they are twice as far apart. A
# canvas is some 150 000 pixels, so what it shows of a large picture is coarser than that anyway.
_STEP = 4
_LARGE = 500_000
_FINE = 8  # pixels: exported vectors never cover smaller blocks
_DEAD_ZONE = 2  # levels of grey that quantisation swallows
# A macroblock whose motion differs from its neighbours' pays for the vectors too: about as much as
# 0.3 levels over its samples, for each of its four quarters that differ.
_MOTION_COST = 5 / 16
# Displacements in quarters of a pixel are packed as dy * 65536 + dx; codecs allow far less than
# half of either's range.
_HALF, _NO_VECTOR = 1 << 15, -(1 << 31)
_QUARTERS = 4
# Pixels that a picture is continued by on every side. A block that lies outside altogether sees
# copies of the last pixel only, so vectors that lead farther out can end here.
_MARGIN = 16
_MAX_WAITING = 16  # B frames in a row, H.264's limit; a broken stream must not fill the memory
_PLANAR = {"yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p", "nv12", "gray"}
_INTRA, _BIDIRECTIONAL = 1, 3  # av.video.frame.PictureType.I and .B, as frame.pict_type gives them


class _Waiting(NamedTuple):
    number: int
    picture: np.ndarray
    vectors: np.ndarray


class EnergyMeter:
    """Takes a clip's frames in the order of display; `energies` has the wanted ones' maps.

    B frames wait for the I or P frame that follows them, so their maps come later; `finish` ends
    the clip. At most 16 waiting frames and 2 anchors are held, in grey. Raises ValueError if frames
    change their size.
    """

    def __init__(self) -> None:
        self.energies: dict[int, np.ndarray] = {}  # number of the frame: float32 [r c]
        self.has_vectors = False
        self._grid: _Grid | None = None
        self._anchors: deque[np.ndarray] = deque(maxlen=2)
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
            # What waits are the B frames before this one, and this one itself if it is a P frame.
            self._settle(picture, number)
            self._anchors.append(picture)
        elif len(self._waiting) >= _MAX_WAITING:
            self._settle(None, number)
        self._previous = frame

    def finish(self) -> None:
        self._settle(None, -1)

    def _settle(self, anchor: np.ndarray | None, number: int) -> None:
        for waiting in self._waiting:
            future = None if waiting.number == number else anchor
            self.energies[waiting.number] = self._grid.residual(
                waiting.picture, waiting.vectors, list(self._anchors)[::-1], future
            )
        self._waiting.clear()


class _Grid:
    """Where the samples of a picture of H x W lie.

    Pictures are uint8, flat, continued by their last pixels to whole cells (as encoders do) and by
    a margin on every side. Samples are [s s 2r 2c], s 2 or in large pictures 1: row and column
    inside a block of 8 pixels first, so that what holds for a block broadcasts over its samples.
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

    def continued(self, frame: av.VideoFrame) -> np.ndarray:
        """The brightness of a frame, as described above."""
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

    def texture(self, picture: np.ndarray) -> np.ndarray:
        """float32 [r c]: how much a pixel differs from its right and lower neighbours."""
        here = _take(picture, self._here)
        right, below = (_take(picture[n:], self._here) for n in (1, self._pitch))
        return _sum(np.abs(here - right) + np.abs(here - below))

    def difference(self, picture: np.ndarray, before: np.ndarray) -> np.ndarray:
        """float32 [r c]: how much changed at the same place."""
        return _left_over(_take(picture, self._here), _take(before, self._here))

    def residual(
        self,
        picture: np.ndarray,
        vectors: np.ndarray,
        past: list[np.ndarray],
        future: np.ndarray | None,
    ) -> np.ndarray:
        """float32 [r c]: what motion compensation from the anchors leaves.

        FFmpeg tells the direction of a vector but not which frame it refers to: the nearest anchor
        is taken, or, of what points to the past alone, the one before it where that fits better.
        Blocks without a vector are intra-coded and cost their texture.
        """
        here = _take(picture, self._here)
        backward = vectors["source"] < 0
        back = self._field(vectors[backward])
        ahead = self._field(vectors[~backward])
        total = self._motion_cost * (_unsteady(back) + _unsteady(ahead))
        by_back = (back != _NO_VECTOR) & bool(past)
        by_ahead = (ahead != _NO_VECTOR) & (future is not None)
        # Blocks without a vector are their own prediction: nothing is left over of them.
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

    def _field(self, vectors: np.ndarray) -> np.ndarray:
        """int32 [2r 2c]: displacements of one direction's vectors, packed, else _NO_VECTOR."""
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

    def _compensated(self, source: np.ndarray, packed: np.ndarray) -> np.ndarray:
        """int16 [s s 2r 2c]: the samples that vectors point to, interpolated linearly."""
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


def _between(source: np.ndarray, at: np.ndarray, x: np.ndarray) -> np.ndarray:
    """int16: 4 times the value x quarters to the right of pixels `at`."""
    value = _take(source, at)
    if not x.any():
        return _QUARTERS * value
    return _QUARTERS * value + x * (_take(source[1:], at) - value)


def _take(picture: np.ndarray, at: np.ndarray) -> np.ndarray:
    return picture.take(at).astype(np.int16)


def _sum(samples: np.ndarray) -> np.ndarray:
    """float32 [r c]: sums of samples [s s 2r 2c] over cells."""
    return _cells(samples.sum((0, 1), dtype=np.int32))


def _cells(quarters: np.ndarray) -> np.ndarray:
    """float32 [r c]: sums of [2r 2c] over the four quarters of cells."""
    quarters = quarters.astype(np.float32)
    rows = quarters[0::2] + quarters[1::2]
    return rows[:, 0::2] + rows[:, 1::2]


def _left_over(here: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """float32 [r c]: what a prediction leaves to be coded."""
    return _sum(np.maximum(np.abs(here - predicted) - np.int16(_DEAD_ZONE), 0))


def _unsteady(field: np.ndarray) -> np.ndarray:
    """float32 [r c]: quarters of a cell that move otherwise than the one left of or above."""
    changed = np.zeros(field.shape, bool)
    changed[:, 1:] = field[:, 1:] != field[:, :-1]
    changed[1:] |= field[1:] != field[:-1]
    return _cells(changed)
