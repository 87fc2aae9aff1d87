"""A step of the loader: its packs as one Batch, and what they hold."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ov2_jax.config.pack import PackConfig
from ov2_jax.core.batch import Batch, VisionRows
from ov2_jax.data.loader.counts import Totals
from ov2_jax.data.packing.build import PackInfo


class StepInfo(NamedTuple):
    """What a step's packs (of this process) hold; the fields from `seen` on are Totals, which count
    from the start of training."""

    sample_ids: tuple[tuple[str, ...], ...]  # of each pack
    samples: int
    tokens: int
    supervised_tokens: int
    patches: int
    windows: int
    token_slots: int
    patch_slots: int
    class_patches: tuple[int, ...]  # real patches by row class
    class_slots: tuple[int, ...]
    seen: int
    rejected: int
    dropped_rounds: int
    uniform_fallbacks: int
    mixture: tuple[tuple[str, int, int], ...]


def make_step(
    packs: Sequence[Batch], infos: Sequence[PackInfo], config: PackConfig, totals: Totals
) -> tuple[Batch, StepInfo]:
    """Stacks packs to one Batch with the leading axis G, and adds up what they hold."""
    fields = [np.stack(arrays) for arrays in zip(*(p[:-1] for p in packs), strict=True)]
    classes = zip(*(p.vision for p in packs), strict=True)
    vision = tuple(VisionRows(*(np.stack(a) for a in zip(*rows, strict=True))) for rows in classes)
    class_patches = tuple(
        sum(p.class_patches[i] for p in infos) for i in range(len(config.vision_rows))
    )
    info = StepInfo(
        sample_ids=tuple(p.sample_ids for p in infos),
        samples=sum(len(p.sample_ids) for p in infos),
        tokens=sum(p.tokens for p in infos),
        supervised_tokens=sum(p.supervised_tokens for p in infos),
        patches=sum(class_patches),
        windows=sum(p.windows for p in infos),
        token_slots=len(infos) * config.token_slots,
        patch_slots=len(infos) * config.patch_slots,
        class_patches=class_patches,
        class_slots=tuple(len(infos) * r * w for r, w in config.vision_rows),
        **totals._asdict(),
    )
    return Batch(*fields, vision), info
