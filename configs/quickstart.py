"""The quickstart: trains a LLaVA-OneVision-2 of 3 million random parameters on two CPU cores.

    make quickstart

or, step by step:

    python -m ov2_jax.quickstart.dataset --out=runs/quickstart/data
    python -m ov2_jax.train --config=configs/quickstart.py --config.workdir=runs/quickstart/model

Architecture, data pipeline and checkpoint are those of the real configs; only the sizes differ.
"""

from ml_collections import ConfigDict

from ov2_jax.config.build import experiment_config
from ov2_jax.config.model import ModelConfig, TextConfig, VisionConfig
from ov2_jax.quickstart import TOKENIZER


def get_config() -> ConfigDict:
    model = ModelConfig(
        vision=VisionConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            out_hidden_size=192,
            initializer_range=0.05,
        ),
        text=TextConfig(
            vocab_size=512,  # the shipped tokenizer has 466 entries
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=3,
            head_dim=32,
            initializer_range=0.05,  # 0.02 suits widths of thousands; here it learns slower
        ),
        tie_word_embeddings=True,
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=3,
        vision_end_token_id=4,
    )
    return experiment_config(
        {
            "workdir": "runs/quickstart/model",
            "model": model,
            "tokenizer": str(TOKENIZER),
            # Six minutes on two cores. With 1200 comparing pictures and reading digits, which come
            # last, were right in 68 % of the held-out questions, with 1600 in 85 %.
            "steps": 1600,
            "global_rows": 8,
            "data": {
                "sources": ({"path": "runs/quickstart/data/train.jsonl"},),
                "min_pixels": 28 * 28,
                "max_pixels": 8 * 28 * 28,
                "num_frames": 6,
                "lookahead": 64,
            },
            "pack": {
                "rows": 8,
                "seq_len": 128,
                # Pictures have 8 to 32 patches, windows of clips up to 64. 13 rows next to 1024
                # tokens is the share of patches in the data: both are then filled.
                "vision_rows": ((13, 64),),
            },
            "optimizer": {
                # 1.5e-3 and 2e-3 left shapes, or shapes and motion, at chance for most of the run.
                "learning_rate": 1e-3,
                "end_learning_rate": 1e-5,
                "warmup_fraction": 0.05,
                "beta2": 0.99,
                "eps": 1e-8,
            },
            # bfloat16 is emulated on a CPU, and memory is no concern at this size.
            "compute": {"dtype": "float32", "remat": "none"},
            "checkpoint": {"every": 400},
        }
    )
