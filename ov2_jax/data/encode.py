"""From a record to tokens, loss mask, patches and windows; every bad sample becomes a Rejected.

A sample that does not fit (more tokens than a text row, a window larger than every vision row, more
windows than a pack's vision rows hold) is rejected with a sentence that names the remedy. With
on_long="drop_rounds" its last question-answer rounds are left out, with their pictures, until the
rest fits, and `dropped_rounds` says how many.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from ov2_jax.data import chat as chat_lib
from ov2_jax.data import images as images_lib
from ov2_jax.data.config import DataConfig, PackConfig
from ov2_jax.data.errors import Rejected, SampleError
from ov2_jax.data.media import Media
from ov2_jax.data.packing import SampleSize, fits_alone
from ov2_jax.data.records import RawRecord, Record, parse_record, raw_id
from ov2_jax.data.sample import EncodedSample
from ov2_jax.data.tokenizer import check_tokenizer, token_ids
from ov2_jax.data.video import Clip, Sampling, read_clip
from ov2_jax.model.config import ConfigError, ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Picture = Media | Image.Image | np.ndarray  # a path or bytes, a picture, or uint8 [H W 3]
Video = Media | Clip

_SIZE_REASONS = ("too_long", "window_too_large", "too_many_patches")


class _Medium(NamedTuple):
    """A picture or clip: the text that stands for it and its patches."""

    text: str
    counts: list[int]  # tokens of each of the text's placeholders
    windows: list[int]
    patches: list[np.ndarray]
    positions: list[np.ndarray]


class _Media(NamedTuple):
    """Media in the order of their marks, and how clips are written."""

    images: Iterator[Picture]
    videos: Iterator[tuple[Video, float | None]]  # with the fps that the sample states
    decimals: int
    frame_form: str


class _Size:
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


class SampleEncoder:
    """Callable on a RawRecord. Holds no state, so threads and worker processes can share it.

    Without a PackConfig nothing is too large.
    """

    def __init__(
        self,
        data: DataConfig,
        model: ModelConfig,
        tokenizer: "PreTrainedTokenizerFast",
        pack: PackConfig | None = None,
    ) -> None:
        if model.vision.num_channels != 3:
            raise ConfigError(
                f"vision_config.num_channels is {model.vision.num_channels}; pictures are read as "
                "RGB, so it must be 3."
            )
        check_tokenizer(tokenizer, model)
        if pack is not None:
            pack.check(model)
        self._data, self._model, self._tokenizer, self._pack = data, model, tokenizer, pack
        self._sampling = Sampling(data.num_frames, data.target_fps, data.max_frames)

    def __call__(self, raw: RawRecord) -> EncodedSample | Rejected:
        try:
            return self.encode(parse_record(raw))
        except SampleError as error:
            reason, detail = error.reason, error.detail
        except MemoryError:
            raise
        except Exception as error:  # one odd sample must not end a run of days; it is counted
            reason, detail = "internal_error", f"{type(error).__name__}: {error}"
        return Rejected(reason, detail, raw_id(raw), raw.file, raw.line)

    def encode(self, record: Record) -> EncodedSample:
        """A whole training sample. Raises SampleError."""
        sample = self._encode(
            record.messages,
            record.images,
            record.videos,
            prompt=False,
            frame_form=self._data.frame_form,
            fps=record.fps,
            timestamp_decimal=record.timestamp_decimal,
        )
        return sample._replace(
            id=record.id,
            source=record.source,
            file=record.file,
            line=record.line,
            task=record.task,
        )

    def encode_prompt(
        self,
        messages: Sequence[Mapping[str, str]],
        images: Sequence[Picture] = (),
        videos: Sequence[Video] = (),
        *,
        frame_form: str | None = None,
        whole_text: bool = False,
        fps: Sequence[float] = (),
        timestamp_decimal: int | None = None,
    ) -> EncodedSample:
        """Everything up to the assistant's header, for messages that end with a question.

        By default exactly the tokens that training would have seen. `frame_form="hf"` and
        `whole_text=True` (one string tokenised at once) give what the Hugging Face processor does.
        `fps`: none, one for all clips, or one a clip. Raises SampleError.
        """
        return self._encode(
            messages,
            images,
            videos,
            prompt=True,
            frame_form=frame_form or self._data.frame_form,
            whole_text=whole_text,
            fps=fps,
            timestamp_decimal=timestamp_decimal,
        )

    def _encode(
        self,
        messages: Sequence[Mapping[str, str]],
        images: Sequence[Picture],
        videos: Sequence[Video],
        *,
        prompt: bool,
        frame_form: str,
        whole_text: bool = False,
        fps: Sequence[float],
        timestamp_decimal: int | None,
    ) -> EncodedSample:
        messages = self._match_marks(messages, len(images), len(videos))
        chat = chat_lib.parse_chat(messages, self._data.system_prompt, prompt=prompt)
        rates = list(fps) * len(videos) if len(fps) == 1 else list(fps) or [None] * len(videos)
        decimals = self._data.timestamp_decimal if timestamp_decimal is None else timestamp_decimal
        media = _Media(iter(images), iter(zip(videos, rates, strict=True)), decimals, frame_form)
        size = _Size(self._pack)
        ids, masks, used, dropped = [], [], [], 0
        rounds = []
        for number, round_ in enumerate(chat.rounds):
            try:
                round_, mediums = self._place_media(round_, media, size)
                pieces = chat_lib.round_pieces(number, round_, chat.system)
                round_ids, round_mask = self._tokenize(pieces, mediums)
                size.add(len(round_ids), [w for medium in mediums for w in medium.windows])
            except SampleError as error:
                droppable = number and not prompt and self._data.on_long == "drop_rounds"
                if error.reason not in _SIZE_REASONS or not droppable:
                    raise
                dropped = len(chat.rounds) - number
                break
            rounds.append(round_)
            ids.append(round_ids)
            masks.append(round_mask)
            used.extend(mediums)
        if whole_text:
            text = chat_lib.prompt_text(chat._replace(rounds=tuple(rounds)))
            tokens, mask = self._tokenize([chat_lib.Piece(text, False)], used)
        else:
            tokens, mask = np.concatenate(ids), np.concatenate(masks)
        nothing = [np.zeros((0, self._model.vision.patch_dim), np.uint8)]
        nowhere = [np.zeros((0, 3), np.int32)]
        return EncodedSample(
            id="",
            source="",
            file="",
            line=0,
            task="",
            tokens=tokens,
            loss_mask=mask,
            windows=np.array(size.windows, np.int32),
            patches=np.concatenate(nothing + [p for m in used for p in m.patches]),
            patch_positions=np.concatenate(nowhere + [p for m in used for p in m.positions]),
            dropped_rounds=dropped,
        )

    def _match_marks(
        self, messages: Sequence[Mapping[str, str]], images: int, videos: int
    ) -> Sequence[Mapping[str, str]]:
        """Marks and media must agree in number; or all pictures go first, if that is asked for."""
        marks = [mark for m in messages for mark in chat_lib.MARK.findall(m["content"])]
        found = marks.count("image"), marks.count("video")
        if found == (images, videos):
            return messages
        can_prepend = images and found[1] == videos and self._data.on_image_mismatch == "prepend"
        asked = next((i for i, m in enumerate(messages) if m["role"] == "user"), None)
        if not can_prepend or asked is None:
            raise SampleError(
                "placeholder_mismatch",
                f"{found[0]} <image> marks for {images} pictures and {found[1]} <video> marks for "
                f"{videos} clips",
            )
        messages = [m | {"content": m["content"].replace("<image>", "")} for m in messages]
        question = messages[asked]["content"].lstrip("\n")
        pictures = "\n".join(["<image>"] * images)
        messages[asked] = messages[asked] | {"content": f"{pictures}\n{question}"}
        return messages

    def _place_media(
        self, round_: chat_lib.Round, media: _Media, size: _Size
    ) -> tuple[chat_lib.Round, list[_Medium]]:
        """The round with its media's text in place of the marks, and the media in order."""
        used: list[_Medium] = []

        def replacement(kind: str) -> str:
            if kind == "image":
                used.append(self._image(next(media.images)))
            else:
                video, fps = next(media.videos)
                used.append(self._video(video, fps, media, size))
            return used[-1].text

        return round_._replace(question=chat_lib.replace_marks(round_.question, replacement)), used

    def _tokenize(
        self, pieces: Sequence[chat_lib.Piece], mediums: Sequence[_Medium]
    ) -> tuple[np.ndarray, np.ndarray]:
        """int32 ids [n] with expanded placeholders and the bool loss mask [n]."""
        ids = [token_ids(self._tokenizer, piece.text) for piece in pieces]
        supervised = [piece.supervised for piece in pieces]
        tokens = np.array([i for piece_ids in ids for i in piece_ids], np.int32)
        mask = np.repeat(supervised, [len(piece_ids) for piece_ids in ids]).astype(bool)
        counts = [n for medium in mediums for n in medium.counts]
        repeats = chat_lib.pad_repeats(tokens, counts, self._model.image_token_id)
        return np.repeat(tokens, repeats), np.repeat(mask, repeats)

    # --- media ------------------------------------------------------------------------------------

    def _image(self, picture: Picture) -> _Medium:
        vision = self._model.vision
        image = _open(picture)
        height, width = self._target(
            image.height, image.width, self._data.min_pixels, self._data.max_pixels
        )
        h, w = height // vision.patch_size, width // vision.patch_size
        pixels = images_lib.resize(image, height, width)
        return _Medium(
            text=chat_lib.IMAGE_TEXT,
            counts=[h * w // vision.merge_unit],
            windows=[h * w],
            patches=[images_lib.patchify(pixels, vision.patch_size, vision.spatial_merge_size)],
            positions=[images_lib.patch_positions(0, h, w, vision.spatial_merge_size)],
        )

    def _video(self, video: Video, fps: float | None, media: _Media, size: _Size) -> _Medium:
        vision = self._model.vision
        patch, merge = vision.patch_size, vision.spatial_merge_size
        together = vision.frame_windows_size if media.frame_form == "training" else 1

        def windows(frames: int, height: int, width: int) -> list[int]:
            area = height * width // patch**2
            return [min(together, frames - i) * area for i in range(0, frames, together)]

        def target_size(frames: int, height: int, width: int) -> tuple[int, int]:
            height, width = self._target(height, width, *self._data.frame_pixels)
            sizes = windows(frames, height, width)
            # Two tokens a frame beside the placeholders are certain, timestamps come on top.
            size.check(sum(sizes) // vision.merge_unit + 2 * frames, sizes)
            return height, width

        if isinstance(video, Media):
            clip = read_clip(
                video,
                self._sampling,
                timeout_s=self._data.decode_timeout_s,
                target_size=target_size,
                fps=fps,
            )
            frames = clip.frames
        else:
            clip, opened = video, [_open(frame) for frame in video.frames]
            if not opened or not len(opened) == len(clip.frame_numbers) == len(clip.seconds):
                raise SampleError("bad_video", "a clip needs frames, each with its number and time")
            to = target_size(len(opened), opened[0].height, opened[0].width)
            frames = [images_lib.resize(frame, *to) for frame in opened]
        height, width = frames[0].shape[:2]
        h, w = height // patch, width // patch
        text = [
            chat_lib.frame_text(
                seconds if self._data.timestamps else None,
                media.decimals,
                newline=media.frame_form == "training",
            )
            for seconds in clip.seconds
        ]
        return _Medium(
            text="".join(text),
            counts=[h * w // vision.merge_unit] * len(frames),
            windows=windows(len(frames), height, width),
            patches=[images_lib.patchify(frame, patch, merge) for frame in frames],
            positions=[images_lib.patch_positions(t, h, w, merge) for t in clip.frame_numbers],
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
