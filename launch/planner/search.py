"""Meshes and remat policies to try, and how they rank."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from launch.accelerators import Tpu
from launch.errors import LaunchError
from launch.planner.experiment import check_slice
from ov2_jax.config.compute import REMAT_POLICIES
from ov2_jax.config.experiment import Experiment
from ov2_jax.core.errors import ConfigError
from ov2_jax.sharding.mesh import MeshConfig

# The largest sizes to try of axes that exchange activations in every layer.
_LARGEST = {"expert": 16, "context": 16, "tensor": 8}


class Candidate(NamedTuple):
    """A mesh and a remat policy to compile."""

    mesh: dict[str, int]
    remat: str

    def arguments(self) -> list[str]:
        """The command line's overrides of the config."""
        sizes = [f"--config.mesh.{axis}={size}" for axis, size in self.mesh.items()]
        return [*sizes, f"--config.compute.remat={self.remat}"]

    def __str__(self) -> str:
        sizes = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items() if size > 1)
        return f"{sizes or 'one chip'}, remat {self.remat}"


def _meshes(experiment: Experiment, tpu: Tpu) -> Iterator[dict[str, int]]:
    """Sizes whose product is the slice's chips; fsdp takes what the other axes leave."""
    axes = [f.name for f in dataclasses.fields(MeshConfig)]
    free = [axis for axis in axes if axis in _LARGEST]
    if not experiment.model.text.num_experts:
        free = [axis for axis in free if axis != "expert"]
    powers = [[2**k for k in range(_LARGEST[axis].bit_length())] for axis in free]
    for sizes in itertools.product(*powers):
        if tpu.chips % math.prod(sizes) == 0:
            chosen = dict.fromkeys(axes, 1) | dict(zip(free, sizes, strict=True))
            yield chosen | {"fsdp": tpu.chips // math.prod(sizes)}


def candidates(experiment: Experiment, tpu: Tpu, most: int) -> tuple[list[Candidate], int]:
    """Candidates to compile, the likeliest first, and how many more could work.

    Meshes that exchange fewer activations come first. For each mesh the remat policy that keeps
    least comes first: if any policy fits, that one does. Raises LaunchError if no mesh works.
    """
    found = []
    for mesh in _meshes(experiment, tpu):
        config = dataclasses.replace(experiment.mesh, **mesh)
        try:
            check_slice(dataclasses.replace(experiment, mesh=config), tpu)
        except ConfigError:
            continue
        found.append(mesh)
    found.sort(key=lambda mesh: (math.prod(mesh[a] for a in _LARGEST if a in mesh), str(mesh)))
    policies = sorted(REMAT_POLICIES, key=lambda name: name != "full")
    every = [Candidate(mesh, remat) for mesh in found for remat in policies]
    if not every:
        raise LaunchError(
            f"no mesh of {tpu.chips} chips divides global_rows {experiment.global_rows} with "
            f"pack.rows {experiment.pack.rows} and grad_accum {experiment.grad_accum}."
        )
    return every[:most], len(every) - len(every[:most])


def rank(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that fit, the quickest first; then those that do not fit, then failures."""

    def key(row: Mapping[str, Any]) -> tuple[int, float]:
        if row.get("error"):
            return 2, 0.0
        if not row["fits"]:
            return 1, row["gib"]
        return 0, row["step_seconds"]

    return sorted(rows, key=key)
