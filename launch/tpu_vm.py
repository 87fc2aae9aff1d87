"""A run on TPU VMs:

    python -m launch.tpu_vm --job=launch/jobs/instruct_8b_v5p.py [--set=FIELD=VALUE] [--dry-run]

Runs a script on your machine for as long as the job lasts. The script requests a queued resource,
waits for it, and runs the container on every host; it requests a preempted slice again.
"""

import shlex

from launch.accelerators import Tpu
from launch.errors import LaunchError
from launch.platforms.job import Job
from launch.platforms.render import render
from launch.platforms.submit import submit_command
from ov2_jax.core.exit_codes import INTERRUPTED


def script(job: Job) -> str:
    """The script; raises LaunchError for what TPU VMs cannot run."""
    kind = job.kind
    if not isinstance(kind, Tpu):
        raise LaunchError(
            f"accelerator is {job.accelerator!r}, which is no TPU; use launch.slurm or launch.gke."
        )
    if job.tpu_vm is None:
        raise LaunchError("tpu_vm is not set; it states the zone and the project.")
    if job.slices != 1:
        raise LaunchError(
            f"slices is {job.slices}; launch.tpu_vm runs one slice, use launch.gke for several."
        )
    image = job.require_image("a TPU VM")
    docker = ["sudo", "docker", "run", "--detach", "--name=train", "--privileged", "--net=host"]
    docker += [f"--stop-timeout={job.grace_seconds}", "--shm-size=16g"]
    docker += [f"--env={name}={value}" for name, value in job.variables().items()]
    prepare = ["sudo docker rm --force train >/dev/null 2>&1 || true"]
    for mount in job.mounts:
        if mount.source.startswith("pvc:"):
            raise LaunchError(
                f"mounts has {mount.source!r}, which only GKE mounts; use gs://BUCKET."
            )
        source = mount.source
        if mount.bucket:
            bucket, prefix = mount.bucket
            source = f"/mnt/{bucket}"
            fuse = ["sudo", "gcsfuse", "--implicit-dirs", "-o", "allow_other"]
            fuse += [f"--only-dir={prefix}"] if prefix else []
            prepare.append(
                f"mountpoint -q {source} || {{ sudo mkdir -p {source} && "
                f"{shlex.join([*fuse, bucket, source])}; }}"
            )
        docker.append(f"--volume={source}:{mount.at}{':ro' if mount.read_only else ''}")
    registry = image.split("/")[0]
    prepare.append(f"sudo gcloud auth configure-docker --quiet {shlex.quote(registry)}")
    remote = " && ".join([*prepare, shlex.join([*docker, image, *job.command()])])
    vm = job.tpu_vm
    return render(
        "tpu_vm.sh.jinja",
        job=job,
        kind=kind,
        place=[f"--zone={vm.zone}", f"--project={vm.project}"],
        tier=["--spot"] if vm.spot else ["--reserved"] if vm.reserved else [],
        start=remote,
        interrupted=INTERRUPTED,
    )


if __name__ == "__main__":
    submit_command(script, ["bash", "-c"], as_argument=True)
