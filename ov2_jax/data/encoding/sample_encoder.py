"""From a record to tokens, loss mask, patches and windows; every bad sample becomes a Rejected.

A sample that does not fit (more tokens than a text row, a window larger than every vision row, more
windows than a pack's vision rows hold) is rejected with a sentence that names the remedy. With
on_long="drop_rounds" its last question-answer rounds are left out, with their pictures, until the
rest fits; `dropped_rounds` is their number.

`measure` gives a sample's exact length without decoding its pictures, see media.py.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Int32

from ov2_jax.config.data import DataConfig
from ov2_jax.config.model import ModelConfig
from ov2_jax.config.pack import PackConfig
from ov2_jax.core.errors import ConfigError, describe
from ov2_jax.data.encoding import chat as chat_lib
from ov2_jax.data.encoding.budget import SIZE_REASONS, SampleBudget
from ov2_jax.data.encoding.media import (
    Encodable,
    MarkedClip,
    MediaEncoder,
    Picture,
    Pixels,
    Video,
)
from ov2_jax.data.encoding.tokenizer import Tokenizer, check_tokenizer, token_ids
from ov2_jax.data.rejected import Rejected, SampleError
from ov2_jax.data.sample import EncodedSample, SampleLength
from ov2_jax.data.sources.media import Media
from ov2_jax.data.sources.parsing import parse_record, raw_id
from ov2_jax.data.sources.records import RawRecord, Record

T = TypeVar("T")


class _Encoding(NamedTuple):
    """A sample without its pixels."""

    tokens: Int32[np.ndarray, " n"]
    loss_mask: Bool[np.ndarray, " n"]
    windows: list[int]
    media: list[Encodable]
    dropped_rounds: int

    @property
    def uniform_fallbacks(self) -> int:
        return sum(encodable.uniform_fallback for encodable in self.media)


class SampleEncoder:
    """Callable on a RawRecord. Holds no state, so threads and worker processes can share it.

    Without a PackConfig no sample is too large. `seed` decides the coin of sources with
    video="alternate". Raises ConfigError or DataError if the parts do not suit each other.
    """

    def __init__(
        self,
        data: DataConfig,
        model: ModelConfig,
        tokenizer: Tokenizer,
        pack: PackConfig | None = None,
        *,
        seed: int = 0,
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
        self._media, self._seed = MediaEncoder(data, model, pack), seed

    def __call__(self, raw: RawRecord) -> EncodedSample | Rejected:
        return self._guarded(raw, self.encode)

    def measure(self, raw: RawRecord) -> SampleLength | Rejected:
        """The exact length of the sample that a call gives.

        Pictures and uniform frames are not decoded, so one that breaks in the middle is not
        noticed. Clips that are read codec-style are decoded: their length depends on their content.
        """
        return self._guarded(raw, self._measure)

    def _guarded(self, raw: RawRecord, use: Callable[[Record], T]) -> T | Rejected:
        try:
            return use(parse_record(raw))
        except SampleError as error:
            reason, detail = error.reason, error.detail
        except MemoryError:
            raise
        except Exception as error:  # one odd sample must not end a run of days; it is counted
            reason, detail = "internal_error", describe(error)
        return Rejected(reason, detail, raw_id(raw), raw.file, raw.line)

    def _measure(self, record: Record) -> SampleLength:
        encoding = self._encode_record(record, headers_only=True)
        return SampleLength(
            id=record.id,
            source=record.source,
            file=record.file,
            line=record.line,
            tokens=len(encoding.tokens),
            windows=tuple(encoding.windows),
            dropped_rounds=encoding.dropped_rounds,
            uniform_fallbacks=encoding.uniform_fallbacks,
        )

    def encode(self, record: Record) -> EncodedSample:
        """A whole training sample. Raises SampleError."""
        sample = self._with_pixels(self._encode_record(record))
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
        whole_text: bool = False,
        fps: Sequence[float] = (),
        timestamp_decimal: int | None = None,
        video_input: str = "uniform",
        bit_costs: Sequence[Media] = (),
    ) -> EncodedSample:
        """Everything up to the assistant's header, for messages that end with a question.

        By default the tokens are exactly those of training. With `whole_text=True` the text is one
        string that is tokenised at once, as in the Hugging Face processor (whose frames are those
        of data.frame_form="hf"). `fps`: none, one for all clips, or one a clip. `video_input`:
        "uniform" or "codec"; then `bit_costs` may name a file of bit costs for each clip. Raises
        SampleError.
        """
        return self._with_pixels(
            self._encode_messages(
                messages,
                images,
                _marked_clips(videos, fps, bit_costs, video_input),
                timestamp_decimal,
                prompt=True,
                whole_text=whole_text,
            )
        )

    def video_input(self, record: Record) -> str:
        """How a sample's clips are read, "uniform" or "codec"; a coin decides for "alternate"."""
        if record.video_input != "alternate":
            return record.video_input
        # By the file's name, not its path: moving a data set must not change what a run reads.
        name = f"{self._seed}/{record.source}/{PurePath(record.file).name}/{record.line}"
        coin = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=1).digest()[0]
        return "codec" if coin & 1 else "uniform"

    def _encode_record(self, record: Record, *, headers_only: bool = False) -> _Encoding:
        return self._encode_messages(
            record.messages,
            record.images,
            _marked_clips(record.videos, record.fps, record.bit_costs, self.video_input(record)),
            record.timestamp_decimal,
            headers_only=headers_only,
        )

    def _encode_messages(
        self,
        messages: Sequence[Mapping[str, str]],
        images: Sequence[Picture],
        clips: Sequence[MarkedClip],
        timestamp_decimal: int | None,
        *,
        prompt: bool = False,
        whole_text: bool = False,
        headers_only: bool = False,
    ) -> _Encoding:
        """With `headers_only` the pixels will not be loaded."""
        data = self._data
        messages = chat_lib.match_marks(
            messages, len(images), len(clips), prepend=data.on_image_mismatch == "prepend"
        )
        chat = chat_lib.parse_chat(messages, data.system_prompt, prompt=prompt)
        decimals = data.timestamp_decimal if timestamp_decimal is None else timestamp_decimal
        budget = SampleBudget(self._pack)
        images_left, clips_left = iter(images), iter(clips)

        def next_media(kind: str) -> Encodable:
            if kind == "image":
                return self._media.picture(next(images_left), headers_only=headers_only)
            return self._media.clip(next(clips_left), budget, decimals, headers_only=headers_only)

        ids, masks, rounds, dropped = [], [], [], 0
        media: list[Encodable] = []
        for number, round_ in enumerate(chat.rounds):
            try:
                round_, round_media = _place_media(round_, next_media)
                pieces = chat_lib.round_pieces(number, round_, chat.system)
                round_ids, round_mask = self._tokenize(pieces, round_media)
                budget.add(len(round_ids), [w for one in round_media for w in one.windows])
            except SampleError as error:
                droppable = number and not prompt and data.on_long == "drop_rounds"
                if error.reason not in SIZE_REASONS or not droppable:
                    raise
                dropped = len(chat.rounds) - number
                break
            rounds.append(round_)
            ids.append(round_ids)
            masks.append(round_mask)
            media.extend(round_media)
        if whole_text:
            text = chat_lib.prompt_text(chat._replace(rounds=tuple(rounds)))
            tokens, mask = self._tokenize([chat_lib.Piece(text, False)], media)
        else:
            tokens, mask = np.concatenate(ids), np.concatenate(masks)
        return _Encoding(tokens, mask, budget.windows, media, dropped)

    def _with_pixels(self, encoding: _Encoding) -> EncodedSample:
        pixels = [
            Pixels(
                np.zeros((0, self._model.vision.patch_dim), np.uint8), np.zeros((0, 3), np.int32)
            ),
            *(encodable.load() for encodable in encoding.media),
        ]
        return EncodedSample(
            id="",
            source="",
            file="",
            line=0,
            task="",
            tokens=encoding.tokens,
            loss_mask=encoding.loss_mask,
            windows=np.array(encoding.windows, np.int32),
            patches=np.concatenate([p.patches for p in pixels]),
            patch_positions=np.concatenate([p.positions for p in pixels]),
            dropped_rounds=encoding.dropped_rounds,
            uniform_fallbacks=encoding.uniform_fallbacks,
        )

    def _tokenize(
        self, pieces: Sequence[chat_lib.Piece], media: Sequence[Encodable]
    ) -> tuple[Int32[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """Ids with repeated placeholders, and the loss mask."""
        ids = [token_ids(self._tokenizer, piece.text) for piece in pieces]
        supervised = [piece.supervised for piece in pieces]
        tokens = np.array([i for piece_ids in ids for i in piece_ids], np.int32)
        mask = np.repeat(supervised, [len(piece_ids) for piece_ids in ids]).astype(bool)
        counts = [n for encodable in media for n in encodable.counts]
        repeats = chat_lib.pad_repeats(tokens, counts, self._model.image_token_id)
        return np.repeat(tokens, repeats), np.repeat(mask, repeats)


def _marked_clips(
    videos: Sequence[Video], fps: Sequence[float], bit_costs: Sequence[Media], video_input: str
) -> list[MarkedClip]:
    rates = list(fps) * len(videos) if len(fps) == 1 else list(fps) or [None] * len(videos)
    costs = list(bit_costs) or [None] * len(videos)
    return [
        MarkedClip(video, rate, cost, video_input)
        for video, rate, cost in zip(videos, rates, costs, strict=True)
    ]


def _place_media(
    round_: chat_lib.Round, next_media: Callable[[str], Encodable]
) -> tuple[chat_lib.Round, list[Encodable]]:
    """The round with its media's text in place of the marks, and the media in order."""
    placed: list[Encodable] = []

    def replacement(kind: str) -> str:
        placed.append(next_media(kind))
        return placed[-1].text

    return round_._replace(question=chat_lib.replace_marks(round_.question, replacement)), placed
