"""A sample that is ready to be packed."""

from typing import NamedTuple

import numpy as np


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
    tokens: np.ndarray  # int32 [n]
    loss_mask: np.ndarray  # bool [n]: this token is to be learnt
    windows: np.ndarray  # int32 [k]: patches of each window
    patches: np.ndarray  # uint8 [P C*p*p]
    patch_positions: np.ndarray  # int32 [P 3]: (t, h, w)
    dropped_rounds: int = 0  # question-answer rounds left out because of on_long="drop_rounds"
    uniform_fallbacks: int = 0  # clips too short for codec-style reading, read as uniform frames


class SampleLength(NamedTuple):
    """What packing needs to know of a sample, from headers alone where they tell it."""

    id: str
    source: str
    file: str
    line: int
    tokens: int
    windows: tuple[int, ...]  # patches of each window
    dropped_rounds: int = 0
    uniform_fallbacks: int = 0  # clips too short for codec-style reading, read as uniform frames


class SampleSize(NamedTuple):
    """What placement needs to know of a sample."""

    tokens: int
    windows: tuple[int, ...]  # patches of each window, in order
