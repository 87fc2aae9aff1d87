"""How much of a frame is new, cell by cell, from what stock FFmpeg tells while it decodes.

H.264 and MPEG-4 export their motion vectors: what is left after motion compensation is close to
what the encoder spent bits on. Other codecs export none, and the difference to the frame before
takes its place. Key frames have no past: there texture costs the bits.

Letters: r c rows and columns of cells (16 pixels, a macroblock), H W pixels. Only every fourth
pixel in both directions is looked at: on an H.264 clip that found as many of the truly expensive
blocks as all pixels do, and it leaves the cost of scoring below the cost of decoding.
"""

from collections import deque
from typing import NamedTuple

import av
import numpy as np

CELL = 16
_STEP = 4  # pixels between samples
_FINE = 8  # pixels: exported vectors never cover smaller blocks
_DEAD_ZONE = 2  # levels of grey that quantisation swallows
# A macroblock whose motion differs from its neighbours' pays for the vectors too: about as much as
# 5 levels over its 16 samples, for each of its four quarters that differ.
_MOTION_COST = 5.0
# Displacements are packed as dy * 65536 + dx; codecs allow far less than half of either's range.
_HALF, _NO_VECTOR = 1 << 15, -(1 << 31)
_MAX_WAITING = 16  # B frames in a row, H.264's limit; a broken stream must not fill the memory
_PLANAR = {"yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p", "nv12", "gray"}
_INTRA, _BIDIRECTIONAL = 1, 3  # av.video.frame.PictureType.I and .B, as frame.pict_type gives them


class _Luma(NamedTuple):
    """A frame's brightness as it lies in the decoder's memory."""

    flat: np.ndarray  # uint8 [at least H * pitch]
    pitch: int  # bytes from one row to the next
    height: int
    width: int


def _luma(frame: av.VideoFrame) -> _Luma:
    if frame.format.name not in _PLANAR:
        frame = frame.reformat(format="gray")
    plane = frame.planes[0]
    return _Luma(np.frombuffer(plane, np.uint8), plane.line_size, frame.height, frame.width)


class _Waiting(NamedTuple):
    number: int
    luma: _Luma
    vectors: np.ndarray


class EnergyMeter:
    """Takes a clip's frames in the order of display; `energies` has the wanted ones' maps.

    B frames wait for the I or P frame that follows them, so their maps come later; `finish` ends
    the clip. At most 16 waiting frames and 3 anchors are held. Raises ValueError if frames change
    their size.
    """

    def __init__(self) -> None:
        self.energies: dict[int, np.ndarray] = {}  # number of the frame: float32 [r c]
        self.has_vectors = False
        self._grid: _Grid | None = None
        self._anchors: deque[_Luma] = deque(maxlen=2)
        self._previous: _Luma | None = None
        self._waiting: list[_Waiting] = []

    def add(self, number: int, frame: av.VideoFrame, wanted: bool) -> None:
        luma = _luma(frame)
        if self._grid is None:
            self._grid = _Grid(luma.height, luma.width)
        elif (luma.height, luma.width) != (self._grid.height, self._grid.width):
            raise ValueError(
                f"frame {number} is {luma.width}x{luma.height} but the clip began with "
                f"{self._grid.width}x{self._grid.height}"
            )
        side_data = frame.side_data.get("MOTION_VECTORS")
        self.has_vectors |= side_data is not None
        bidirectional = frame.pict_type == _BIDIRECTIONAL and self.has_vectors
        if wanted:
            if frame.key_frame or frame.pict_type == _INTRA:
                self.energies[number] = self._grid.texture(luma)
            elif side_data is not None:
                waiting = _Waiting(number, luma, side_data.to_ndarray())
                self._waiting.append(waiting)
            elif self.has_vectors:  # inter-coded, but no block of it is
                self.energies[number] = self._grid.texture(luma)
            elif self._previous is not None:
                self.energies[number] = self._grid.difference(luma, self._previous)
            else:
                self.energies[number] = self._grid.texture(luma)
        if not bidirectional:
            # What waits are the B frames before this one, and this one itself if it is a P frame.
            self._settle(luma, number)
            self._anchors.append(luma)
        elif len(self._waiting) >= _MAX_WAITING:
            self._settle(None, number)
        self._previous = luma

    def finish(self) -> None:
        self._settle(None, -1)

    def _settle(self, anchor: _Luma | None, number: int) -> None:
        for waiting in self._waiting:
            future = None if waiting.number == number else anchor
            self.energies[waiting.number] = self._grid.residual(
                waiting.luma, waiting.vectors, list(self._anchors)[::-1], future
            )
        self._waiting.clear()


