"""Bytes that a device's collectives send, by kind and mesh axis; every turn of a loop counts.

With any algorithm a device sends at least this in a collective over n devices (b bytes: the whole
array): all-gather and reduce-scatter b (n-1)/n, all-reduce twice that, all-to-all (n-1)/n of what
the device holds, collective-permute all that it holds. It receives the same number of bytes.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from launch.planner.hlo import Array, Computation, Instruction, Module
from launch.planner.loops import Runs

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_LISTED = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:,?\s*device_ids=\(([^)]*)\))?\s*\{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")


class Collective(NamedTuple):
    """One collective instruction, and what a device sends for it in one call of the program."""

    name: str
    op_name: str
    kind: str
    axes: tuple[str, ...]  # mesh axes that its groups span
    group: int  # devices of a group
    shape: str  # of the whole array, for example bf16[4096,12288]
    times: int
    bytes: float  # all times together


def replica_groups(attributes: str, devices: int) -> Int[np.ndarray, "groups members"] | None:
    """Device numbers of each group; None if the text has no groups (then all form one group).

    Three forms: {{0,1},{2,3}}, [2,2]<=[4] (optionally of a transposed iota), and
    mesh['a'=2,'b'=2] {'b'}. A permute has pairs of source and target instead.
    """
    mesh = _MESH.search(attributes)
    if mesh:
        return _mesh_groups(mesh)
    iota = _IOTA.search(attributes)
    if iota:
        shape, dims = (tuple(map(int, iota[k].split(","))) for k in (1, 2))
        ids = np.arange(math.prod(dims)).reshape(dims)
        if iota[3]:
            ids = ids.transpose(tuple(map(int, iota[3].split(","))))
        return ids.reshape(shape)
    listed = _LISTED.search(attributes)
    if listed and listed[1]:
        rows = [list(map(int, row.split(","))) for row in re.findall(r"\{([\d,]+)\}", listed[1])]
        return np.array(rows)
    pairs = _PAIRS.search(attributes)
    if pairs:
        return np.array([list(map(int, p)) for p in re.findall(r"\{(\d+),(\d+)\}", pairs[1])])
    return np.arange(devices)[None] if listed else None


def _mesh_groups(found: re.Match[str]) -> Int[np.ndarray, "groups members"]:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
    names = list(sizes)
    dims, over = list(sizes.values()), []
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found[3]):
        at = names.index(name)
        if not part:
            over.append(at)
            continue
        # 'a':(2)4 is a part of axis a: 2 devices before it, 4 in it, the rest after it.
        rest = dims[at] // (int(before) * int(part))
        dims[at : at + 1] = [int(before), int(part), rest]
        names[at : at + 1] = [f"{name}/", name, f"/{name}"]
        over = [k + 2 if k > at else k for k in over] + [at + 1]
    count = math.prod(dims)
    if found[2]:
        shape = re.findall(r"\d+", found[2])
        ids = np.array(shape, int) if len(shape) == count else np.arange(count)
    else:
        ids = np.arange(count)
    ids = ids.reshape(dims)
    ids = np.moveaxis(ids, over, range(ids.ndim - len(over), ids.ndim))
    return ids.reshape(-1, math.prod(dims[k] for k in over))


def axes_of(groups: Int[np.ndarray, "groups members"], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which devices of a group differ, in the mesh's order.

    Device numbers count through the mesh, the last axis fastest.
    """
    places = np.stack(np.unravel_index(groups, tuple(mesh.values())), -1)  # groups members axes
    differs = (places != places[:, :1]).any((0, 1))
    return tuple(name for name, yes in zip(mesh, differs, strict=True) if yes)


def _text(array: Array) -> str:
    return f"{array.dtype}[{','.join(map(str, array.dims))}]"


def _base(opcode: str) -> str | None:
    """The kind of the collective that this opcode starts; a -done has no bytes of its own."""
    kind = opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def _continues(computation: Computation) -> bool:
    """Whether a computation only continues a collective that started earlier.

    On TPUs a collective may run in steps during matmuls: in a fusion that starts it, in those of
    the matmuls, and in one that ends it. The collective is in each of them.
    """
    ends = computation.root is not None and "AsyncCollectiveDone" in computation.root.attributes
    return ends or computation.name.startswith("async_collective_fusion")


def _sliced(computation: Computation) -> Instruction | None:
    """The root, if each device keeps a slice of a fused all-reduce: then it is a reduce-scatter."""
    root = computation.root
    return root if root is not None and root.opcode == "dynamic-slice" else None


def _size(
    this: Instruction, where: Computation, kind: str, group: int, fused: bool
) -> tuple[str, float, Array]:
    """(kind, bytes sent, whole array) of one call."""
    inputs = [a for name in this.operands for a in where[name].arrays]
    outputs = [a for a in this.arrays if a.bytes]
    if this.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
        outputs = outputs[len(inputs) : 2 * len(inputs)] or outputs  # (inputs, outputs, flags)
    whole = inputs if kind in ("reduce-scatter", "collective-permute") else outputs
    largest = max(whole, key=lambda a: a.bytes)
    total = sum(a.bytes for a in whole)
    if kind == "all-reduce" and fused and _sliced(where) is not None:
        kind = "reduce-scatter"
    share = (group - 1) / group
    factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)
    return kind, total * factor, largest


def collectives(module: Module, runs: Runs, mesh: Mapping[str, int]) -> list[Collective]:
    """Every collective that runs, the one that sends most first."""
    devices, found = math.prod(mesh.values()), []
    for computation in module.computations.values():
        times = runs.times.get(computation.name, 0)
        if not times or _continues(computation):
            continue
        for this in computation:
            kind = _base(this.opcode)
            if kind is None:
                continue
            groups = replica_groups(this.attributes, devices)
            groups = np.arange(devices)[None] if groups is None else groups
            size = groups.shape[1]
            if size < 2:
                continue
            fused = computation.name in runs.fused
            kind, sent, whole = _size(this, computation, kind, size, fused)
            axes = axes_of(groups, mesh)
            found.append(
                Collective(
                    *(this.name, this.op_name, kind, axes, size, _text(whole)),
                    *(times, sent * times),
                )
            )
    return sorted(found, key=lambda c: -c.bytes)


def by_kind_and_axes(rows: Iterable[Collective]) -> dict[tuple[str, str], float]:
    """(kind, axes joined with +) -> bytes, the largest first."""
    total: dict[tuple[str, str], float] = defaultdict(float)
    for row in rows:
        total[row.kind, "+".join(row.axes)] += row.bytes
    return dict(sorted(total.items(), key=lambda item: -item[1]))


# Axes along which only weights and gradients travel, and their scope in the model.
_WEIGHT_AXES = {"data", "fsdp"}
_WEIGHTS = re.compile(r"\bweights\b")


def split(rows: Iterable[Collective]) -> dict[str, list[Collective]]:
    """Splits into collectives of weights (and their gradients) and those of activations.

    A collective is of weights if its operation's name has `weights`, or if it runs along `data` or
    `fsdp`, where nothing else travels. (The compiler drops the names of some operations.)
    """
    found: dict[str, list[Collective]] = {"weights": [], "activations": []}
    for row in rows:
        named = _WEIGHTS.search(row.op_name)
        weights = named or set(row.axes) & _WEIGHT_AXES
        found["weights" if weights else "activations"].append(row)
    return found
