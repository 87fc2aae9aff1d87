"""The static shape of a pack."""

import dataclasses

from ov2_jax.config.checks import check_field, is_whole
from ov2_jax.config.model import ModelConfig
from ov2_jax.core.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class PackConfig:
    """The static shape of a pack.

    It has B = `rows` text rows of L = `seq_len` tokens, and vision rows in classes, (R rows, W
    patches) each, the smallest W first.
    """

    rows: int
    seq_len: int
    vision_rows: tuple[tuple[int, int], ...] = ()
    max_samples_per_row: int | None = None

    def __post_init__(self) -> None:
        classes = tuple(tuple(c) for c in self.vision_rows)
        object.__setattr__(self, "vision_rows", classes)
        for name in ("rows", "seq_len"):
            value = getattr(self, name)
            check_field(
                "pack", name, value, is_whole(value) and value > 0, "a positive whole number"
            )
        for entry in classes:
            good = len(entry) == 2 and all(is_whole(n) and n > 0 for n in entry)
            check_field("pack", "vision_rows", classes, good, "pairs of (rows, patches in a row)")
        widths = [w for _, w in classes]
        check_field(
            "pack",
            "vision_rows",
            classes,
            widths == sorted(set(widths)),
            "sorted by patches in a row, each length once",
        )
        limit = self.max_samples_per_row
        check_field(
            "pack",
            "max_samples_per_row",
            limit,
            limit is None or (is_whole(limit) and limit > 0),
            "a positive whole number or None",
        )

    @property
    def token_slots(self) -> int:
        return self.rows * self.seq_len

    @property
    def patch_slots(self) -> int:
        return sum(r * w for r, w in self.vision_rows)

    def check(self, model: ModelConfig) -> None:
        """Raises ConfigError if a vision row would cut a merged token."""
        unit = model.vision.merge_unit
        for _, width in self.vision_rows:
            if width % unit:
                raise ConfigError(
                    f"pack.vision_rows has rows of {width} patches; with merge size "
                    f"{model.vision.spatial_merge_size} it must be a multiple of {unit}."
                )