class _Grid:
    """Where the samples of a picture of H x W lie, and sums over its cells.

    Samples are kept as [4 4 r c]: row and column inside a cell first, so that sums over cells run
    over whole arrays. Pictures that are no multiple of a cell are continued with their last pixels,
    as encoders do.
    """

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.rows, self.columns = -(-height // CELL), -(-width // CELL)
        inside = np.arange(0, CELL, _STEP, dtype=np.int32)
        y = inside[:, None, None, None] + CELL * np.arange(self.rows, dtype=np.int32)[:, None]
        x = inside[:, None, None] + CELL * np.arange(self.columns, dtype=np.int32)
        fine_columns = self.columns * CELL // _FINE
        self._fine = y // _FINE * fine_columns + x // _FINE  # the block that a sample lies in
        self._y, self._x = np.minimum(y, height - 1), np.minimum(x, width - 1)

    def texture(self, luma: _Luma) -> np.ndarray:
        """float32 [r c]: how much a pixel differs from its right and lower neighbours."""
        here = self._take(luma, self._y, self._x)
        right = self._take(luma, self._y, np.minimum(self._x + 1, self.width - 1))
        below = self._take(luma, np.minimum(self._y + 1, self.height - 1), self._x)
        return _sum(np.abs(here - right) + np.abs(here - below))

    def difference(self, luma: _Luma, before: _Luma) -> np.ndarray:
        """float32 [r c]: how much changed at the same place."""
        here, there = (self._take(x, self._y, self._x) for x in (luma, before))
        return _left_over(here, there)

    def residual(
        self, luma: _Luma, vectors: np.ndarray, past: list[_Luma], future: _Luma | None
    ) -> np.ndarray:
        """float32 [r c]: what motion compensation from the anchors leaves.

        FFmpeg tells the direction of a vector but not which frame it refers to: the nearest anchor
        is taken, or, of what points to the past alone, the one before it where that fits better.
        Blocks without a vector are intra-coded and cost their texture.
        """
        here = self._take(luma, self._y, self._x)
        backward = vectors["source"] < 0
        back = self._field(vectors[backward])
        ahead = self._field(vectors[~backward])
        total = _MOTION_COST * (_unsteady(back) + _unsteady(ahead))
        back, ahead = back.take(self._fine), ahead.take(self._fine)
        by_back = (back != _NO_VECTOR) & bool(past)
        by_ahead = (ahead != _NO_VECTOR) & (future is not None)
        covered = by_back | by_ahead
        # Blocks without a vector are their own prediction: nothing is left over of them.
        predicted = np.where(by_back, self._compensated(past[0], back), here) if past else here
        if by_ahead.any():
            from_future = self._compensated(future, ahead)
            both = (predicted + from_future) >> 1
            predicted = np.where(by_ahead, np.where(by_back, both, from_future), predicted)
        left = _left_over(here, predicted)
        if len(past) > 1:
            alone = by_back & ~by_ahead
            if alone.any():
                predicted = np.where(alone, self._compensated(past[1], back), predicted)
                left = np.minimum(left, _left_over(here, predicted))
        total += left
        if not covered.all():
            total += (1 - _sum(covered) * (_STEP / CELL) ** 2) * self.texture(luma)
        return total

    def _take(self, luma: _Luma, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """int16 [4 4 r c]: samples at pixels y, x."""
        return luma.flat.take(y * np.int32(luma.pitch) + x).astype(np.int16)

    def _field(self, vectors: np.ndarray) -> np.ndarray:
        """int32 [2r 2c]: displacements of one direction's vectors, packed, else _NO_VECTOR."""
        rows, columns = self.rows * CELL // _FINE, self.columns * CELL // _FINE
        field = np.full(rows * columns, _NO_VECTOR, np.int32)
        if not len(vectors):
            return field.reshape(rows, columns)
        scale = np.maximum(vectors["motion_scale"].astype(np.int32), 1)
        dy = (2 * vectors["motion_y"] + scale) // (2 * scale)
        dx = (2 * vectors["motion_x"] + scale) // (2 * scale)
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

    def _compensated(self, source: _Luma, packed: np.ndarray) -> np.ndarray:
        """int16 [4 4 r c]: the samples that vectors point to, to the nearest pixel."""
        dy = (packed + _HALF) >> 16
        y = np.clip(self._y + dy, 0, self.height - 1)
        x = np.clip(self._x + (packed - (dy << 16)), 0, self.width - 1)
        return self._take(source, y, x)


def _sum(samples: np.ndarray) -> np.ndarray:
    """float32 [r c]: sums of samples [4 4 r c] over cells."""
    return samples.sum((0, 1), dtype=np.int32).astype(np.float32)


def _left_over(here: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """float32 [r c]: what a prediction leaves to be coded."""
    return _sum(np.maximum(np.abs(here - predicted) - np.int16(_DEAD_ZONE), 0))


def _unsteady(field: np.ndarray) -> np.ndarray:
    """float32 [r c]: quarters of a cell that move otherwise than the one left of or above."""
    changed = np.zeros(field.shape, bool)
    changed[:, 1:] = field[:, 1:] != field[:, :-1]
    changed[1:] |= field[1:] != field[:-1]
    quarters = changed.astype(np.float32)
    rows = quarters[0::2] + quarters[1::2]
    return rows[:, 0::2] + rows[:, 1::2]
