"""Pictures and clips as the model gets them: text and windows first, pixels last.

Text and sizes come from headers if these state them; a function of every picture and clip loads the
pixels. So a sample's exact length is found without decoding its pictures, by the same code that
encodes it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Real, UInt8
from PIL import Image

from ov2_jax.config.data import DataConfig
from ov2_jax.config.model import ModelConfig
from ov2_jax.config.pack import PackConfig
from ov2_jax.core.errors import describe
from ov2_jax.data.encoding import chat as chat_lib
from ov2_jax.data.encoding import images as images_lib
from ov2_jax.data.encoding.budget import SampleBudget
from ov2_jax.data.encoding.codec import (
    FileScores,
    TooFewFrames,
    codec_config,
    read_codec_clip,
    read_pictures,
    read_positions,
    time_runs,
)
from ov2_jax.data.encoding.video import Clip, FrameSampling, read_clip, read_header
from ov2_jax.data.rejected import SampleError
from ov2_jax.data.sources.media import WHOLE, Media, Section, check_exists
from ov2_jax.data.sources.records import Canvases, ClipPart

Picture = Media | Image.Image | np.ndarray  # an array must be uint8 [height width 3]
Video = Media | Clip | Canvases | ClipPart


class MarkedClip(NamedTuple):
    """The clip of a <video> mark, with the facts that its sample states of it."""

    video: Video
    fps: float | None
    bit_cost: Media | None
    video_input: str  # "uniform" or "codec"


class Pixels(NamedTuple):
    patches: UInt8[np.ndarray, "P values"]
    positions: Int32[np.ndarray, "P 3"]


class Encodable(NamedTuple):
    """A picture or clip: the text that stands for it, its windows, and a loader of its pixels."""

    text: str
    counts: list[int]  # tokens of each of the text's placeholders
    windows: list[int]  # patches of each window
    load: Callable[[], Pixels]
    uniform_fallback: bool = False  # too short for codec-style reading


class MediaEncoder:
    """Makes pictures and clips Encodable, with the settings of a DataConfig.

    With `headers_only` nothing is decoded that only the pixels need, and they must not be loaded.
    """

    def __init__(self, data: DataConfig, model: ModelConfig, pack: PackConfig | None) -> None:
        self._data, self._model = data, model
        self._sampling = FrameSampling(data.num_frames, data.target_fps, data.max_frames)
        self._codec = codec_config(data, model, pack)

    def picture(self, picture: Picture, *, headers_only: bool) -> Encodable:
        """Raises SampleError."""
        vision = self._model.vision
        image: Image.Image | None = None
        if headers_only and isinstance(picture, Media):
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

        return Encodable(chat_lib.IMAGE_TEXT, [h * w // vision.merge_unit], [h * w], load)

    def clip(
        self, clip: MarkedClip, budget: SampleBudget, decimals: int, *, headers_only: bool
    ) -> Encodable:
        """`decimals` are those of its timestamps. A clip that cannot fit into `budget` is rejected
        before it is decoded. Raises SampleError."""
        video, section = clip.video, WHOLE
        if isinstance(video, Canvases):
            return self._canvases(video, clip.fps, budget, decimals)
        if isinstance(video, ClipPart):
            video, section = video
        if not isinstance(video, Clip) and clip.video_input == "codec":
            try:
                return self._codec_clip(video, section, clip.fps, clip.bit_cost, budget, decimals)
            except TooFewFrames:
                frames = self._frames(video, section, clip.fps, budget, decimals, headers_only)
                return frames._replace(uniform_fallback=True)
        return self._frames(video, section, clip.fps, budget, decimals, headers_only)

    def _frames(
        self,
        video: Media | Clip,
        section: Section,
        fps: float | None,
        budget: SampleBudget,
        decimals: int,
        headers_only: bool,
    ) -> Encodable:
        """Uniform frames, each whole."""
        vision = self._model.vision
        patch, merge = vision.patch_size, vision.spatial_merge_size
        training = self._data.frame_form == "training"
        together = vision.frame_windows_size if training else 1

        def windows(frames: int, height: int, width: int) -> list[int]:
            area = height * width // patch**2
            return [min(together, frames - i) * area for i in range(0, frames, together)]

        def target_size(frames: int, height: int, width: int) -> tuple[int, int]:
            height, width = self._target(height, width, *self._data.frame_pixels)
            sizes = windows(frames, height, width)
            # A frame has two tokens in addition to its placeholders; its timestamp adds more.
            budget.check(sum(sizes) // vision.merge_unit + 2 * frames, sizes)
            return height, width

        frames: list[np.ndarray] = []
        if isinstance(video, Clip):
            clip, opened = video, [_open(frame) for frame in video.frames]
            if not opened or not len(opened) == len(clip.frame_numbers) == len(clip.seconds):
                raise SampleError("bad_video", "a clip needs frames, each with its number and time")
            height, width = target_size(len(opened), opened[0].height, opened[0].width)
            frames = [images_lib.resize(frame, height, width) for frame in opened]
            numbers, seconds = clip.frame_numbers, clip.seconds
        elif headers_only:
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

        return Encodable(
            text=self._timed_placeholders(seconds, decimals, newline=training),
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
        budget: SampleBudget,
        decimals: int,
    ) -> Encodable:
        """The parts of many frames that cost the video codec most bits."""
        unit = self._model.vision.merge_unit

        def check(groups: int, patches: int) -> None:
            # A timestamp's run has at least two tokens in addition to its placeholders.
            budget.check(groups * (patches // unit + 2), [patches] * groups)

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
        return Encodable(
            text=self._timed_placeholders(numbers / clip.fps, decimals, newline=True),
            counts=counts.tolist(),
            windows=clip.windows.tolist(),
            load=lambda: Pixels(clip.patches, clip.positions),
        )

    def _canvases(
        self, clip: Canvases, fps: float | None, budget: SampleBudget, decimals: int
    ) -> Encodable:
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
            text = self._timed_placeholders(numbers / fps, decimals, newline=True)
        budget.check(int(counts.sum()) + 2 * len(counts), assets.windows.tolist())
        return Encodable(
            text=text,
            counts=counts.tolist(),
            windows=assets.windows.tolist(),
            load=lambda: Pixels(read_pictures(clip.images, assets, **options), assets.positions),
        )

    def _timed_placeholders(
        self,
        seconds: Sequence[float] | Real[np.ndarray, " runs"],
        decimals: int,
        *,
        newline: bool,
    ) -> str:
        """The placeholders of frames, or of runs of equal t, with their times."""
        return "".join(
            chat_lib.frame_text(
                float(time) if self._data.timestamps else None, decimals, newline=newline
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
                "bad_image",
                f"an array must be uint8 [height width 3], not {picture.dtype} {picture.shape}",
            )
        return Image.fromarray(picture)
    return images_lib.to_rgb(picture)
