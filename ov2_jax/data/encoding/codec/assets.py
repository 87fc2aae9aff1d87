"""Canvases or frames made beforehand: pictures, and .npy files of their patches' positions."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Integer, UInt8

from ov2_jax.core.errors import describe
from ov2_jax.data.encoding.images import load_image, patchify, resize
from ov2_jax.data.rejected import SampleError
from ov2_jax.data.sources.media import Media, check_exists, decodable


class Assets(NamedTuple):
    """What the positions alone state about a clip's pictures; each group is a window."""

    hw: tuple[int, int]  # height and width of a picture in pixels
    kept: Bool[np.ndarray, " pictures"]  # those that are no padding
    # Source frame number, patch row and patch column, in block order.
    positions: Int32[np.ndarray, "P 3"]
    windows: Int32[np.ndarray, " g"]  # patches of each window


def read_positions(
    positions: Sequence[Media], pictures: int, *, patch: int, merge: int, together: int
) -> Assets:
    """Reads .npy files, one for all pictures or one a picture.

    Their rows are patches, picture by picture, in raster order within each. -1 marks padding, which
    fills whole pictures and is dropped. Every `together` pictures are one window; for codec
    canvases that is one group. Raises SampleError missing_file or bad_record.
    """
    name = ", ".join(map(str, positions))
    where = np.concatenate([_load(path) for path in positions])
    h, w = (where[:, 1:].max(0) + 1).tolist() if len(where) else (0, 0)
    if h <= 0 or w <= 0 or h % merge or w % merge:
        raise SampleError(
            "bad_record",
            f"{name}: {h} rows and {w} columns of patches are not whole blocks of {merge}x{merge}",
        )
    if len(where) != pictures * h * w:
        raise SampleError(
            "bad_record",
            f"{name}: {len(where)} positions for {pictures} pictures of {h}x{w} patches",
        )
    order = where.reshape(-1, h // merge, merge, w // merge, merge, 3).transpose(0, 1, 3, 2, 4, 5)
    order = order.reshape(pictures, h * w, 3)
    padding = (order < 0).any(2)
    if (padding.any(1) != padding.all(1)).any():
        raise SampleError("bad_record", f"{name}: pictures that are padding in part")
    merged = order.reshape(-1, merge**2, 3)[..., 0]
    if (merged != merged[:, :1]).any():
        raise SampleError("bad_record", f"{name}: blocks of patches from several frames")
    kept = ~padding.any(1)
    groups = [kept[i : i + together].sum() * h * w for i in range(0, pictures, together)]
    if not kept[::together].all():
        raise SampleError("bad_record", f"{name}: a group whose first picture is padding")
    return Assets(
        (h * patch, w * patch),
        kept,
        np.ascontiguousarray(order[kept].reshape(-1, 3).astype(np.int32)),
        np.array(groups, np.int32),
    )


def read_pictures(
    pictures: Sequence[Media], assets: Assets, *, patch: int, merge: int
) -> UInt8[np.ndarray, "P values"]:
    """The patches of the pictures that are no padding, in block order.

    Whole frames are resized to the size in the positions (bicubic); canvases must have that size.
    Raises SampleError missing_file, bad_image or bad_record.
    """
    kept = [picture for picture, keep in zip(pictures, assets.kept, strict=True) if keep]
    times = assets.positions[:, 0].reshape(len(kept), -1)
    frames = bool((times == times[:, :1]).all())
    height, width = assets.hw
    patches = []
    for path in kept:
        picture = load_image(path)
        if not frames and (picture.height, picture.width) != assets.hw:
            raise SampleError(
                "bad_record",
                f"the canvas {path} is {picture.width}x{picture.height}; its positions are of "
                f"{width}x{height}",
            )
        patches.append(patchify(resize(picture, height, width), patch, merge))
    return np.concatenate(patches)


def _load(path: Media) -> Integer[np.ndarray, "P 3"]:
    check_exists(path, "positions file")
    try:
        where = np.load(decodable(path), allow_pickle=False)
    except Exception as error:  # also MemoryError, if the header announces more than there is
        raise SampleError("bad_record", f"{path} is no .npy file: {describe(error)}") from error
    if (
        not isinstance(where, np.ndarray)
        or where.ndim != 2
        or where.shape[1] != 3
        or not np.issubdtype(where.dtype, np.integer)
        or (len(where) and (where.max() >= 2**31 or where.min() < -1))
    ):
        raise SampleError("bad_record", f"{path} must hold whole numbers of shape [patches 3]")
    return where
