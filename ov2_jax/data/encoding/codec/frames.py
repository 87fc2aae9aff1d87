"""Which frames of a clip are sampled, and how large its canvases are."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int64

from ov2_jax.config.codec import CodecConfig

MIN_PIXELS = 56 * 56
_MAX_SHIFT = 4  # a sample moves at most this many frames to leave a key frame


def sample_frames(
    num_frames: int, keyframes: Sequence[float] | np.ndarray, config: CodecConfig
) -> Int64[np.ndarray, " sampled"]:
    """The numbers of min(num_sampled_frames, num_frames) frames, ascending.

    They are evenly spaced (linspace, cut down to whole numbers). With `avoid_keyframes` a sample on
    one of `keyframes` (frame numbers) moves to the nearest frame within 4 that is no key frame, the
    later of two first. If samples fall together, they are replaced by unused frames that are no key
    frames: the nearest to the kept ones first, of two equally near the one nearer to the middle of
    the clip, then the earlier one. If none are left, key frames follow, earliest first. Raises
    ValueError without frames.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames is {num_frames}; a clip needs at least one frame.")
    n = min(config.num_sampled_frames, num_frames)
    ids = np.linspace(0, num_frames - 1, n).astype(np.int64)
    if not config.avoid_keyframes:
        return ids
    is_key = np.zeros(num_frames, bool)
    keys = frame_numbers(keyframes, "keyframes")
    is_key[keys[keys < num_frames]] = True  # containers announce fewer frames than there are
    kept = np.unique([_off_keyframe(int(i), is_key) for i in ids])
    if len(kept) == n:
        return kept
    used = np.zeros(num_frames, bool)
    used[kept] = True
    free = np.flatnonzero(~used & ~is_key)
    after = np.searchsorted(kept, free)
    distance = np.minimum(
        np.abs(free - kept[np.minimum(after, len(kept) - 1)]),
        np.abs(free - kept[np.maximum(after - 1, 0)]),
    )
    order = np.lexsort((free, np.abs(free - num_frames // 2), distance))
    candidates = np.concatenate([free[order], np.flatnonzero(~used & is_key)])
    return np.sort(np.concatenate([kept, candidates[: n - len(kept)]]))


def _off_keyframe(number: int, is_key: Bool[np.ndarray, " frames"]) -> int:
    if is_key[number]:
        for shift in range(1, _MAX_SHIFT + 1):
            for candidate in (number + shift, number - shift):
                if 0 <= candidate < len(is_key) and not is_key[candidate]:
                    return candidate
    return number


def frame_numbers(
    numbers: Sequence[float] | np.ndarray, name: str
) -> Int64[np.ndarray, " numbers"]:
    """The frame numbers as an array. Raises ValueError, with `name`, if they are none."""
    numbers = np.asarray(numbers)
    if numbers.size == 0:
        return np.zeros(0, np.int64)
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer) or numbers.min() < 0:
        raise ValueError(
            f"{name} must be a list of frame numbers from 0 on, but is {numbers.dtype} of shape "
            f"{numbers.shape}."
        )
    return numbers.astype(np.int64)


def canvas_size(orig_hw: tuple[int, int], config: CodecConfig) -> tuple[int, int]:
    """(height, width) in pixels of a canvas for a source of `orig_hw`: multiples of a block's side.

    A source is too large if its own size is, not if its rounded size is. Sources between the two
    keep their rounded size and may exceed max_pixels by a little, as in the released tool. Raises
    ValueError if a side is below 1.
    """
    height, width = orig_hw
    if height < 1 or width < 1:
        raise ValueError(f"orig_hw is {orig_hw}; both sides must be at least 1 pixel.")
    f = config.block_pixels
    new = [max(f, round(side / f) * f) for side in orig_hw]
    if height * width > config.max_pixels:
        beta = math.sqrt(height * width / config.max_pixels)
        new = [max(f, math.floor(side / beta / f) * f) for side in orig_hw]
    elif new[0] * new[1] < MIN_PIXELS:
        beta = math.sqrt(MIN_PIXELS / (height * width))
        new = [math.ceil(side * beta / f) * f for side in orig_hw]
    return new[0], new[1]
