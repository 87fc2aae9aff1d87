"""Data sets and their mixture, and how samples are read and encoded."""

import dataclasses
from collections.abc import Iterable
from pathlib import PurePath

from ov2_jax.config.checks import check_field, is_whole
from ov2_jax.config.codec import CodecConfig
from ov2_jax.core.errors import ConfigError
from ov2_jax.core.files import check_scheme, parent

# How a data set's clips are read. "alternate": a coin from the seed, thrown once for every sample,
# chooses between the two.
VIDEO_INPUTS = ("uniform", "codec", "alternate")

# The format of a file, by its suffix.
FORMATS = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".parquet": "parquet",
    ".tar": "tar",
    ".array_record": "array_record",
    ".arrayrecord": "array_record",
}


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """A data set of one format, or a group of data sets.

    A data set has a `path`, and a group has `sources`. `epochs`, `cap` and `weight` are the share
    that training reads, next to the siblings in the same group; either all siblings have a weight,
    or none has.

    Attributes:
      path: a file, or several by a pattern (`shards/*.parquet`); local, or remote (`gs://...`, see
        core/files.py). For TensorFlow Datasets the folder of a version.
      root: the folder that the samples' media paths are relative to, the file's own folder unless
        set. No path may lead out of it.
      name: what metrics and sample ids call the data set; unless set, the name of the file or of
        the TFDS data set.
      format: a value of FORMATS, which the suffix gives unless set, or "tfds" for a folder that
        TensorFlow Datasets wrote.
      split: of a TFDS folder; "train" unless set.
      video: how its clips are read: as "uniform" frames, codec-style ("codec"), or either by a
        seeded coin ("alternate").
      sources: the data sets and groups of a group.
      weight: the share of the samples that the siblings give together.
      epochs: how often each sample is read in an epoch of the mixture; 1 unless set, and 0.5 is
        every second sample.
      cap: the most samples in an epoch of the mixture.

    Raises:
      ConfigError: a value is not allowed, or the suffix gives no format.
    """

    path: str = ""
    root: str | None = None
    name: str | None = None
    format: str | None = None
    split: str | None = None
    video: str = "uniform"
    sources: tuple["SourceConfig", ...] = ()
    weight: float | None = None
    epochs: float | None = None
    cap: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(self.sources))

        def check(name: str, good: bool, remedy: str) -> None:
            check_field("source", name, getattr(self, name), good, remedy)

        if self.sources:
            for name in ("path", "root", "format", "split"):
                check(name, not getattr(self, name), "left out if `sources` makes it a group")
            check_siblings("source", self.sources)
        else:
            for path in (self.path, self.root or ""):
                check_scheme(path)
            known = tuple(FORMATS)
            good = self.format is not None or PurePath(self.path).suffix in known
            check("path", good, f"a {', '.join(known[:-1])} or {known[-1]} file")
            kinds = sorted({*FORMATS.values(), "tfds"})
            check("format", self.kind in kinds, f"one of {kinds} or None")
            check("split", self.split is None or self.kind == "tfds", "None unless format is tfds")
        check("video", self.video in VIDEO_INPUTS, f"one of {VIDEO_INPUTS}")
        for name in ("weight", "epochs"):
            value = getattr(self, name)
            check(name, value is None or 0 < value < float("inf"), "a positive number or None")
        check("cap", self.cap is None or (is_whole(self.cap) and self.cap > 0), "positive or None")
        alone = self.weight is None or (self.epochs is None and self.cap is None)
        check("weight", alone, "None if epochs or cap is set: only one of them can rule")

    @property
    def kind(self) -> str:
        return self.format or FORMATS[PurePath(self.path).suffix]

    def root_of(self, file: str) -> str:
        """The folder that media paths in a file are relative to."""
        return parent(file) if self.root is None else self.root

    @property
    def title(self) -> str:
        if self.name is not None:
            return self.name
        path = PurePath(self.path)
        return path.parent.name if self.kind == "tfds" else path.stem  # .../NAME/1.0.0


def check_siblings(owner: str, sources: tuple[SourceConfig, ...]) -> None:
    """Raises ConfigError unless all are SourceConfigs, and all or none have a weight."""
    good = all(isinstance(source, SourceConfig) for source in sources)
    check_field(owner, "sources", sources, good, "a sequence of SourceConfig")
    weights = [source.weight for source in sources]
    if None in weights and any(w is not None for w in weights):
        raise ConfigError(
            f"{owner}.sources has the weights {weights}; give every one of them a weight, or none."
        )


