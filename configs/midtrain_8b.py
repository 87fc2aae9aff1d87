"""8B with patch 14 and merge 2, every part trained on the mixed data of mid-training: the public
recipe, with packed rows.

    python -m ov2_jax.train --config=configs/midtrain_8b.py --config.workdir=DIR \
        --config.init_from=CHECKPOINT "--config.data.sources[0].path=midtrain.jsonl"

CHECKPOINT is as for configs/sft_4b.py, a result of the alignment stage. The memory and time that it
takes on a slice:

    python -m launch.plan --config=configs/midtrain_8b.py --topology=v5p:4x4x8
    python -m launch.plan --config=configs/midtrain_8b.py --topology=v6e:16x16 \
        --config.mesh.context=2

A v5p has room for --config.compute.remat=up, which computes 8 % less.

A step has 128 packs of one text row: one for each of 128 chips. On 256 chips two share every row
(context=2). On N < 128 chips set --config.grad_accum to 128 / N.
"""

from ml_collections import ConfigDict

from ov2_jax.config.build import experiment_config
from ov2_jax.config.sizes import model_config


def get_config() -> ConfigDict:
    return experiment_config(
        {
            "workdir": "runs/midtrain_8b",
            "model": model_config("8b", patch_size=14, merge_size=2),
            "steps": 70313,  # 9 million rows
            "global_rows": 128,
            "data": {
                "sources": ({"path": ""},),
                # Pictures as in configs/sft_4b.py: at most 8192 patches, 2048 tokens.
                "min_pixels": 4 * 28 * 28,
                "max_pixels": 2048 * 28 * 28,
                # The data of the first two stages has clips of 30, 60 and 90 frames at 392 px.
                "frame_max_pixels": 392 * 392,
                "target_fps": 1.0,
                "max_frames": 90,
                "on_long": "drop_rounds",
                "num_workers": 16,
                "lookahead": 256,  # as in configs/instruct_8b.py
            },
            "pack": {
                "rows": 1,
                "seq_len": 32768,
                # 114688 patches, at most 87 % of a row can be pictures; why these two lengths:
                # configs/sft_4b.py. Both counts divide by 4, so that up to four chips can share a
                # pack. 90 frames take 20 rows of the first and 2 of the second.
                "vision_rows": ((20, 4096), (4, 8192)),
            },
            "optimizer": {"learning_rate": 1e-5, "weight_decay": 0.01, "beta2": 0.95},
            "compute": {"dtype": "bfloat16", "remat": "full"},
            # 102 GB each.
            "checkpoint": {"every": 250, "keep_last": 2},
        }
    )
