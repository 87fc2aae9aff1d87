"""A case of benchmarks/train_step.py: the sizes of a model and of samples, and random samples.

    {"vocab": 8192, "threads": 2, "text": {...}, "vision": {...},
     "samples": [[[[1, 16, 16]], 60], [[], 200]]}

`text` and `vision` have fields of TextConfig and VisionConfig; the others have their defaults. A
sample is [grids, text tokens], a grid [frames, rows, columns] of patches. Its tokens are the grids'
placeholders and then the text, which is supervised.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ov2_jax.config.model import ModelConfig, TextConfig, VisionConfig
from ov2_jax.core.errors import ConfigError
from ov2_jax.data.encoding.images import patch_positions
from ov2_jax.data.sample import EncodedSample, SampleSize

Grid = tuple[int, int, int]


class Case(NamedTuple):
    """A model, the threads that run it, and the sizes of samples."""

    model: ModelConfig
    threads: int
    samples: tuple[tuple[tuple[Grid, ...], int], ...]  # (grids, text tokens)

    def windows(self, grids: tuple[Grid, ...]) -> tuple[int, ...]:
        """Patches of each attention window: at most `frame_windows_size` frames of a grid."""
        most = self.model.vision.frame_windows_size
        return tuple(min(most, t - i) * h * w for t, h, w in grids for i in range(0, t, most))

    def sizes(self) -> list[SampleSize]:
        """The samples' sizes, for packing."""
        unit = self.model.vision.merge_unit
        return [
            SampleSize(sum(t * h * w for t, h, w in grids) // unit + text, self.windows(grids))
            for grids, text in self.samples
        ]

    def encoded(self, seed: int) -> list[EncodedSample]:
        """The samples with random patches and tokens."""
        rng = np.random.default_rng(seed)
        vision, first_special = self.model.vision, self.model.image_token_id
        merge = vision.spatial_merge_size
        made = []
        for number, (grids, text) in enumerate(self.samples):
            patches = sum(t * h * w for t, h, w in grids)
            pads = np.full(patches // vision.merge_unit, self.model.image_token_id, np.int32)
            words = rng.integers(0, first_special, text, dtype=np.int32)
            positions = [patch_positions(i, h, w, merge) for t, h, w in grids for i in range(t)]
            made.append(
                EncodedSample(
                    id=str(number),
                    source="random",
                    file="",
                    line=number,
                    task="",
                    tokens=np.concatenate([pads, words]),
                    loss_mask=np.repeat([False, True], [len(pads), text]),
                    windows=np.asarray(self.windows(grids), np.int32),
                    patches=rng.integers(0, 256, (patches, vision.patch_dim), dtype=np.uint8),
                    patch_positions=np.concatenate([np.zeros((0, 3), np.int32), *positions]),
                )
            )
        return made


def read_case(path: str) -> Case:
    """Raises ConfigError with one sentence if the file is not a case."""
    try:
        raw = json.loads(pathlib.Path(path).read_text())
    except OSError as e:
        raise ConfigError(f"The case {path} cannot be read: {e.strerror}.") from e
    except ValueError as e:
        raise ConfigError(f"The case {path} is not JSON: {e}.") from e
    _fields(raw, f"The case {path}", {"vocab", "threads", "text", "vision", "samples"})
    for name in ("vocab", "threads"):
        if not _whole(raw[name]):
            raise ConfigError(f"The case's {name} is {raw[name]!r}; it must be a positive number.")
    vocab = raw["vocab"]
    if vocab < 8:
        raise ConfigError(f"The case's vocab is {vocab}; it must be at least 8: four are special.")
    text = _config(TextConfig, raw["text"], "text", vocab_size=vocab)
    vision = _config(VisionConfig, raw["vision"], "vision")
    names = ("image", "video", "vision_start", "vision_end")
    ids = {f"{name}_token_id": vocab - 4 + i for i, name in enumerate(names)}
    model = ModelConfig(vision=vision, text=text, **ids)
    if not isinstance(raw["samples"], list) or not raw["samples"]:
        raise ConfigError("The case's samples must be a list with at least one sample.")
    samples = [_sample(s, i, vision.spatial_merge_size) for i, s in enumerate(raw["samples"])]
    return Case(model, raw["threads"], tuple(samples))


def _fields(raw: Any, where: str, wanted: set[str]) -> None:
    if not isinstance(raw, Mapping) or set(raw) != wanted:
        has = sorted(raw) if isinstance(raw, Mapping) else type(raw).__name__
        raise ConfigError(f"{where} must have the fields {sorted(wanted)}, but has {has}.")


def _config(kind: type, raw: Any, where: str, **given: Any) -> Any:
    fields = {f.name: f for f in dataclasses.fields(kind) if f.name not in given}
    needed = {name for name, f in fields.items() if f.default is dataclasses.MISSING}
    if not isinstance(raw, Mapping):
        raise ConfigError(f"The case's {where} must be a set of fields, but is {raw!r}.")
    if unknown := sorted(set(raw) - set(fields)):
        raise ConfigError(f"The case's {where} has no field {', '.join(unknown)}.")
    if missing := sorted(needed - set(raw)):
        raise ConfigError(f"The case's {where} lacks {', '.join(missing)}.")
    try:
        return kind(**raw, **given)
    except TypeError as e:
        raise ConfigError(f"The case's {where} has a value of the wrong type: {e}.") from e


def _whole(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _sample(raw: Any, number: int, merge: int) -> tuple[tuple[Grid, ...], int]:
    where = f"Sample {number} of the case is {raw!r}"
    good = isinstance(raw, list) and len(raw) == 2 and isinstance(raw[0], list) and _whole(raw[1])
    if not good:
        raise ConfigError(f"{where}; it must be [grids, text tokens], with at least one token.")
    for grid in raw[0]:
        if not (isinstance(grid, list) and len(grid) == 3 and all(_whole(n) for n in grid)):
            raise ConfigError(f"{where}; a grid must be [frames, rows, columns] of patches.")
        if grid[1] % merge or grid[2] % merge:
            raise ConfigError(f"{where}; rows and columns must be multiples of the merge {merge}.")
    return tuple(tuple(grid) for grid in raw[0]), raw[1]
