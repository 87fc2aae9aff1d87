"""Accelerators that a job can ask for: TPU slices and GPU nodes, by Google Cloud's names.

TPU names and topologies: cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus and
cloud.google.com/tpu/docs; GPU names: cloud.google.com/kubernetes-engine/docs/how-to/gpus.
"""

import dataclasses
import math
import re

from launch.errors import LaunchError


@dataclasses.dataclass(frozen=True)
class _Tpu:
    gke: str  # GKE's accelerator label
    gcloud: str  # accelerator type, without its size
    cores: int  # of a chip; gcloud's size counts cores
    runtime: str  # a TPU VM's system image
    dimensions: int  # of a topology
    largest: int  # chips of a slice


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")  # larger ones have sides of multiples of 4
_TPUS = {
    "v5e": _Tpu("tpu-v5-lite-podslice", "v5litepod", 1, "v2-alpha-tpuv5-lite", 2, 256),
    "v5p": _Tpu("tpu-v5p-slice", "v5p", 2, "v2-alpha-tpuv5", 3, 8960),
    "v6e": _Tpu("tpu-v6e-slice", "v6e", 1, "v2-alpha-tpuv6e", 2, 256),
}
_GPUS = {  # GKE's accelerator label; all of these come eight to a node
    "a100": "nvidia-a100-80gb",
    "b200": "nvidia-b200",
    "h100": "nvidia-h100-80gb",
    "h100-mega": "nvidia-h100-mega-80gb",
    "h200": "nvidia-h200-141gb",
}


@dataclasses.dataclass(frozen=True)
class Tpu:
    """One slice."""

    version: str
    topology: str

    @property
    def chips(self) -> int:
        return math.prod(map(int, self.topology.split("x")))

    @property
    def chips_per_host(self) -> int:
        """On GKE. (A TPU VM of eight v5e or v6e chips is a single host instead.)"""
        return min(4, self.chips)

    @property
    def hosts(self) -> int:
        return self.chips // self.chips_per_host

    @property
    def gke_accelerator(self) -> str:
        return _TPUS[self.version].gke

    @property
    def gcloud_type(self) -> str:
        tpu = _TPUS[self.version]
        return f"{tpu.gcloud}-{self.chips * tpu.cores}"

    @property
    def runtime(self) -> str:
        """The TPU VM's system image."""
        return _TPUS[self.version].runtime


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One node."""

    name: str
    per_node: int = 8

    @property
    def gke_accelerator(self) -> str:
        return _GPUS[self.name]


def parse_accelerator(text: str) -> Tpu | Gpu:
    """Parses 'v5p:4x4x8' or 'h100'; raises LaunchError, which lists the valid values."""
    version, colon, topology = text.partition(":")
    if not colon and text in _GPUS:
        return Gpu(text)
    if version not in _TPUS:
        raise LaunchError(
            f"accelerator is {text!r}; it must be one of the GPUs {', '.join(_GPUS)} or a TPU with "
            f"its topology, for example v5p:4x4x8, of {', '.join(_TPUS)}."
        )
    tpu = _TPUS[version]
    if tpu.dimensions == 2:
        if topology not in _FLAT:
            raise LaunchError(
                f"accelerator is {text!r}, but {version} comes as {', '.join(_FLAT)}."
            )
    elif topology not in _SMALL_CUBES:
        numbers = (
            list(map(int, topology.split("x"))) if re.fullmatch(r"\d+x\d+x\d+", topology) else []
        )
        fits = numbers and all(n and n % 4 == 0 for n in numbers) and numbers == sorted(numbers)
        if not fits or math.prod(numbers) > tpu.largest:
            raise LaunchError(
                f"accelerator is {text!r}, but {version} comes as {', '.join(_SMALL_CUBES)} or "
                f"AxBxC with A <= B <= C multiples of 4 and at most {tpu.largest} chips."
            )
    return Tpu(version, topology)
