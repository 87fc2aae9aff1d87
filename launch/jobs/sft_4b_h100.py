"""The 4B quickstart recipe on two nodes of eight H100.

    python -m launch.slurm --job=launch/jobs/sft_4b_h100.py --dry-run

Paths, partition and image are examples.
"""

from launch.platforms.job import Job, Mount, Slurm

JOB = Job(
    name="sft-4b",
    config="configs/sft_4b.py",
    workdir="/shared/runs/sft-4b",
    accelerator="h100",
    nodes=2,
    image="registry.example.com/train/ov2-jax:cuda",
    overrides={
        "init_from": "/shared/checkpoints/llava-ov2-4b",
        "data.sources": ({"path": "/shared/data/sft.jsonl"},),
    },
    mounts=(Mount("/shared", "/shared"),),
    slurm=Slurm(partition="gpu", hours=24),
)
