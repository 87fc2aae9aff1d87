"""Canvases or frames that were made beforehand: pictures, and .npy files of patch positions."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ov2_jax.core.errors import describe
from ov2_jax.data.encoding.images import load_image, patchify, resize
from ov2_jax.data.rejected import SampleError
from ov2_jax.data.sources.media import Media, check_exists, decodable


class Assets(NamedTuple):
    """What positions alone tell of a clip's pictures; P patches in g windows."""

    hw: tuple[int, int]  # pixels of a picture
    kept: np.ndarray  # bool [pictures]: those that are no padding
    positions: np.ndarray  # int32 [P 3]: source frame number, patch row, patch column; block order
    windows: np.ndarray  # int32 [g]: patches of each window


def read_positions(
    positions: Sequence[Media], pictures: int, *, patch: int, merge: int, together: int
) -> Assets:
    """Reads .npy files, one for all pictures or one a picture.

    Positions are [pictures*S 3], raster order in every picture; -1 marks padding, which fills whole
    pictures and is dropped. Every `together` pictures are one window, of codec canvases one group.
    Raises SampleError missing_file or bad_record.
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
) -> np.ndarray:
    """uint8 [P C*p*p]. Whole frames are resized to what the positions say (bicubic), canvases must
    have that size. Raises SampleError missing_file, bad_image or bad_record.
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


def _load(path: Media) -> np.ndarray:
    """[n 3] whole numbers."""
    check_exists(path, "positions file")
    try:
        where = np.load(decodable(path), allow_pickle=False)
    except Exception as error:  # also MemoryError, where the header announces what is not there
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
