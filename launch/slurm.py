"""A run on a GPU cluster: python -m launch.slurm --job=launch/jobs/sft_4b_h100.py [--dry-run]

One process a GPU; jax.distributed finds the others by Slurm's variables. The script asks for
SIGTERM before the time is up and puts itself back into the queue after it.
"""

import sys

from launch.accelerators import Gpu, LaunchError
from launch.platforms.job import Job
from launch.platforms.render import launch, render
from ov2_jax.core.exit_codes import BROKEN, INTERRUPTED


def script(job: Job) -> str:
    """The batch script; raises LaunchError for what Slurm cannot run."""
    kind = job.kind
    if not isinstance(kind, Gpu):
        raise LaunchError(
            f"accelerator is {job.accelerator!r}, which Slurm does not have; use launch.gke."
        )
    for mount in job.mounts:
        if not mount.source.startswith("/"):
            raise LaunchError(
                f"mounts has {mount.source!r}; Slurm's nodes have no buckets or claims: use a path."
            )
    if job.mounts and job.image is None:
        raise LaunchError("mounts is set without image; without a container nothing is mounted.")
    minutes = round(job.slurm.hours * 60)
    return render(
        "slurm.sh.jinja",
        job=job,
        kind=kind,
        minutes=minutes,
        variables=job.variables(),
        command=job.command(),
        mounts=[f"{m.source}:{m.at}{':ro' if m.read_only else ''}" for m in job.mounts],
        interrupted=INTERRUPTED,
        broken=BROKEN,
    )


if __name__ == "__main__":
    launch(script, ["sbatch"], sys.argv[1:], as_argument=False)
