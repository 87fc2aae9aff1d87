"""4B with patch 14 and merge 2, every part trained on mixed pictures, captions and 30 s clips: the
recipe of the public 4B quickstart.

    python -m ov2_jax.train --config=configs/sft_4b.py --config.workdir=DIR \
        --config.init_from=CHECKPOINT "--config.data.sources[0].path=sft.jsonl"

`python -m conversion.from_hf` makes CHECKPOINT from a released model, or from the result of
`python -m conversion.merge`. Its sizes must be those below; theta, eps and other constants are read
from it.

A step has 16 packs of one text row, so 1, 2, 4, 8 or 16 devices can share it. On N < 16 devices set
--config.grad_accum to 16 / N. Several files of samples, or media in another folder:
    "--config.data.sources=({'path': 'a.jsonl'}, {'path': 'b.jsonl', 'root': '/media'})"
"""

from ml_collections import ConfigDict

from ov2_jax.config.build import experiment_config
from ov2_jax.config.sizes import model_config


def get_config() -> ConfigDict:
    return experiment_config(
        {
            "workdir": "runs/sft_4b",
            "model": model_config("4b", patch_size=14, merge_size=2),
            # The public recipe's 219 907 rows, once. It packs to 8192 tokens without counting the
            # timestamps; here lengths are exact and rows are filled, so it is more than one epoch.
            "steps": 13745,
            "global_rows": 16,
            "data": {
                "sources": ({"path": ""},),
                "min_pixels": 4 * 28 * 28,
                # 8192 patches, 2048 tokens: a page of 1280x960 (6256 patches) keeps its size. The
                # released processor goes up to 2000x2000 px (20408 patches); for that override
                # max_pixels=4000000 and pack.vision_rows=((3, 4096), (1, 20480)), at 2.3 times the
                # attention: a row costs the square of its length, whatever lies in it.
                "max_pixels": 2048 * 28 * 28,
                # A frame has at most 784 patches, 196 tokens; 30 s captions have 30 frames.
                "frame_max_pixels": 392 * 392,
                "target_fps": 1.0,
                "max_frames": 30,
                # As in the public recipe; `data/dropped_rounds` counts them.
                "on_long": "drop_rounds",
                "num_workers": 16,
                # The public data has 9 samples in a row of 8192: the packer has a choice.
                "lookahead": 64,
            },
            "pack": {
                "rows": 1,
                # The recipe's 10192, up to the next multiple of 128 (the lanes of a TPU, a tile of
                # GPU kernels): hardware pads other lengths to that, and the slots would be lost.
                "seq_len": 10240,
                # 32768 patches, at most 80 % of a row can be pictures. A window of a clip (4 frames
                # at 392 px: 3136) or a picture of 1024x768 (3996) fills a row of the first class;
                # one of the second takes a page, or two such windows, when the first is full.
                "vision_rows": ((4, 4096), (2, 8192)),
            },
            # What recipes share is OptimizerConfig's default: beta1 0.9, eps 1e-5, clipping at 1,
            # warm-up over 0.2 % of the run, cosine to 1e-6.
            "optimizer": {"learning_rate": 1e-5, "weight_decay": 0.0, "beta2": 0.99},
            # "full" keeps the inputs of the 36 layers and no more: 1.9 GB for a row.
            "compute": {"dtype": "bfloat16", "remat": "full"},
            # A checkpoint takes 12 bytes a parameter: 57 GB.
            "checkpoint": {"every": 1000, "keep_last": 2},
        }
    )