def leaves(sources: Iterable[SourceConfig]) -> list[SourceConfig]:
    """The data sets of all groups, in order."""
    return [leaf for s in sources for leaf in (leaves(s.sources) if s.sources else [s])]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """How samples are read and encoded. Areas are in pixels, times in seconds.

    Attributes:
      sources: the data sets. Training needs them; generation brings its own pictures and clips.
      min_pixels, max_pixels: the bounds of a picture's area after resizing.
      frame_min_pixels, frame_max_pixels: the same of a frame; `min_pixels` and `max_pixels` unless
        set.
      target_fps: frames a second that are read of a clip, at most `max_frames` in all.
      num_frames: frames that are read of a clip; not together with target_fps.
      max_frames: the most frames of a clip. If neither target_fps nor num_frames is set, a clip
        under 10 s gives 8 frames, one under 30 s gives 16, and a longer one max_frames.
      frame_form: "training" gives the encoder windows of several frames and writes a newline after
        every frame; "hf" is the Hugging Face processor's form, in which each frame is a window of
        its own, without newline.
      timestamps: whether the time is written before each frame.
      timestamp_decimal: decimals of these times, 0 to 6.
      codec: how clips of sources with video="codec" or "alternate" are read; its patch and
        block_size are the model's patch and merge size.
      system_prompt: for samples without a system turn; "" for none.
      on_long: what is done with a sample that does not fit: "reject", or "drop_rounds" to leave out
        its last rounds (see data/encoding/sample_encoder.py).
      on_image_mismatch: what is done if marks and pictures differ in number: "reject", or "prepend"
        to delete the marks and put all pictures before the first question.
      shuffle: whether each epoch has a new order, from the seed.
      plan: the folder that ov2_jax.data.prepare wrote; None packs with a look-ahead.
      lookahead: without a plan, the samples that wait in memory for the packer to choose from.
      num_workers: processes that decode and tokenise; 0 for threads in this process.
      decode_timeout_s: the longest time that decoding a clip may take.
      max_reject_share: a larger share of rejected samples ends the run.
      reject_check_after: samples that are read before max_reject_share holds, or an epoch, if that
        is less.

    Raises:
      ConfigError: a value is not allowed.
    """

    sources: tuple[SourceConfig, ...] = ()
    min_pixels: int = 56 * 56
    max_pixels: int = 1280 * 28 * 28
    frame_min_pixels: int | None = None
    frame_max_pixels: int | None = None
    num_frames: int | None = None
    target_fps: float | None = None
    max_frames: int = 384
    frame_form: str = "training"
    timestamps: bool = True
    timestamp_decimal: int = 1
    codec: CodecConfig = CodecConfig()
    system_prompt: str = "You are a helpful assistant."
    on_long: str = "reject"
    on_image_mismatch: str = "reject"
    shuffle: bool = True
    plan: str | None = None
    num_workers: int = 0
    lookahead: int = 64
    decode_timeout_s: float = 60.0
    max_reject_share: float = 0.1
    reject_check_after: int = 200

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(self.sources))

        def check(name: str, good: bool, remedy: str) -> None:
            check_field("data", name, getattr(self, name), good, remedy)

        check_siblings("data", self.sources)
        for name in ("min_pixels", "max_pixels", "max_frames", "lookahead", "reject_check_after"):
            value = getattr(self, name)
            check(name, is_whole(value) and value > 0, "a positive whole number")
        for name in ("frame_min_pixels", "frame_max_pixels", "num_frames"):
            value = getattr(self, name)
            check(
                name, value is None or (is_whole(value) and value > 0), "a positive number or None"
            )
        check("max_pixels", self.max_pixels >= self.min_pixels, f"at least {self.min_pixels}")
        low, high = self.frame_pixels
        check("frame_max_pixels", high >= low, f"at least frame_min_pixels, {low}")
        check(
            "target_fps",
            self.target_fps is None or self.target_fps > 0,
            "a positive number of frames a second, or None",
        )
        check(
            "num_frames",
            self.num_frames is None or self.target_fps is None,
            "None if target_fps is set: only one of them can rule",
        )
        check("frame_form", self.frame_form in ("training", "hf"), "'training' or 'hf'")
        check("timestamp_decimal", self.timestamp_decimal in range(7), "0 to 6 decimals")
        check("on_long", self.on_long in ("reject", "drop_rounds"), "'reject' or 'drop_rounds'")
        check(
            "on_image_mismatch",
            self.on_image_mismatch in ("reject", "prepend"),
            "'reject' or 'prepend'",
        )
        check(
            "num_workers",
            is_whole(self.num_workers) and self.num_workers >= 0,
            "0 (threads) or a number of processes",
        )
        check("decode_timeout_s", self.decode_timeout_s > 0, "a positive number of seconds")
        check("max_reject_share", 0 <= self.max_reject_share <= 1, "between 0 and 1")

    @property
    def frame_pixels(self) -> tuple[int, int]:
        """Smallest and largest area of a frame."""
        return (
            self.min_pixels if self.frame_min_pixels is None else self.frame_min_pixels,
            self.max_pixels if self.frame_max_pixels is None else self.frame_max_pixels,
        )
