"""A training job, described once for every platform. launch/jobs/ has examples."""

import dataclasses
import pathlib
import re
import runpy
import types
from collections.abc import Mapping, Sequence
from typing import Any

from launch import environment
from launch.accelerators import Gpu, Tpu, parse_accelerator
from launch.errors import LaunchError

_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_FIELD = re.compile(r"[a-z_][a-z0-9_]*(\[\d+\])?(\.[a-z_][a-z0-9_]*(\[\d+\])?)*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_BUCKET = re.compile(r"gs://([a-z0-9][a-z0-9._-]{1,61}[a-z0-9])(?:/([A-Za-z0-9._/-]*))?")
_LONGEST = 40  # JobSet appends to names, and the results must stay within 63
_SET_BY_LAUNCHER = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def check_text(field: str, value: str) -> None:
    """Refuses text of several lines and control characters; all else is quoted at its use."""
    if not value or not value.isprintable():
        raise LaunchError(f"{field} is {value!r}; it must be one line of printable text.")


def check_name(field: str, value: str) -> None:
    """Refuses names that Kubernetes or Google Cloud refuse (RFC 1123 label, first a letter)."""
    if not _NAME.fullmatch(value) or len(value) > _LONGEST:
        raise LaunchError(
            f"{field} is {value!r}; use a-z, 0-9 and -, first a letter, last a letter or number, "
            f"at most {_LONGEST} of them."
        )


@dataclasses.dataclass(frozen=True)
class Mount:
    """Storage that is mounted on every host."""

    source: str  # gs://BUCKET/DIR, pvc:CLAIM (GKE only), or a path of the host
    at: str  # the folder where the run sees it
    read_only: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"(/[A-Za-z0-9._-]+)+", self.at):
            raise LaunchError(
                f"mount at {self.at!r}: it must be an absolute path of letters, numbers and ._-"
            )
        if self.source.startswith("gs://"):
            if not _BUCKET.fullmatch(self.source):
                raise LaunchError(
                    f"mount source {self.source!r} is no gs://BUCKET or gs://BUCKET/DIR."
                )
        elif self.source.startswith("pvc:"):
            check_name("mount source pvc:", self.source.removeprefix("pvc:"))
        elif not re.fullmatch(r"(/[A-Za-z0-9._-]+)+", self.source):
            raise LaunchError(
                f"mount source is {self.source!r}; it must be gs://BUCKET, pvc:CLAIM or an "
                "absolute path of letters, numbers and ._-"
            )

    @property
    def bucket(self) -> tuple[str, str] | None:
        """(BUCKET, PREFIX) of gs://BUCKET/PREFIX, the prefix perhaps empty; None for others."""
        found = _BUCKET.fullmatch(self.source)
        return (found[1], (found[2] or "").strip("/")) if found else None


@dataclasses.dataclass(frozen=True)
class Slurm:
    """Options that only Slurm needs."""

    hours: float = 24.0  # of one start; a run that needs more is requeued
    partition: str | None = None
    account: str | None = None
    setup: str = "source .venv/bin/activate"  # shell, run first; not used with a container image
    options: tuple[str, ...] = ()  # further #SBATCH options, for example "--exclusive"


@dataclasses.dataclass(frozen=True)
class Gke:
    """Options that only GKE needs."""

    namespace: str = "default"
    service_account: str | None = None  # one with access to the buckets
    queue: str | None = None  # Kueue's LocalQueue
    spot: bool = False


@dataclasses.dataclass(frozen=True)
class TpuVm:
    """Options that only TPU VMs need."""

    zone: str
    project: str
    spot: bool = False
    reserved: bool = False


