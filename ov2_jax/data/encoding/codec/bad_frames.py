"""Frames that show nothing: black, of one colour, or the green that a decoder leaves behind."""

import numpy as np
from jaxtyping import UInt8

_BLACK_MEAN, _BLACK_STD = 8.0, 6.0
_FLAT_STD, _FLAT_RANGE = 4.0, 12.0
_GREEN, _NOT_GREEN, _GREEN_SHARE = 180, 90, 0.35
_GREEN_MEAN, _GREEN_LEAD, _GREEN_STD = 120.0, 80.0, 50.0


def luma(rgb: UInt8[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "height width"]:
    """Brightness, BT.601 in OpenCV's fixed-point arithmetic."""
    red, green, blue = (rgb[..., i].astype(np.int32) for i in range(3))
    return ((4899 * red + 9617 * green + 1868 * blue + 8192) >> 14).astype(np.uint8)


def is_bad_frame(rgb: np.ndarray) -> bool:
    """Whether the released tool would not choose from this frame, RGB uint8 [height width 3].

    The limits are the tool's: black (mean brightness at most 8, deviation at most 6), flat
    (deviation of brightness and of every channel at most 4, range at most 12), at least 35 % of
    strongly green pixels, or green all over with little texture. Raises ValueError for an array
    of another form.
    """
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8 or 0 in rgb.shape:
        raise ValueError(
            f"A frame is {rgb.dtype} of shape {rgb.shape}; it must be uint8 [height width 3]."
        )
    y = luma(rgb)
    y_std = y.std()
    if y.mean() <= _BLACK_MEAN and y_std <= _BLACK_STD:
        return True
    flat = rgb.reshape(-1, 3)
    std = flat.std(0)
    extent = flat.max(0).astype(np.int32) - flat.min(0)
    if max(y_std, *std) <= _FLAT_STD and extent.max() <= _FLAT_RANGE:
        return True
    red, green, blue = flat.T
    strong = (green >= _GREEN) & (red <= _NOT_GREEN) & (blue <= _NOT_GREEN)
    if strong.mean() >= _GREEN_SHARE:
        return True
    mean = flat.mean(0)
    lead = mean[1] - max(mean[0], mean[2])
    return bool(mean[1] > _GREEN_MEAN and lead > _GREEN_LEAD and std[1] < _GREEN_STD)
