"""What each block of a frame is worth, from the bits that its cells cost."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float32, Int64, Real

from ov2_jax.config.codec import CodecConfig

EPS = 1e-6
_PERCENTILE = 99
_CHUNK = 32  # frames scored at a time: bounds the float32 maps in memory


def block_scores(
    bit_cost: Iterable[Real[np.ndarray, "r c"]],
    count: int,
    hw: tuple[int, int],
    config: CodecConfig,
) -> Float32[np.ndarray, "sampled blocks"]:
    """The score of each block of each of `count` frames, blocks in raster order.

    `bit_cost` yields the frames' maps, `hw` is a canvas's (height, width) in pixels. A map is put
    on a logarithmic scale, divided by its 99th percentile, clipped to 1, enlarged to the canvas by
    nearest neighbour, and summed over patches, then over blocks.
    """
    p, m = config.patch, config.block_size
    rows, columns = hw[0] // p, hw[1] // p
    scores = np.empty((count, rows // m * (columns // m)), np.float32)
    maps, done = [], 0
    for number, cost in enumerate(bit_cost, 1):
        maps.append(_normalised(cost))
        if len(maps) < _CHUNK and number < count:
            continue
        stack = np.stack(maps)
        n, r, c = stack.shape
        # A patch's sum is the sum over its pixel rows of the sums along them, and many of those
        # rows are copies of one row of cells: sum along a row of cells once, then down the rows.
        # take, unlike an index, returns rows that lie in memory as rows; numpy's order of summation
        # follows memory, and another order changes last bits.
        wide = np.take(stack, _nearest(c, hw[1]), 2).reshape(n, r, columns, p).sum(-1)
        tall = np.take(wide, _nearest(r, hw[0]), 1).reshape(n, rows, p, columns).sum(2)
        blocks = tall.reshape(n, rows // m, m, columns // m, m).sum((2, 4))
        scores[done:number] = blocks.reshape(n, -1)
        maps, done = [], number
    return scores


def _normalised(cost: Real[np.ndarray, "r c"]) -> Float32[np.ndarray, "r c"]:
    """From 0 to 1."""
    log = np.log1p(np.maximum(np.asarray(cost, np.float32), 0))
    scale = max(float(np.percentile(log, _PERCENTILE)), EPS)
    return np.clip(log / np.float32(scale), 0, 1)


def _nearest(size_in: int, size_out: int) -> Int64[np.ndarray, " {size_out}"]:
    """The cells that pixels are copied from, rounded as in OpenCV's resize.

    The product with the inverse scale falls short of a whole number in some places where exact
    arithmetic would not: 40 rows to 392 differ in six places.
    """
    cells = np.floor(np.arange(size_out) * (1 / (size_out / size_in))).astype(np.int64)
    return np.minimum(cells, size_in - 1)
