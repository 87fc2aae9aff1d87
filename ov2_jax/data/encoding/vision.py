"""Pictures and clips as the model gets them: text and windows first, pixels last.

Text and sizes come from headers where they tell them; pixels are read by a function that every
medium brings. So a sample's exact length is known without decoding its pictures, and it is the same
code that encodes it.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from ov2_jax.config.data import DataConfig, leaves
from ov2_jax.config.model import ModelConfig
from ov2_jax.config.pack import PackConfig
from ov2_jax.core.errors import ConfigError, describe
from ov2_jax.data.encoding import chat as chat_lib
from ov2_jax.data.encoding import images as images_lib
from ov2_jax.data.encoding.codec import (
    CodecConfig,
    FileScores,
    TooFewFrames,
    read_codec_clip,
    read_pictures,
    read_positions,
    time_runs,
)
from ov2_jax.data.encoding.video import Clip, Sampling, read_clip, read_header
from ov2_jax.data.packing.placement import fits_alone
from ov2_jax.data.rejected import SampleError
from ov2_jax.data.sample import SampleSize
from ov2_jax.data.sources.media import WHOLE, Media, Section, check_exists
from ov2_jax.data.sources.records import Canvases, ClipPart

Picture = Media | Image.Image | np.ndarray  # a path or bytes, a picture, or uint8 [H W 3]
Video = Media | Clip | Canvases | ClipPart

SIZE_REASONS = ("too_long", "window_too_large", "too_many_patches")


class Pixels(NamedTuple):
    patches: np.ndarray  # uint8 [P C*p*p]
    positions: np.ndarray  # int32 [P 3]


class Medium(NamedTuple):
    """A picture or clip: the text that stands for it, its windows, and how to get its patches."""

    text: str
    counts: list[int]  # tokens of each of the text's placeholders
    windows: list[int]
    load: Callable[[], Pixels]
    fallback: bool = False  # too short for codec-style reading


class MediaRequest(NamedTuple):
    """What is wanted of a sample's media."""

    images: Sequence[Picture]
    videos: Sequence[Video]
    frame_form: str
    fps: Sequence[float] = ()  # none, one for all clips, or one a clip
    timestamp_decimal: int | None = None
    video_input: str = "uniform"  # or codec
    bit_costs: Sequence[Media] = ()  # none, or one a clip
    headers_only: bool = False  # pictures and uniform frames will not be loaded


class MediaQueue(NamedTuple):
    """Media in the order of their marks, and how they are read."""

    images: Iterator[Picture]
    # With the fps that the sample states, and its bit costs.
    videos: Iterator[tuple[Video, float | None, Media | None]]
    decimals: int
    request: MediaRequest


class SampleBudget:
    """Tokens and windows so far, and whether they can still be packed."""

    def __init__(self, pack: PackConfig | None) -> None:
        self._pack = pack
        self.tokens = 0
        self.windows: list[int] = []

    def check(self, tokens: int, windows: Sequence[int]) -> None:
        """Raises SampleError if so many more tokens and windows make the sample too large."""
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
        self.check(tokens, windows)
        self.tokens += tokens
        self.windows.extend(windows)


