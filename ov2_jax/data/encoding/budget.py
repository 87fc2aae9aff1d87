"""Whether a sample can be packed, checked while it is encoded."""

from collections.abc import Sequence

from ov2_jax.config.pack import PackConfig
from ov2_jax.data.packing.placement import fits_alone
from ov2_jax.data.rejected import SampleError
from ov2_jax.data.sample import SampleSize

SIZE_REASONS = ("too_long", "window_too_large", "too_many_patches")


class SampleBudget:
    """The tokens and windows of a sample so far. Without a PackConfig every size fits."""

    def __init__(self, pack: PackConfig | None) -> None:
        self._pack = pack
        self.tokens = 0
        self.windows: list[int] = []

    def check(self, tokens: int, windows: Sequence[int]) -> None:
        """Raises SampleError if the sample does not fit with these tokens and windows added."""
        pack = self._pack
        if pack is None:
            return
        tokens += self.tokens
        if tokens > pack.seq_len:
            raise SampleError(
                "too_long",
                f"the sample has at least {tokens} tokens but a text row {pack.seq_len}; raise "
                "pack.seq_len, lower max_pixels or the number of frames, or set "
                "data.on_long='drop_rounds'",
            )
        widest = pack.vision_rows[-1][1] if pack.vision_rows else 0
        if windows and max(windows) > widest:
            raise SampleError(
                "window_too_large",
                f"a window has {max(windows)} patches but the largest vision row {widest}; add a "
                f"class of rows of at least {max(windows)} patches to pack.vision_rows, or lower "
                "max_pixels or frame_max_pixels",
            )
        windows = (*self.windows, *windows)
        if not fits_alone(SampleSize(tokens, windows), pack):
            raise SampleError(
                "too_many_patches",
                f"{sum(windows)} patches in {len(windows)} windows do not fit into the "
                f"vision rows of one pack; add rows to pack.vision_rows, or lower max_pixels or "
                "the number of frames",
            )

    def add(self, tokens: int, windows: Sequence[int]) -> None:
        """Raises SampleError and adds nothing if they do not fit."""
        self.check(tokens, windows)
        self.tokens += tokens
        self.windows.extend(windows)
