"""A run on GKE:

    python -m launch.gke --job=launch/jobs/instruct_8b_v5p.py [--set=FIELD=VALUE] [--dry-run]

Submits a JobSet (jobset.sigs.k8s.io, 0.6 or newer): one Job per TPU slice, or one for all GPU
nodes; one pod per host. TPU hosts find each other by GKE's variables, GPU hosts by variables set
here.
"""

from typing import Any

import yaml

from launch.accelerators import Tpu
from launch.errors import LaunchError
from launch.platforms.job import Job, Mount
from launch.platforms.submit import submit_command

_WORKERS = "workers"
_CONTAINER = "train"
_PORT = 55527
# Errors of config, data or checkpoint would only come again. Everything else restarts: 75
# (interrupted), 70 (a peer was lost), 128 and more (killed), lost nodes.
_FINAL = [1, 2]


def _literal(text: str) -> str:
    """Escapes $: Kubernetes replaces $(NAME) by a variable in commands and values; $$ is a $."""
    return text.replace("$", "$$")


def _volume(index: int, mount: Mount) -> dict[str, Any]:
    name = f"mount-{index}"
    if mount.bucket:
        bucket, prefix = mount.bucket
        options = ["implicit-dirs", *([f"only-dir={prefix}"] if prefix else [])]
        attributes = {"bucketName": bucket, "mountOptions": ",".join(options)}
        driver = {"driver": "gcsfuse.csi.storage.gke.io", "readOnly": mount.read_only}
        return {"name": name, "csi": {**driver, "volumeAttributes": attributes}}
    if mount.source.startswith("pvc:"):
        claim = {"claimName": mount.source.removeprefix("pvc:"), "readOnly": mount.read_only}
        return {"name": name, "persistentVolumeClaim": claim}
    return {"name": name, "hostPath": {"path": mount.source, "type": "Directory"}}


def _environment(job: Job, hosts: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"name": name, "value": _literal(value)} for name, value in job.variables().items()
    ]
    if isinstance(job.kind, Tpu):
        return found
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    return [
        *found,
        # The first pod of the first Job, by its name in JobSet's headless service.
        {
            "name": "JAX_COORDINATOR_ADDRESS",
            "value": f"{job.name}-{_WORKERS}-0-0.{job.name}:{_PORT}",
        },
        {"name": "JAX_NUM_PROCESSES", "value": str(hosts)},
        {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}},
    ]


def manifest(job: Job) -> dict[str, Any]:
    """The JobSet; raises LaunchError for what GKE cannot run."""
    kind = job.kind
    if isinstance(kind, Tpu):
        hosts, replicas = kind.hosts, job.slices
        resource, count = "google.com/tpu", kind.chips_per_host
        selector = {
            "cloud.google.com/gke-tpu-accelerator": kind.gke_accelerator,
            "cloud.google.com/gke-tpu-topology": kind.topology,
        }
    else:
        hosts, replicas = job.nodes, 1
        resource, count = "nvidia.com/gpu", kind.per_node
        selector = {"cloud.google.com/gke-accelerator": kind.gke_accelerator}
    if job.gke.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    volumes = [_volume(i, mount) for i, mount in enumerate(job.mounts)]
    mounts = [
        {"name": f"mount-{i}", "mountPath": mount.at, "readOnly": mount.read_only}
        for i, mount in enumerate(job.mounts)
    ]
    pod: dict[str, Any] = {
        "restartPolicy": "Never",  # the JobSet restarts all pods together
        "terminationGracePeriodSeconds": job.grace_seconds,
        "nodeSelector": selector,
        "containers": [
            {
                "name": _CONTAINER,
                "image": job.require_image("GKE"),
                "command": [
                    _literal(word) for word in job.command(distributed=hosts * replicas > 1)
                ],
                "env": _environment(job, hosts),
                "ports": [{"containerPort": _PORT}],
                "resources": {"limits": {resource: count}, "requests": {resource: count}},
                "volumeMounts": [*mounts, {"name": "shm", "mountPath": "/dev/shm"}],
            }
        ],
        # Kubernetes gives 64 MiB, too little for NCCL and the loader's processes.
        "volumes": [*volumes, {"name": "shm", "emptyDir": {"medium": "Memory"}}],
    }
    if job.gke.service_account:
        pod["serviceAccountName"] = job.gke.service_account
    buckets = any(mount.bucket for mount in job.mounts)
    metadata: dict[str, Any] = {"name": job.name, "namespace": job.gke.namespace}
    if isinstance(kind, Tpu):  # a slice is a node pool, and only one Job may use it
        exclusive = "alpha.jobset.sigs.k8s.io/exclusive-topology"
        metadata["annotations"] = {exclusive: "cloud.google.com/gke-nodepool"}
    if job.gke.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": job.gke.queue}
    final = {"containerName": _CONTAINER, "operator": "In", "values": _FINAL}
    workers = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # a lost pod fails its Job, and the JobSet restarts all Jobs
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": final}]},
        "template": {
            "metadata": {"annotations": {"gke-gcsfuse/volumes": "true"} if buckets else {}},
            "spec": pod,
        },
    }
    stop = {
        "name": "final-error",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {"maxRestarts": job.restarts, "rules": [stop]},
            "replicatedJobs": [
                {"name": _WORKERS, "replicas": replicas, "template": {"spec": workers}}
            ],
        },
    }


def text(job: Job) -> str:
    """The JobSet as YAML; raises LaunchError for what GKE cannot run."""
    for mount in job.mounts:
        if (
            mount.source.startswith("/")
            and mount.read_only is False
            and job.workdir.startswith(mount.at)
        ):
            raise LaunchError(
                f"workdir {job.workdir!r} is on the mount {mount.source!r}, a folder of each node; "
                "use gs:// or pvc:, which all nodes share."
            )
    return yaml.safe_dump(manifest(job), sort_keys=False)


if __name__ == "__main__":
    submit_command(text, ["kubectl", "apply", "-f", "-"])