@dataclasses.dataclass(frozen=True)
class Job:
    """A run of ov2_jax.train on some machines. Raises LaunchError on construction."""

    name: str
    config: str  # a file of configs/
    workdir: str  # as the hosts see it; all share it
    accelerator: str  # "v5p:4x4x8", "h100"
    nodes: int = 1  # of GPUs; a TPU slice has as many hosts as its topology states
    slices: int = 1  # of TPUs, connected by the data centre's network
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the config
    image: str | None = None
    environment: Mapping[str, str | None] = dataclasses.field(default_factory=dict)  # None unsets
    restarts: int = 20  # after an interruption or a lost machine
    grace_seconds: int = 300  # from SIGTERM to SIGKILL: enough for a step and a checkpoint
    mounts: tuple[Mount, ...] = ()
    slurm: Slurm = Slurm()
    gke: Gke = Gke()
    tpu_vm: TpuVm | None = None

    def __post_init__(self) -> None:
        check_name("name", self.name)
        check_text("config", self.config)
        check_text("workdir", self.workdir)
        if not self.workdir.startswith("/"):
            raise LaunchError(
                f"workdir is {self.workdir!r}; all hosts share it, so it must be an absolute path "
                "(mount a bucket with mounts)."
            )
        if self.image is not None and not re.fullmatch(
            r"[A-Za-z0-9][A-Za-z0-9._:/@-]*", self.image
        ):
            raise LaunchError(f"image is {self.image!r}; write it as REGISTRY/NAME:TAG.")
        self._check_machines()
        self._check_changes()
        self._check_platforms()

    def _check_machines(self) -> None:
        kind = self.kind
        for field in ("nodes", "slices", "grace_seconds"):
            if getattr(self, field) < 1:
                raise LaunchError(f"{field} is {getattr(self, field)}; it must be at least 1.")
        if self.restarts < 0:
            raise LaunchError(f"restarts is {self.restarts}; it must be at least 0.")
        if isinstance(kind, Tpu) and self.nodes != 1:
            raise LaunchError(
                f"nodes is {self.nodes}, but {self.accelerator} has {kind.hosts} hosts by its "
                "topology; leave nodes unset, and use slices for several slices."
            )
        if isinstance(kind, Gpu) and self.slices != 1:
            raise LaunchError(
                f"slices is {self.slices}, but {self.accelerator} has nodes; use nodes."
            )

    def _check_changes(self) -> None:
        for field in self.overrides:
            if not _FIELD.fullmatch(field):
                raise LaunchError(
                    f"overrides has {field!r}, which names no field; write it like optimizer.beta2."
                )
            if field in ("workdir", "distributed"):
                raise LaunchError(f"overrides has {field!r}; the job sets it itself.")
        for variable, value in self.environment.items():
            if not _VARIABLE.fullmatch(variable) or variable in _SET_BY_LAUNCHER:
                raise LaunchError(
                    f"environment has {variable!r}, which is no name, or is set by the launcher."
                )
            if value is not None:
                check_text(f"environment[{variable!r}]", value)
        places = [mount.at for mount in self.mounts]
        if len(set(places)) < len(places):
            raise LaunchError(f"mounts has a folder twice: {', '.join(places)}; give each its own.")

    def _check_platforms(self) -> None:
        for field, value in (
            ("slurm.partition", self.slurm.partition),
            ("slurm.account", self.slurm.account),
            *((f"slurm.options[{i}]", option) for i, option in enumerate(self.slurm.options)),
        ):
            if value is not None and (not re.fullmatch(r"[A-Za-z0-9=._,:@%/+-]+", value)):
                raise LaunchError(
                    f"{field} is {value!r}; use letters, numbers and =._,:@%/+- only."
                )
        if self.slurm.hours <= self.grace_seconds / 3600:
            raise LaunchError(
                f"slurm.hours is {self.slurm.hours}, which is less than grace_seconds "
                f"{self.grace_seconds}; give the run more time."
            )
        for field, value in (
            ("gke.namespace", self.gke.namespace),
            ("gke.service_account", self.gke.service_account),
            ("gke.queue", self.gke.queue),
            ("tpu_vm.zone", self.tpu_vm and self.tpu_vm.zone),
            ("tpu_vm.project", self.tpu_vm and self.tpu_vm.project),
        ):
            if value is not None:
                check_name(field, value)
        if self.tpu_vm is not None and self.tpu_vm.spot and self.tpu_vm.reserved:
            raise LaunchError("tpu_vm has spot and reserved; choose one.")

    @property
    def kind(self) -> Tpu | Gpu:
        return parse_accelerator(self.accelerator)

    def variables(self) -> dict[str, str]:
        """The run's environment: the platform's defaults with the job's changes."""
        merged = {**environment.defaults(self.kind), **self.environment}
        return {name: value for name, value in merged.items() if value is not None}

    def command(self, *, distributed: bool = True) -> list[str]:
        """The training program and its arguments; `distributed` if there are several processes."""
        overrides = [f"--config.{name}={value}" for name, value in self.overrides.items()]
        flags = ["--config.distributed"] if distributed else []
        start = ["python", "-m", "ov2_jax.train", f"--config={self.config}"]
        return [*start, f"--config.workdir={self.workdir}", *overrides, *flags]

    def require_image(self, platform: str) -> str:
        """The image; raises LaunchError if there is none."""
        if self.image is None:
            raise LaunchError(
                f"image is not set; {platform} runs containers: build launch/Dockerfile."
            )
        return self.image


def load_job(path: str, changes: Sequence[str] = ()) -> Job:
    """Reads JOB of a Python file and changes its overrides by FIELD=VALUE; raises LaunchError."""
    if not pathlib.Path(path).is_file():
        raise LaunchError(f"--job is {path!r}, which is no file; launch/jobs/ has examples.")
    job = runpy.run_path(path).get("JOB")
    if not isinstance(job, Job):
        raise LaunchError(f"--job {path} must define JOB = launch.platforms.job.Job(...).")
    overrides = dict(job.overrides)
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise LaunchError(f"--set is {change!r}; write it as FIELD=VALUE, like steps=2000.")
        overrides[name] = value
    job = dataclasses.replace(job, overrides=types.MappingProxyType(overrides))
    if not pathlib.Path(job.config).is_file():
        raise LaunchError(
            f"config is {job.config!r}, which is no file here; start in the repository's root."
        )
    return job
