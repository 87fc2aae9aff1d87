"""8B with patch 14 and merge 2 on clips of 384 frames at 392 px, with timestamps and captions of up
to 18 000 tokens.

    python -m ov2_jax.train --config=configs/longvideo_8b.py --config.workdir=DIR \
        --config.init_from=CHECKPOINT "--config.data.sources[0].path=longvideo.jsonl"

CHECKPOINT is as for configs/sft_4b.py, a result of mid-training or instruction tuning. Four chips
share a row (context=4). The memory and time that it takes on a slice:

    python -m launch.plan --config=configs/longvideo_8b.py --topology=v5p:4x4x8

768 frames, with eight chips sharing a row:

    python -m launch.plan --config=configs/longvideo_8b.py --topology=v5p:4x8x8 \
        --config.data.num_frames=768 --config.pack.seq_len=180224 \
        "--config.pack.vision_rows=((24, 25088),)" --config.mesh.context=8

A step has 32 packs of one text row: for 128 chips with context=4, or 256 with context=8. On fewer
chips set --config.grad_accum to 32 * context / chips.
"""

from ml_collections import ConfigDict

from ov2_jax.config.build import experiment_config
from ov2_jax.config.sizes import model_config


def get_config() -> ConfigDict:
    return experiment_config(
        {
            "workdir": "runs/longvideo_8b",
            "model": model_config("8b", patch_size=14, merge_size=2),
            # The data of the long-video stages is published, their hyperparameters are not. These
            # are the public 2B instruct-video recipe's (1e-5, no decay, beta2 0.99), for as many
            # tokens: 3500 steps of 224 rows of 40000 are 31 billion.
            "steps": 10000,
            "global_rows": 32,
            "data": {
                "sources": ({"path": ""},),
                "min_pixels": 4 * 28 * 28,
                "max_pixels": 2048 * 28 * 28,  # as in configs/sft_4b.py
                "frame_max_pixels": 392 * 392,  # 784 patches, 196 tokens
                "num_frames": 384,
                "on_long": "drop_rounds",
                "num_workers": 16,
                "lookahead": 64,  # a clip fills most of a row
                "decode_timeout_s": 600.0,  # clips of an hour: the default is for short ones
            },
            "pack": {
                "rows": 1,
                # 384 frames with their timestamps (12 tokens each) are 79872; the rest is caption.
                # 192 x 512, so that 2 x 4 equal pieces of whole 512s make the zigzag of context.
                "seq_len": 98304,
                # 301056 patches, all of 384 frames: eight windows of 4 frames (3136) a row.
                # 25088 is 49 x 512; rows of one or two windows are no multiple of 512, and
                # attention kernels would take blocks of 128. 12 rows divide by 4.
                "vision_rows": ((12, 25088),),
            },
            "optimizer": {"learning_rate": 1e-5, "weight_decay": 0.0, "beta2": 0.99},
            "compute": {"dtype": "bfloat16", "remat": "full"},
            "mesh": {"context": 4},
            # 102 GB each.
            "checkpoint": {"every": 250, "keep_last": 2},
        }
    )