class VisionReader:
    """Reads pictures and clips as a DataConfig says; see SampleEncoder."""

    def __init__(self, data: DataConfig, model: ModelConfig, pack: PackConfig | None) -> None:
        self._data, self._model = data, model
        self._sampling = Sampling(data.num_frames, data.target_fps, data.max_frames)
        self._codec = _codec_of(data, model, pack)

    def image(self, picture: Picture, media: MediaQueue) -> Medium:
        vision = self._model.vision
        image: Image.Image | None = None
        if media.request.headers_only and isinstance(picture, Media):
            size = images_lib.image_size(picture)
        else:
            image = _open(picture)
            size = image.height, image.width
        height, width = self._target(*size, self._data.min_pixels, self._data.max_pixels)
        h, w = height // vision.patch_size, width // vision.patch_size

        def load() -> Pixels:
            pixels = images_lib.resize(image or _open(picture), height, width)
            return Pixels(
                images_lib.patchify(pixels, vision.patch_size, vision.spatial_merge_size),
                images_lib.patch_positions(0, h, w, vision.spatial_merge_size),
            )

        return Medium(chat_lib.IMAGE_TEXT, [h * w // vision.merge_unit], [h * w], load)

    def video(
        self,
        video: Video,
        fps: float | None,
        bit_cost: Media | None,
        media: MediaQueue,
        size: SampleBudget,
    ) -> Medium:
        if isinstance(video, Canvases):
            return self._canvases(video, fps, media, size)
        section = WHOLE
        if isinstance(video, ClipPart):
            video, section = video
        if isinstance(video, Clip) or media.request.video_input == "uniform":
            return self._uniform(video, section, fps, media, size)
        try:
            return self._codec_clip(video, section, fps, bit_cost, media, size)
        except TooFewFrames:
            return self._uniform(video, section, fps, media, size)._replace(fallback=True)

    def _uniform(
        self,
        video: Media | Clip,
        section: Section,
        fps: float | None,
        media: MediaQueue,
        size: SampleBudget,
    ) -> Medium:
        """Uniform frames, each whole."""
        vision = self._model.vision
        patch, merge = vision.patch_size, vision.spatial_merge_size
        training = media.request.frame_form == "training"
        together = vision.frame_windows_size if training else 1

        def windows(frames: int, height: int, width: int) -> list[int]:
            area = height * width // patch**2
            return [min(together, frames - i) * area for i in range(0, frames, together)]

        def target_size(frames: int, height: int, width: int) -> tuple[int, int]:
            height, width = self._target(height, width, *self._data.frame_pixels)
            sizes = windows(frames, height, width)
            # Two tokens a frame beside the placeholders are certain, timestamps come on top.
            size.check(sum(sizes) // vision.merge_unit + 2 * frames, sizes)
            return height, width

        frames: list[np.ndarray] = []
        if isinstance(video, Clip):
            clip, opened = video, [_open(frame) for frame in video.frames]
            if not opened or not len(opened) == len(clip.frame_numbers) == len(clip.seconds):
                raise SampleError("bad_video", "a clip needs frames, each with its number and time")
            height, width = target_size(len(opened), opened[0].height, opened[0].width)
            frames = [images_lib.resize(frame, height, width) for frame in opened]
            numbers, seconds = clip.frame_numbers, clip.seconds
        elif media.request.headers_only:
            header = read_header(
                video,
                self._sampling,
                timeout_s=self._data.decode_timeout_s,
                fps=fps,
                section=section,
            )
            numbers, seconds = header.numbers, header.seconds
            height, width = target_size(len(numbers), header.height, header.width)
        else:
            clip = read_clip(
                video,
                self._sampling,
                timeout_s=self._data.decode_timeout_s,
                target_size=target_size,
                fps=fps,
                section=section,
            )
            frames, numbers, seconds = list(clip.frames), clip.frame_numbers, clip.seconds
            height, width = frames[0].shape[:2]
        h, w = height // patch, width // patch

        def load() -> Pixels:
            return Pixels(
                np.concatenate([images_lib.patchify(frame, patch, merge) for frame in frames]),
                np.concatenate([images_lib.patch_positions(t, h, w, merge) for t in numbers]),
            )

        return Medium(
            text=self._times(seconds, media, newline=training),
            counts=[h * w // vision.merge_unit] * len(numbers),
            windows=windows(len(numbers), height, width),
            load=load,
        )

    def _codec_clip(
        self,
        video: Media,
        section: Section,
        fps: float | None,
        bit_cost: Media | None,
        media: MediaQueue,
        size: SampleBudget,
    ) -> Medium:
        """The parts of many frames that cost the video codec most bits."""
        unit = self._model.vision.merge_unit

        def check(groups: int, patches: int) -> None:
            # A timestamp's run has at least two tokens beside its placeholders.
            size.check(groups * (patches // unit + 2), [patches] * groups)

        scores = None
        if bit_cost is not None:
            check_exists(bit_cost, "bit-cost file")
            try:
                scores = FileScores(bit_cost)
            except Exception as error:  # NumPy and zipfile raise many classes
                detail = f"{bit_cost} is no file of bit costs: {describe(error)}"
                raise SampleError("bad_record", detail) from error
        clip = read_codec_clip(
            video,
            self._codec,
            timeout_s=self._data.decode_timeout_s,
            scores=scores,
            fps=fps,
            section=section,
            check=check,
        )
        numbers, counts = time_runs(clip.positions, self._model.vision.spatial_merge_size)
        return Medium(
            text=self._times(numbers / clip.fps, media, newline=True),
            counts=counts.tolist(),
            windows=clip.windows.tolist(),
            load=lambda: Pixels(clip.patches, clip.positions),
        )

    def _canvases(
        self, clip: Canvases, fps: float | None, media: MediaQueue, size: SampleBudget
    ) -> Medium:
        """A clip as pictures made beforehand; without fps its text is that of the pictures."""
        vision = self._model.vision
        options = {"patch": vision.patch_size, "merge": vision.spatial_merge_size}
        assets = read_positions(
            clip.positions, len(clip.images), together=vision.frame_windows_size, **options
        )
        numbers, counts = time_runs(assets.positions, vision.spatial_merge_size)
        if fps is None:
            pictures = int(assets.kept.sum())
            text = "\n".join([chat_lib.IMAGE_TEXT] * pictures)
            counts = np.full(pictures, len(assets.positions) // pictures // vision.merge_unit)
        else:
            text = self._times(numbers / fps, media, newline=True)
        size.check(int(counts.sum()) + 2 * len(counts), assets.windows.tolist())
        return Medium(
            text=text,
            counts=counts.tolist(),
            windows=assets.windows.tolist(),
            load=lambda: Pixels(read_pictures(clip.images, assets, **options), assets.positions),
        )

    def _times(
        self, seconds: Sequence[float] | np.ndarray, media: MediaQueue, *, newline: bool
    ) -> str:
        """The placeholders of frames, or of runs of equal t, with their times."""
        return "".join(
            chat_lib.frame_text(
                float(time) if self._data.timestamps else None, media.decimals, newline=newline
            )
            for time in seconds
        )

    def _target(self, height: int, width: int, low: int, high: int) -> tuple[int, int]:
        vision = self._model.vision
        return images_lib.smart_resize(
            height,
            width,
            factor=vision.patch_size * vision.spatial_merge_size,
            min_pixels=low,
            max_pixels=high,
        )


def _open(picture: Picture) -> Image.Image:
    if isinstance(picture, Media):
        return images_lib.load_image(picture)
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise SampleError(
                "bad_image", f"an array must be uint8 [H W 3], not {picture.dtype} {picture.shape}"
            )
        return Image.fromarray(picture)
    return images_lib.to_rgb(picture)


def _codec_of(data: DataConfig, model: ModelConfig, pack: PackConfig | None) -> CodecConfig:
    """The codec's parameters with the model's patches; raises ConfigError if they do not suit."""
    vision = model.vision
    needed = {"patch": vision.patch_size, "block_size": vision.spatial_merge_size}
    for name, value in needed.items():
        given = getattr(data.codec, name)
        if given not in (value, getattr(CodecConfig, name)):
            raise ConfigError(
                f"data.codec.{name} is {given} but the model's is {value}; leave it out."
            )
    codec = dataclasses.replace(data.codec, **needed)
    if all(source.video == "uniform" for source in leaves(data.sources)):
        return codec
    codec.check_even_blocks()
    if pack is not None:
        window = codec.images_per_group * (codec.max_pixels // codec.patch**2)
        widest = pack.vision_rows[-1][1] if pack.vision_rows else 0
        if window > widest:
            raise ConfigError(
                f"data.codec.max_pixels {codec.max_pixels} makes windows of "
                f"{codec.images_per_group} canvases, {window} patches, but the largest vision row "
                f"has {widest}; add a class of rows of at least {window} patches to "
                "pack.vision_rows, or lower data.codec.max_pixels or images_per_group."
            )
    return codec
