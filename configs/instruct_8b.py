"""8B with patch 14 and merge 2, every part trained on instructions about pictures: the public
instruct-780k recipe.

    python -m ov2_jax.train --config=configs/instruct_8b.py --config.workdir=DIR \
        --config.init_from=CHECKPOINT "--config.data.sources[0].path=instruct.jsonl"

CHECKPOINT is as for configs/sft_4b.py.

A step has 132 packs of one text row. Devices times --config.grad_accum must divide 132: 12, 22, 33,
44, 66 and 132 devices do, of the powers of two only 1, 2 and 4 (with grad_accum 132, 66 and 33). On
a larger power of two the run ends with an error before it starts; use 128 rows there:
    --config.global_rows=128 --config.steps=5782

The public script does not pack: a row is one sample there, and 5607 steps are one epoch of 740 000
samples. Here a row is filled with samples, so the same number of rows is many epochs. For one
epoch, read from the first steps how many samples a step has (`samples` in metrics.jsonl, times the
processes), and divide 740 000 by it; or lower --config.global_rows until a step has 132 samples,
and keep the steps.
"""

from ml_collections import ConfigDict

from ov2_jax.config.build import experiment_config
from ov2_jax.config.sizes import model_config


def get_config() -> ConfigDict:
    return experiment_config(
        {
            "workdir": "runs/instruct_8b",
            "model": model_config("8b", patch_size=14, merge_size=2),
            "steps": 5607,
            "global_rows": 132,
            "data": {
                "sources": ({"path": ""},),
                # Pictures as in configs/sft_4b.py: at most 8192 patches, 2048 tokens.
                "min_pixels": 4 * 28 * 28,
                "max_pixels": 2048 * 28 * 28,
                # Clips of 60 to 180 s have 90 frames of at most 784 patches: 23 windows.
                "frame_max_pixels": 392 * 392,
                "target_fps": 1.0,
                "max_frames": 90,
                "on_long": "drop_rounds",
                "num_workers": 16,
                "lookahead": 256,  # a row takes dozens of samples, so the packer has a choice
            },
            "pack": {
                "rows": 1,
                "seq_len": 32000,  # 250 x 128, see configs/sft_4b.py
                # 110592 patches, at most 86 % of a row can be pictures; why these two lengths:
                # configs/sft_4b.py. 90 frames take 17 rows of the first and 3 of the second.
                "vision_rows": ((17, 4096), (5, 8192)),
            },
            "optimizer": {"learning_rate": 1e-5, "weight_decay": 0.0, "beta2": 0.99},
            "compute": {"dtype": "bfloat16", "remat": "full"},
            # 102 GB each. A step reads 4.2 million tokens, 26 times one of configs/sft_4b.py, so
            # fewer of them lie between two checkpoints.
            "checkpoint": {"every": 250, "keep_last": 2},
        }
    )
