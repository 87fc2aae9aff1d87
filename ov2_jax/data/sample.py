"""A sample that is ready to be packed."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, UInt8


class EncodedSample(NamedTuple):
    """n tokens, k attention windows, P patches of C*p*p values.

    The i-th placeholder token stands for patches [i*m*m, (i+1)*m*m): patches are in the order of
    the text, in m x m block order, and windows cut them into consecutive runs.
    """

    id: str
    source: str
    file: str
    line: int
    task: str
    tokens: Int32[np.ndarray, " n"]
    loss_mask: Bool[np.ndarray, " n"]  # this token is to be learnt
    windows: Int32[np.ndarray, " k"]  # patches of each window
    patches: UInt8[np.ndarray, "P values"]
    patch_positions: Int32[np.ndarray, "P 3"]  # (t, h, w)
    dropped_rounds: int = 0  # question-answer rounds left out because of on_long="drop_rounds"
    uniform_fallbacks: int = 0  # clips too short for codec-style reading, read as uniform frames


class SampleLength(NamedTuple):
    """The length that packing needs; pictures and uniform frames are not decoded for it."""

    id: str
    source: str
    file: str
    line: int
    tokens: int
    windows: tuple[int, ...]  # patches of each window
    dropped_rounds: int = 0
    uniform_fallbacks: int = 0  # clips too short for codec-style reading, read as uniform frames


class SampleSize(NamedTuple):
    """The part of a sample's length that placement works with."""

    tokens: int
    windows: tuple[int, ...]  # patches of each window, in order
