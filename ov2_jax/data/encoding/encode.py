"""From a record to tokens, loss mask, patches and windows; every bad sample becomes a Rejected.

A sample that does not fit (more tokens than a text row, a window larger than every vision row, more
windows than a pack's vision rows hold) is rejected with a sentence that names the remedy. With
on_long="drop_rounds" its last question-answer rounds are left out, with their pictures, until the
rest fits, and `dropped_rounds` says how many.

A sample's exact length is known without decoding its pictures (`measure`), see vision.py.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import NamedTuple, TypeVar

import numpy as np

from ov2_jax.config.data import DataConfig
from ov2_jax.config.model import ModelConfig
from ov2_jax.config.pack import PackConfig
from ov2_jax.core.errors import ConfigError, describe
from ov2_jax.data.encoding import chat as chat_lib
from ov2_jax.data.encoding.tokenizer import Tokenizer, check_tokenizer, token_ids
from ov2_jax.data.encoding.vision import (
    SIZE_REASONS,
    MediaQueue,
    MediaRequest,
    Medium,
    Picture,
    Pixels,
    SampleBudget,
    Video,
    VisionReader,
)
from ov2_jax.data.rejected import Rejected, SampleError
from ov2_jax.data.sample import EncodedSample, SampleLength
from ov2_jax.data.sources.media import Media
from ov2_jax.data.sources.records import RawRecord, Record, parse_record, raw_id

T = TypeVar("T")


class _Layout(NamedTuple):
    """A sample but for its pixels."""

    tokens: np.ndarray
    mask: np.ndarray
    windows: list[int]
    mediums: list[Medium]
    dropped: int


class SampleEncoder:
    """Callable on a RawRecord. Holds no state, so threads and worker processes can share it.

    Without a PackConfig nothing is too large. `seed` throws the coin of sources with
    video="alternate".
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
        self._vision, self._seed = VisionReader(data, model, pack), seed

    def __call__(self, raw: RawRecord) -> EncodedSample | Rejected:
        return self._guarded(raw, self.encode)

    def measure(self, raw: RawRecord) -> SampleLength | Rejected:
        """The exact length of what a call gives.

        Pictures and uniform frames are not decoded, so one that breaks in the middle is not
        noticed. Clips that are read codec-style are decoded: their length is their content's.
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
        layout = self._layout(record.messages, self._request(record, headers_only=True))
        return SampleLength(
            id=record.id,
            source=record.source,
            file=record.file,
            line=record.line,
            tokens=len(layout.tokens),
            windows=tuple(layout.windows),
            dropped_rounds=layout.dropped,
            uniform_fallbacks=sum(medium.fallback for medium in layout.mediums),
        )

    def encode(self, record: Record) -> EncodedSample:
        """A whole training sample. Raises SampleError."""
        sample = self._load(self._layout(record.messages, self._request(record)))
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
        video_input: str = "uniform",
        bit_costs: Sequence[Media] = (),
    ) -> EncodedSample:
        """Everything up to the assistant's header, for messages that end with a question.

        By default exactly the tokens that training would have seen. `frame_form="hf"` and
        `whole_text=True` (one string tokenised at once) give what the Hugging Face processor does.
        `fps`: none, one for all clips, or one a clip. `video_input`: "uniform" or "codec"; then
        `bit_costs` may name a file of bit costs for each clip. Raises SampleError.
        """
        request = MediaRequest(
            images,
            videos,
            frame_form or self._data.frame_form,
            fps,
            timestamp_decimal,
            video_input,
            bit_costs,
        )
        return self._load(self._layout(messages, request, prompt=True, whole_text=whole_text))

    def video_input(self, record: Record) -> str:
        """How a sample's clips are read: "uniform" or "codec", whatever way the coin falls."""
        if record.video_input != "alternate":
            return record.video_input
        # By the file's name, not its path: moving a data set must not change what a run reads.
        name = f"{self._seed}/{record.source}/{PurePath(record.file).name}/{record.line}"
        coin = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=1).digest()[0]
        return "codec" if coin & 1 else "uniform"

    def _request(self, record: Record, *, headers_only: bool = False) -> MediaRequest:
        return MediaRequest(
            record.images,
            record.videos,
            self._data.frame_form,
            record.fps,
            record.timestamp_decimal,
            self.video_input(record),
            record.bit_costs,
            headers_only,
        )

    def _layout(
        self,
        messages: Sequence[Mapping[str, str]],
        request: MediaRequest,
        *,
        prompt: bool = False,
        whole_text: bool = False,
    ) -> _Layout:
        videos, fps, decimals = request.videos, request.fps, request.timestamp_decimal
        messages = self._match_marks(messages, len(request.images), len(videos))
        chat = chat_lib.parse_chat(messages, self._data.system_prompt, prompt=prompt)
        rates = list(fps) * len(videos) if len(fps) == 1 else list(fps) or [None] * len(videos)
        costs = list(request.bit_costs) or [None] * len(videos)
        media = MediaQueue(
            iter(request.images),
            iter(zip(videos, rates, costs, strict=True)),
            self._data.timestamp_decimal if decimals is None else decimals,
            request,
        )
        size = SampleBudget(self._pack)
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
                if error.reason not in SIZE_REASONS or not droppable:
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
        return _Layout(tokens, mask, size.windows, used, dropped)

    def _load(self, layout: _Layout) -> EncodedSample:
        pixels = [
            Pixels(
                np.zeros((0, self._model.vision.patch_dim), np.uint8), np.zeros((0, 3), np.int32)
            ),
            *(medium.load() for medium in layout.mediums),
        ]
        return EncodedSample(
            id="",
            source="",
            file="",
            line=0,
            task="",
            tokens=layout.tokens,
            loss_mask=layout.mask,
            windows=np.array(layout.windows, np.int32),
            patches=np.concatenate([p.patches for p in pixels]),
            patch_positions=np.concatenate([p.positions for p in pixels]),
            dropped_rounds=layout.dropped,
            uniform_fallbacks=sum(medium.fallback for medium in layout.mediums),
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
        self, round_: chat_lib.Round, media: MediaQueue, size: SampleBudget
    ) -> tuple[chat_lib.Round, list[Medium]]:
        """The round with its media's text in place of the marks, and the media in order."""
        used: list[Medium] = []

        def replacement(kind: str) -> str:
            if kind == "image":
                used.append(self._vision.image(next(media.images), media))
            else:
                used.append(self._vision.video(*next(media.videos), media, size))
            return used[-1].text

        return round_._replace(question=chat_lib.replace_marks(round_.question, replacement)), used

    def _tokenize(
        self, pieces: Sequence[chat_lib.Piece], mediums: Sequence[Medium]
    ) -> tuple[np.ndarray, np.ndarray]:
        """int32 ids [n] with expanded placeholders and the bool loss mask [n]."""
        ids = [token_ids(self._tokenizer, piece.text) for piece in pieces]
        supervised = [piece.supervised for piece in pieces]
        tokens = np.array([i for piece_ids in ids for i in piece_ids], np.int32)
        mask = np.repeat(supervised, [len(piece_ids) for piece_ids in ids]).astype(bool)
        counts = [n for medium in mediums for n in medium.counts]
        repeats = chat_lib.pad_repeats(tokens, counts, self._model.image_token_id)
        return np.repeat(tokens, repeats), np.repeat(mask, repeats)
