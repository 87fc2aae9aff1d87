"""30B-A3B, a mixture of 128 experts with 8 for each token, with patch 14 and merge 2: the public
mid-training recipe, with packed rows.

    python -m ov2_jax.train --config=configs/midtrain_30b_a3b.py --config.workdir=DIR \
        --config.init_from=CHECKPOINT "--config.data.sources[0].path=midtrain.jsonl"

CHECKPOINT is as for configs/sft_4b.py, a result of the alignment stage. The memory and time that it
takes on a slice:

    python -m launch.plan --config=configs/midtrain_30b_a3b.py --topology=v5p:4x4x8

A step has 128 packs of one text row: one for each of 128 chips.
"""

from ml_collections import ConfigDict

from ov2_jax.config.build import experiment_config
from ov2_jax.config.sizes import model_config


def get_config() -> ConfigDict:
    return experiment_config(
        {
            "workdir": "runs/midtrain_30b_a3b",
            # The load-balancing loss counts 0.001, as in the Hugging Face config. The public
            # scripts have 0.01 for a loss of another scale (docs/design.md).
            "model": model_config("30b-a3b", patch_size=14, merge_size=2),
            "steps": 70313,
            "global_rows": 128,
            "data": {
                "sources": ({"path": ""},),
                # As in configs/midtrain_8b.py.
                "min_pixels": 4 * 28 * 28,
                "max_pixels": 2048 * 28 * 28,
                "frame_max_pixels": 392 * 392,
                "target_fps": 1.0,
                "max_frames": 90,
                "on_long": "drop_rounds",
                "num_workers": 16,
                "lookahead": 256,
            },
            "pack": {
                "rows": 1,
                "seq_len": 32768,
                "vision_rows": ((20, 4096), (4, 8192)),  # as in configs/midtrain_8b.py
            },
            "optimizer": {"learning_rate": 1e-5, "weight_decay": 0.01, "beta2": 0.95},
            "compute": {"dtype": "bfloat16", "remat": "full"},
            # 370 GB each, 12 bytes a parameter.
            "checkpoint": {"every": 500, "keep_last": 2},
        }
    )
