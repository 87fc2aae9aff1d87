"""A run on a GPU cluster under Slurm:

    python -m launch.slurm --job=launch/jobs/sft_4b_h100.py [--set=FIELD=VALUE] [--dry-run]

Submits a batch script: one process per GPU; jax.distributed finds the others by Slurm's variables.
The script asks for SIGTERM before the time is up, and requeues itself afterwards.
"""

from launch.accelerators import Gpu
from launch.errors import LaunchError
from launch.platforms.job import Job
from launch.platforms.render import render
from launch.platforms.submit import submit_command
from ov2_jax.core.exit_codes import BROKEN, INTERRUPTED


def script(job: Job) -> str:
    """The batch script; raises LaunchError for what Slurm cannot run."""
    kind = job.kind
    if not isinstance(kind, Gpu):
        raise LaunchError(
            f"accelerator is {job.accelerator!r}, but Slurm has GPUs only; use launch.gke."
        )
    for mount in job.mounts:
        if not mount.source.startswith("/"):
            raise LaunchError(
                f"mounts has {mount.source!r}; Slurm mounts no buckets and no claims, only paths."
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
    submit_command(script, ["sbatch"])
