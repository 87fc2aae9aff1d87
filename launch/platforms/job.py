"""A training job, described once for every platform. See launch/jobs/ for some."""

import dataclasses
import pathlib
import re
import runpy
import types
from collections.abc import Mapping, Sequence
from typing import Any

from launch import environment
from launch.accelerators import Gpu, LaunchError, Tpu, parse_accelerator

_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_FIELD = re.compile(r"[a-z_][a-z0-9_]*(\[\d+\])?(\.[a-z_][a-z0-9_]*(\[\d+\])?)*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_BUCKET = re.compile(r"gs://([a-z0-9][a-z0-9._-]{1,61}[a-z0-9])(?:/([A-Za-z0-9._/-]*))?")
_LONGEST = 40  # JobSet appends to names that must stay within 63
_TAKEN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def check_text(where: str, value: str) -> None:
    """One line of text without control characters; all else is quoted where it is used."""
    if not value or not value.isprintable():
        raise LaunchError(f"{where} is {value!r}; it must be one line of printable text.")


def check_name(where: str, value: str) -> None:
    """A name that Kubernetes and Google Cloud take (RFC 1123 label, from a letter on)."""
    if not _NAME.fullmatch(value) or len(value) > _LONGEST:
        raise LaunchError(
            f"{where} is {value!r}; use a-z, 0-9 and -, from a letter to a letter or number, at "
            f"most {_LONGEST} of them."
        )


@dataclasses.dataclass(frozen=True)
class Mount:
    """Storage that hosts have at a folder: gs://BUCKET/DIR, pvc:CLAIM (GKE), or a host's path."""

    source: str
    at: str
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
        """Of gs://BUCKET/PREFIX both, the prefix perhaps empty."""
        found = _BUCKET.fullmatch(self.source)
        return (found[1], (found[2] or "").strip("/")) if found else None


@dataclasses.dataclass(frozen=True)
class Slurm:
    """What only Slurm asks for."""

    hours: float = 24.0  # of one start; a run that needs more is requeued
    partition: str | None = None
    account: str | None = None
    setup: str = "source .venv/bin/activate"  # shell, run before; a container image needs none
    options: tuple[str, ...] = ()  # further #SBATCH options, as "--exclusive"


@dataclasses.dataclass(frozen=True)
class Gke:
    """What only GKE asks for."""

    namespace: str = "default"
    service_account: str | None = None  # one that may use the buckets
    queue: str | None = None  # Kueue's LocalQueue
    spot: bool = False


@dataclasses.dataclass(frozen=True)
class TpuVm:
    """What only TPU VMs ask for."""

    zone: str
    project: str
    spot: bool = False
    reserved: bool = False


@dataclasses.dataclass(frozen=True)
class Job:
    """A run of ov2_jax.train on some machines. Raises LaunchError on construction."""

    name: str
    config: str  # a file of configs/
    workdir: str  # as the hosts see it; all see the same
    accelerator: str  # "v5p:4x4x8", "h100"
    nodes: int = 1  # of GPUs; a TPU slice's topology says how many hosts it has
    slices: int = 1  # of TPUs, over the data centre's network
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the config
    image: str | None = None
    environment: Mapping[str, str | None] = dataclasses.field(default_factory=dict)  # None: unset
    restarts: int = 20  # after an interruption or a lost machine
    grace_seconds: int = 300  # from SIGTERM to SIGKILL: a step and a checkpoint
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
                f"workdir is {self.workdir!r}; hosts share it, so it must be an absolute path "
                "(mount a bucket with mounts)."
            )
        kind = parse_accelerator(self.accelerator)
        for field in ("nodes", "slices", "grace_seconds"):
            if getattr(self, field) < 1:
                raise LaunchError(f"{field} is {getattr(self, field)}; it must be at least 1.")
        if self.restarts < 0:
            raise LaunchError(f"restarts is {self.restarts}; it must be at least 0.")
        if isinstance(kind, Tpu) and self.nodes != 1:
            raise LaunchError(
                f"nodes is {self.nodes}, but {self.accelerator} has {kind.hosts} hosts by its "
                "topology; leave nodes, and use slices for several of them."
            )
        if isinstance(kind, Gpu) and self.slices != 1:
            raise LaunchError(
                f"slices is {self.slices}, but {self.accelerator} has nodes; use nodes."
            )
        if self.image is not None and not re.fullmatch(
            r"[A-Za-z0-9][A-Za-z0-9._:/@-]*", self.image
        ):
            raise LaunchError(f"image is {self.image!r}; it must be as REGISTRY/NAME:TAG.")
        for field in self.overrides:
            if not _FIELD.fullmatch(field):
                raise LaunchError(
                    f"overrides has {field!r}, which names no field; write it as optimizer.beta2."
                )
            if field in ("workdir", "distributed"):
                raise LaunchError(f"overrides has {field!r}; the job sets it itself.")
        for variable, value in self.environment.items():
            if not _VARIABLE.fullmatch(variable) or variable in _TAKEN:
                raise LaunchError(
                    f"environment has {variable!r}; it is no name, or set by the job."
                )
            if value is not None:
                check_text(f"environment[{variable!r}]", value)
        places = [mount.at for mount in self.mounts]
        if len(set(places)) < len(places):
            raise LaunchError(f"mounts has a folder twice: {', '.join(places)}; give each its own.")
        for where, value in (
            ("slurm.partition", self.slurm.partition),
            ("slurm.account", self.slurm.account),
            *((f"slurm.options[{i}]", option) for i, option in enumerate(self.slurm.options)),
        ):
            if value is not None and (not re.fullmatch(r"[A-Za-z0-9=._,:@%/+-]+", value)):
                raise LaunchError(
                    f"{where} is {value!r}; use letters, numbers and =._,:@%/+- only."
                )
        if self.slurm.hours <= self.grace_seconds / 3600:
            raise LaunchError(
                f"slurm.hours is {self.slurm.hours}, which is less than grace_seconds "
                f"{self.grace_seconds}; give the run more time."
            )
        for where, value in (
            ("gke.namespace", self.gke.namespace),
            ("gke.service_account", self.gke.service_account),
            ("gke.queue", self.gke.queue),
            ("tpu_vm.zone", self.tpu_vm and self.tpu_vm.zone),
            ("tpu_vm.project", self.tpu_vm and self.tpu_vm.project),
        ):
            if value is not None:
                check_name(where, value)
        if self.tpu_vm is not None and self.tpu_vm.spot and self.tpu_vm.reserved:
            raise LaunchError("tpu_vm has spot and reserved; choose one.")

    @property
    def kind(self) -> Tpu | Gpu:
        return parse_accelerator(self.accelerator)

    def variables(self) -> dict[str, str]:
        """The run's environment: the platform's, changed by the job's."""
        merged = {**environment.defaults(self.kind), **self.environment}
        return {name: value for name, value in merged.items() if value is not None}

    def command(self, *, distributed: bool = True) -> list[str]:
        """The training program and its arguments."""
        overrides = [f"--config.{name}={value}" for name, value in self.overrides.items()]
        flags = ["--config.distributed"] if distributed else []
        start = ["python", "-m", "ov2_jax.train", f"--config={self.config}"]
        return [*start, f"--config.workdir={self.workdir}", *overrides, *flags]

    def require_image(self, platform: str) -> str:
        if self.image is None:
            raise LaunchError(
                f"image is not set; {platform} runs containers: build launch/Dockerfile."
            )
        return self.image


def load_job(path: str, changes: Sequence[str] = ()) -> Job:
    """JOB of a Python file, with its overrides changed by FIELD=VALUE; raises LaunchError."""
    if not pathlib.Path(path).is_file():
        raise LaunchError(f"--job is {path!r}, which is no file; see launch/jobs/ for some.")
    job = runpy.run_path(path).get("JOB")
    if not isinstance(job, Job):
        raise LaunchError(f"--job {path} must define JOB = launch.platforms.job.Job(...).")
    overrides = dict(job.overrides)
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise LaunchError(f"--set is {change!r}; write it as FIELD=VALUE, as steps=2000.")
        overrides[name] = value
    job = dataclasses.replace(job, overrides=types.MappingProxyType(overrides))
    if not pathlib.Path(job.config).is_file():
        raise LaunchError(
            f"config is {job.config!r}, which is no file here; start in the repository."
        )
    return job
