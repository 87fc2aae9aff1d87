"""The models of codec_vs_uniform.py, and the samples that they get."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.codec_vs_uniform_clips import (
    EVENT_FRAMES,
    FRAME_TOKENS,
    FRAMES,
    SIDE,
    Event,
    read_events,
)
from ov2_jax.config.data import DataConfig, SourceConfig
from ov2_jax.config.model import ModelConfig, TextConfig, VisionConfig
from ov2_jax.core.errors import UserError
from ov2_jax.data.encoding.sample_encoder import SampleEncoder
from ov2_jax.data.encoding.tokenizer import Tokenizer
from ov2_jax.data.rejected import Rejected
from ov2_jax.data.sample import EncodedSample
from ov2_jax.data.sources.index import RecordSource
from ov2_jax.data.sources.parsing import parse_record
from ov2_jax.data.sources.records import RawRecord
from ov2_jax.evaluation.exact_match import Answer
from ov2_jax.quickstart.drawing import CELL


class BenchmarkError(UserError):
    """Flags that cannot work, or a folder with something else in it."""


def model_config() -> ModelConfig:
    return ModelConfig(
        vision=VisionConfig(
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=2,
            out_hidden_size=128,
            initializer_range=0.05,
        ),
        text=TextConfig(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            initializer_range=0.05,
        ),
        tie_word_embeddings=True,
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=3,
        vision_end_token_id=4,
    )


def data_config(jsonl: Path, video: str, budget: int) -> DataConfig:
    """How clips are read so that each is `budget` vision tokens."""
    pictures = budget // FRAME_TOKENS
    codec = {
        "num_sampled_frames": FRAMES,
        # One group, which is as long as the clip.
        "group_size": FRAMES,
        "min_group_frames": FRAMES,
        "max_group_frames": FRAMES,
        "images_per_group": pictures,
        "max_canvases": pictures,
        "max_pixels": SIDE * SIDE,
    }
    return DataConfig(
        sources=(SourceConfig(str(jsonl), video=video),),
        min_pixels=CELL * CELL,
        max_pixels=SIDE * SIDE,
        num_frames=pictures,
        system_prompt="",
        **({"codec": dataclasses.replace(DataConfig().codec, **codec)} if video == "codec" else {}),
    )


class Encoded(NamedTuple):
    """A data set encoded for one input and budget."""

    train: list[EncodedSample]
    prompts: list[EncodedSample]
    expected: list[Answer]  # `got` is still missing
    shown: float  # share of the held-out clips in whose tokens the event is


def shows_event(sample: EncodedSample, event: Event) -> bool:
    """Whether a patch of the event's cells and time is in the sample."""
    t, row, column = sample.patch_positions.T
    row, column = row // 2 - event.cell[0], column // 2 - event.cell[1]
    there = (row >= 0) & (row <= 1) & (column >= 0) & (column <= 1)
    return bool((there & (t >= event.first) & (t < event.first + EVENT_FRAMES)).any())


def encode(
    folder: Path, video: str, budget: int, model: ModelConfig, tokenizer: Tokenizer
) -> Encoded:
    """Every sample of both splits, each decoded once. Raises BenchmarkError."""
    data = data_config(folder / "train.jsonl", video, budget)
    encoder = SampleEncoder(data, model, tokenizer)

    def prompt(raw: RawRecord) -> tuple[EncodedSample, Answer]:
        record = parse_record(raw)
        *question, answer = record.messages
        sample = encoder.encode_prompt(
            question, videos=record.videos, fps=record.fps, video_input=record.video_input
        )
        return sample, Answer(record.id, record.task, answer["content"], None)

    heldout = RecordSource([SourceConfig(str(folder / "heldout.jsonl"), video=video)])
    records = RecordSource(data.sources)
    with ThreadPoolExecutor(2) as pool:
        train = list(pool.map(encoder, (records[i] for i in range(len(records)))))
        asked = list(pool.map(prompt, (heldout[i] for i in range(len(heldout)))))
    prompts, expected = zip(*asked, strict=True)
    for sample in (*train, *prompts):
        if isinstance(sample, Rejected):
            raise BenchmarkError(f"{sample.file}, line {sample.line}: {sample.detail}")
        tokens = int(np.count_nonzero(sample.tokens == model.image_token_id))
        if tokens != budget or sample.uniform_fallbacks:
            raise BenchmarkError(f"A {video} sample has {tokens} vision tokens, not {budget}.")
    events = read_events(folder / "heldout.jsonl")
    shown = np.mean([shows_event(s, e) for s, e in zip(prompts, events, strict=True)])
    return Encoded(train, list(prompts), list(expected), float(shown))
