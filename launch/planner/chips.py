"""Peak figures of TPU chips, as their maker publishes them.

Source: the tables of cloud.google.com/tpu/docs/v5e, /v5p and /v6e (2026). Interconnect bandwidth is
published as the sum of both directions of all links; a chip sends at half of that. `usable_bytes`
is what the compiler (libtpu 0.0.42) leaves to a program, by its message for one that does not fit.
"""

from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    flops: float  # bfloat16, a second, peak
    hbm_bytes: float
    usable_bytes: float
    hbm_bandwidth: float  # bytes a second
    ici_bandwidth: float  # bytes a second that a chip sends over all its links together


CHIPS = {
    "v5e": Chip(197e12, 16 * GIB, 15.75 * GIB, 800e9, 200e9),
    "v5p": Chip(459e12, 95.74 * GIB, 95.74 * GIB, 2765e9, 600e9),
    "v6e": Chip(918e12, 32 * GIB, 31.25 * GIB, 1600e9, 400e9),
}
