"""Canvases that the released tool made beforehand: pictures and src_patch_position.npy."""

from collections.abc import Sequence

import numpy as np

from ov2_jax.data.codec.clip import CodecClip
from ov2_jax.data.codec.config import CodecConfig
from ov2_jax.data.errors import SampleError
from ov2_jax.data.images import load_image, patchify


def read_assets(
    canvases: Sequence[str], positions: str, config: CodecConfig, *, fps: float
) -> CodecClip:
    """A clip from its canvases' files, in order, and the .npy file of their patches' positions.

    Positions are [canvases*S 3] (source frame number, patch row, patch column), raster order in
    every canvas; -1 marks padding, which fills whole canvases and is dropped. Every
    `images_per_group` canvases are one group and so one window. Raises SampleError missing_file,
    bad_image or bad_record.
    """
    if not fps > 0:
        raise SampleError("bad_record", f"fps is {fps}; timestamps need frames a second")
    size = config.images_per_group
    if not canvases or len(canvases) % size:
        raise SampleError(
            "bad_record", f"{len(canvases)} canvases are not whole groups of {size} canvases"
        )
    where = _load_positions(positions)
    b, f = config.block_size, config.block_pixels
    pictures = [np.asarray(load_image(path)) for path in canvases]
    height, width = pictures[0].shape[:2]
    if any(p.shape != pictures[0].shape for p in pictures) or height % f or width % f:
        raise SampleError(
            "bad_record",
            f"canvases of {width}x{height} must all have one size, of whole blocks of {f} pixels",
        )
    rows, columns = height // f, width // f
    patches_each = rows * columns * b * b
    if len(where) != len(canvases) * patches_each:
        raise SampleError(
            "bad_record",
            f"{positions} has {len(where)} positions for {len(canvases)} canvases of "
            f"{patches_each} patches",
        )
    order = where.reshape(-1, rows, b, columns, b, 3).transpose(0, 1, 3, 2, 4, 5)
    order = order.reshape(len(canvases), patches_each, 3)
    padding = (order < 0).any(2)
    if (padding.any(1) != padding.all(1)).any():
        raise SampleError("bad_record", f"{positions} has canvases that are padding in part")
    kept = ~padding.any(1)
    if not kept.reshape(-1, size)[:, 0].all():
        raise SampleError("bad_record", f"{positions} has a group whose anchor is padding")
    patches = [
        patchify(picture, config.patch, b)
        for picture, keep in zip(pictures, kept, strict=True)
        if keep
    ]
    windows = kept.reshape(-1, size).sum(1) * patches_each
    return CodecClip(
        np.concatenate(patches),
        np.ascontiguousarray(order[kept].reshape(-1, 3).astype(np.int32)),
        windows.astype(np.int32),
        fps,
        None,
    )


def _load_positions(path: str) -> np.ndarray:
    """[n 3] whole numbers."""
    try:
        where = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise SampleError("missing_file", f"there are no positions {path}") from error
    except (ValueError, OSError, EOFError) as error:
        raise SampleError("bad_record", f"{path} is no .npy file: {error}") from error
    if (
        not isinstance(where, np.ndarray)
        or where.ndim != 2
        or where.shape[1] != 3
        or not np.issubdtype(where.dtype, np.integer)
    ):
        raise SampleError("bad_record", f"{path} must hold whole numbers of shape [patches 3]")
    return where
