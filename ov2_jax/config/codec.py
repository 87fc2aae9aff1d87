"""The parameters of codec-style selection."""

import dataclasses

from ov2_jax.core.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class CodecConfig:
    """Parameters of the selection, with the released tool's names.

    `num_sampled_frames` frames of a clip are sampled. They are cut into groups of
    `min_group_frames` to `max_group_frames`; each group becomes `images_per_group` canvases: its
    first frame whole, and the most expensive blocks (`block_size` x `block_size` patches of `patch`
    pixels) of its other frames. A canvas has at most `max_pixels` pixels.

    A group ends when its blocks are worth as much as those of an average run of `group_size`
    frames, they touch all of its `readiness_coverage_bins` spans of time, and one more frame adds
    less than `readiness_delta_ratio`. `avoid_keyframes` moves samples off key frames, whose bits
    contain nothing about change.

    `max_canvases` caps a clip's canvases. Groups stay whole: if there are too many, evenly spaced
    ones are kept, the first and the last included. None keeps all, as the released tool does.
    """

    num_sampled_frames: int = 256
    group_size: int = 32
    images_per_group: int = 4
    patch: int = 14
    block_size: int = 2
    max_pixels: int = 150_000
    min_group_frames: int = 8
    max_group_frames: int = 64
    readiness_coverage_bins: int = 3
    readiness_delta_ratio: float = 0.05
    avoid_keyframes: bool = True
    max_canvases: int | None = None

    def __post_init__(self) -> None:
        lowest = {
            "num_sampled_frames": 1,
            "group_size": 1,
            "images_per_group": 2,
            "patch": 1,
            "block_size": 1,
            "max_pixels": 1,
            "min_group_frames": 4,
            "max_group_frames": self.min_group_frames,
            "readiness_coverage_bins": 1,
        }
        if self.max_canvases is not None:
            lowest["max_canvases"] = self.images_per_group
        for name, low in lowest.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ConfigError(
                    f"codec.{name} is {value!r}; it must be a whole number of at least {low}."
                )
        if not self.readiness_delta_ratio >= 0:
            raise ConfigError(
                f"codec.readiness_delta_ratio is {self.readiness_delta_ratio!r}; it must be a "
                "share of at least 0."
            )

    @property
    def block_pixels(self) -> int:
        """Side of a block in pixels; canvas sides are multiples of it."""
        return self.block_size * self.patch

    def check_even_blocks(self) -> None:
        """Raises ConfigError if clips cannot be read: their canvases wait in 4:2:0."""
        if self.block_pixels % 2:
            raise ConfigError(
                f"codec.patch * codec.block_size is {self.block_pixels}; it must be even, as "
                "canvases wait in 4:2:0."
            )
