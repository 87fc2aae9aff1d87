"""The small models, configs and runs that tests share."""

import dataclasses
import runpy
from functools import cache
from pathlib import Path

from ml_collections import ConfigDict

from ov2_jax.config.build import experiment_from
from ov2_jax.config.data import DataConfig, SourceConfig
from ov2_jax.config.model import ModelConfig, TextConfig, VisionConfig
from ov2_jax.data.encoding.tokenizer import load_tokenizer
from ov2_jax.train import train
from tests.programs import REPOSITORY

# --- models ---------------------------------------------------------------------------------------

# As a checkpoint: every size differs, so that no axis is taken for another.
SMALL = ModelConfig(
    vision=VisionConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        out_hidden_size=48,
    ),
    text=TextConfig(
        vocab_size=160,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    ),
    image_token_id=156,
    video_token_id=157,
    vision_start_token_id=158,
    vision_end_token_id=159,
)


def with_experts(model: ModelConfig, experts: int, size: int, coefficient: float) -> ModelConfig:
    """A mixture of `experts` of that size in place of the MLPs, of which a token has two."""
    text = dataclasses.replace(
        model.text,
        num_experts=experts,
        num_experts_per_tok=2,
        moe_intermediate_size=size,
        norm_topk_prob=True,
    )
    return dataclasses.replace(model, text=text, router_aux_loss_coef=coefficient)


SMALL_MOE = with_experts(SMALL, 6, 40, 0.0)

# To train steps of.
TRAINED = ModelConfig(
    vision=VisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=1,
        out_hidden_size=32,
        initializer_range=0.1,
    ),
    text=TextConfig(64, 32, 64, 2, 2, 1, head_dim=16, initializer_range=0.1),
    image_token_id=60,
    video_token_id=61,
    vision_start_token_id=62,
    vision_end_token_id=63,
)
TRAINED_MOE = with_experts(TRAINED, 4, 16, 0.1)

# The same, with widths and heads that divide over eight devices.
SHARDED = dataclasses.replace(
    TRAINED,
    vision=dataclasses.replace(
        TRAINED.vision, hidden_size=64, num_attention_heads=2, out_hidden_size=64
    ),
    text=dataclasses.replace(
        TRAINED.text, hidden_size=64, num_attention_heads=8, num_key_value_heads=4
    ),
)
SHARDED_MOE = with_experts(SHARDED, 4, 16, 0.1)

# With the quickstart's tokenizer, and logits that differ enough to answer with.
ANSWERING = ModelConfig(
    vision=dataclasses.replace(TRAINED.vision, num_hidden_layers=1, initializer_range=0.2),
    text=TextConfig(466, 32, 64, 2, 4, 2, head_dim=8, initializer_range=0.5),
    image_token_id=5,
    video_token_id=6,
    vision_start_token_id=3,
    vision_end_token_id=4,
)

# --- data -----------------------------------------------------------------------------------------

PROCESSOR = Path(__file__).parent / "golden" / "processor"
# Ids of the golden tokenizer.
IM_START, IM_END, VISION_START, VISION_END, PAD = 1, 2, 3, 4, 5


def tiny_model(patch: int = 14, merge: int = 2, frames: int = 4) -> ModelConfig:
    """With the golden tokenizer's ids; for what never runs a model."""
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


# --- runs -----------------------------------------------------------------------------------------

# Overrides of configs/quickstart.py.
SMALL_RUN = {
    "model.vision.num_hidden_layers": 1,
    "model.vision.hidden_size": 64,
    "model.vision.num_attention_heads": 2,
    "model.vision.out_hidden_size": 48,
    "model.text.num_hidden_layers": 1,
    "model.text.hidden_size": 48,
    "pack.rows": 1,
    "pack.vision_rows": ((3, 64),),
    "global_rows": 8,
    "data.lookahead": 16,
    "data.max_reject_share": 0.5,
}


def config_of(where: Path, data: Path, **changes) -> ConfigDict:
    config = runpy.run_path(str(REPOSITORY / "configs/quickstart.py"))["get_config"]()
    values = {"workdir": str(where), "data.sources": ({"path": str(data)},), **SMALL_RUN, **changes}
    config.update_from_flattened_dict(values)
    return config


def run(workdir: Path, data: Path, **changes) -> int:
    return train(experiment_from(config_of(workdir, data, **changes)))
