"""Sources of the bits that a clip's cells cost."""

from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

import av
import numpy as np
from jaxtyping import Real

from ov2_jax.data.encoding.codec.energy import EnergyMeter
from ov2_jax.data.sources.media import Media, decodable

# A cell that would get fewer bits than this is mostly skipped and costs next to none. Its share is
# pulled towards nothing, smoothly, so that the order of a frame's cells stays. Without this the
# many cheap cells of B frames, on their logarithmic scale, took a quarter of the chosen blocks of
# an H.264 clip; by true bits they get 8 %. Overlap with the true choice rose from 0.66 to 0.75.
_SKIP_BITS = 16.0


@runtime_checkable
class ScoreSource(Protocol):
    """Bits per cell of a clip's sampled frames; one object a clip."""

    def add(self, number: int, frame: av.VideoFrame, bits: int | None, wanted: bool) -> None:
        """Takes every decoded frame in order, with its packet's bits if they are known."""

    def maps(self, numbers: Iterable[int]) -> Iterator[Real[np.ndarray, "r c"]]:
        """Yields the bits of the wanted frames after all frames were added."""


class StreamScores:
    """A packet's bits, shared out by how much of the frame is new (energy.py).

    If a packet's size is unknown, its frame counts only by how much is new. Maps of codecs with
    macroblocks get one empty column on the right, as in the released tool: its scores, and the
    model trained on them, lie too far left by that share of a cell.
    """

    def __init__(self) -> None:
        self._meter = EnergyMeter()
        self._bits: dict[int, int | None] = {}

    def add(self, number: int, frame: av.VideoFrame, bits: int | None, wanted: bool) -> None:
        self._meter.add(number, frame, wanted)
        if wanted:
            self._bits[number] = bits

    def maps(self, numbers: Iterable[int]) -> Iterator[Real[np.ndarray, "r c"]]:
        self._meter.finish()
        for number in numbers:
            energy = self._meter.energies[number]
            bits, total = self._bits[number], energy.sum()
            if bits is not None and total > 0:
                share = energy * (bits / total)
                energy = share * (share**2 / (share**2 + _SKIP_BITS**2))
            yield np.pad(energy, ((0, 0), (0, 1))) if self._meter.has_vectors else energy


class FileScores:
    """Bit costs measured beforehand: an .npz file with `bit_cost` [frames r c].

    Raises FileNotFoundError, or ValueError if the content is another.
    """

    def __init__(self, path: Media) -> None:
        with np.load(decodable(path), allow_pickle=False) as arrays:
            if "bit_cost" not in arrays:
                raise ValueError(
                    f"{path} has no array bit_cost but {', '.join(arrays) or 'nothing'}; write bit "
                    "costs [frames rows columns] under that name."
                )
            self._bit_cost = arrays["bit_cost"]
        self._path = path
        shape, kind = self._bit_cost.shape, self._bit_cost.dtype
        if len(shape) != 3 or 0 in shape or kind.kind not in "iuf":
            raise ValueError(
                f"bit_cost of {path} is {kind} of shape {shape}; it must be numbers [frames rows "
                "columns]."
            )

    def add(self, number: int, frame: av.VideoFrame, bits: int | None, wanted: bool) -> None:
        if wanted and number >= len(self._bit_cost):
            raise ValueError(
                f"{self._path} has bit costs of {len(self._bit_cost)} frames, but the clip has a "
                f"frame {number}."
            )

    def maps(self, numbers: Iterable[int]) -> Iterator[Real[np.ndarray, "r c"]]:
        return (self._bit_cost[number] for number in numbers)
