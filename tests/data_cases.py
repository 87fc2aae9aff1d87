"""A small data set on disk and the configs to read it, for the tests of ov2_jax.data."""

import json
from functools import cache
from pathlib import Path

import av
import numpy as np
from PIL import Image

from ov2_jax.config.data import DataConfig, SourceConfig
from ov2_jax.config.model import ModelConfig, TextConfig, VisionConfig
from ov2_jax.data.encoding.tokenizer import load_tokenizer

PROCESSOR = Path(__file__).parent / "golden" / "processor"
# Ids of the golden tokenizer.
IM_START, IM_END, VISION_START, VISION_END, PAD = 1, 2, 3, 4, 5


def tiny_model(patch: int = 14, merge: int = 2, frames: int = 4) -> ModelConfig:
    return ModelConfig(
        vision=VisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=1,
            patch_size=patch,
            spatial_merge_size=merge,
            frame_windows_size=frames,
            out_hidden_size=32,
        ),
        text=TextConfig(
            vocab_size=1024,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=32,
        ),
        image_token_id=PAD,
        video_token_id=6,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )


@cache
def tokenizer():
    return load_tokenizer(PROCESSOR / "tokenizer", tiny_model())


def data_config(path: str | Path = "unused.jsonl", **changes) -> DataConfig:
    return DataConfig(
        **{
            "sources": (SourceConfig(str(path)),),
            "min_pixels": 28 * 28,
            "max_pixels": 14400,
            **changes,
        }
    )


def picture(path: Path, height: int, width: int, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def clip(
    path: Path, frames: int, rate: int, codec: str = "libx264", height: int = 48, width: int = 64
) -> Path:
    """Frame i is a flat grey of value about 4*i + 20, so that a frame tells its number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for i in range(frames):
            pixels = np.full((height, width, 3), 4 * i + 20, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def chat(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    """Questions and answers in turn as messages."""
    head = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return head + [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]


def write_jsonl(path: Path, samples: list[dict | str]) -> Path:
    """Strings are written as they are, so that a line can be broken."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [s if isinstance(s, str) else json.dumps(s) for s in samples]
    path.write_text("\n".join(lines) + "\n")
    return path
