"""The 8B instruct recipe on a v5p slice of 128 chips.

    python -m launch.gke --job=launch/jobs/instruct_8b_v5p.py --dry-run
    python -m launch.tpu_vm --job=launch/jobs/instruct_8b_v5p.py --dry-run

Names of project, bucket, image and zone are examples.
"""

from launch.platforms.job import Gke, Job, Mount, TpuVm

JOB = Job(
    name="instruct-8b",
    config="configs/instruct_8b.py",
    workdir="/bucket/runs/instruct-8b",
    accelerator="v5p:4x4x8",
    image="europe-docker.pkg.dev/my-project/train/ov2-jax:tpu",
    overrides={
        "init_from": "/bucket/checkpoints/llava-ov2-8b",
        "data.sources": ({"path": "/bucket/data/instruct.jsonl"},),
        "global_rows": 128,  # one a chip; the recipe's 132 do not divide
    },
    mounts=(Mount("gs://my-bucket/ov2", "/bucket"),),
    gke=Gke(service_account="trainer"),
    tpu_vm=TpuVm(zone="europe-west4-b", project="my-project", spot=True),
)
