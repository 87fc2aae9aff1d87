"""The contents of a chip's HBM while the step runs, by kind.

Arguments (parameters, moments, the batch) follow from the state's shapes. The compiler adds one
heap and lists its buffers in a dump. Their shapes give their kind: a stack of a parameter's shape
is a gradient; any other stack over the layers is kept by them for the backward pass.
"""

import math
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax

from launch.planner.hlo import Instruction, Module, arrays_of

_ALLOCATION = re.compile(r"allocation \d+: size (\d+), (.*):$")
_VALUE = re.compile(
    r" value: <\d+ ([^ {]+)(\{[\d,]*\})?(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (.*)$"
)
_SMALL = 2**20  # smaller buffers are not listed


class Buffer(NamedTuple):
    """A place in the heap, described by the largest value that is ever there."""

    bytes: int
    shape: str
    kind: str  # gradients, kept by layers, other
    op_name: str


class Allocations(NamedTuple):
    """HBM by the compiler's own list, in bytes."""

    arguments: int
    temporaries: int
    other: int  # constants, and results that are no donated arguments
    heap: list[Buffer]  # places in the temporaries, the largest first; their sum is not larger


class _Value(NamedTuple):
    name: str
    size: int
    offset: int
    shape: str


def _read(path: pathlib.Path) -> tuple[dict[str, int], list[_Value]]:
    total = {"arguments": 0, "temporaries": 0, "other": 0}
    values: list[_Value] = []
    heap = False
    for line in path.open():
        if line.startswith("allocation"):
            found = _ALLOCATION.match(line)
            heap = False
            if found is None or "color" in found[2] or "thread-local" in found[2]:
                continue  # on the chip, or without memory of its own
            heap = "preallocated-temp" in found[2]
            kind = "temporaries" if heap else "arguments" if "parameter" in found[2] else "other"
            total[kind] += int(found[1])
        elif heap:
            found = _VALUE.match(line)
            if found and int(found[3]) >= _SMALL:
                values.append(_Value(found[1], int(found[3]), int(found[4]), found[5]))
    return total, values


def _cover(values: Iterable[_Value]) -> list[list[_Value]]:
    """Places that do not overlap, the largest first, each with the values of its size."""
    places: list[list[_Value]] = []
    taken: dict[tuple[int, int], list[_Value]] = {}
    for value in sorted(values, key=lambda v: (-v.size, v.offset)):
        same = taken.get((value.offset, value.size))
        if same is not None:
            same.append(value)
        elif all(
            value.offset + value.size <= p[0].offset or p[0].offset + p[0].size <= value.offset
            for p in places
        ):
            taken[value.offset, value.size] = [value]
            places.append(taken[value.offset, value.size])
    return places


def _plain(shape: str) -> str:
    arrays = arrays_of(shape)
    return f"{arrays[0].dtype}[{','.join(map(str, arrays[0].dims))}]" if arrays else shape[:40]


def _origin(name: str, instructions: Mapping[str, Instruction]) -> str:
    """The operation that a value comes from, found through the compiler's own copies."""
    for _ in range(8):
        this = instructions.get(name)
        if this is None or this.op_name or not this.operands:
            return this.op_name if this else ""
        name = this.operands[0]
    return ""


def local_shapes(tree: Any) -> list[tuple[tuple[int, ...], int]]:
    """(shape, bytes) of a device's part of each leaf."""
    found = []
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape)
        found.append((shape, math.prod(shape) * leaf.dtype.itemsize))
    return found


def local_bytes(tree: Any) -> int:
    """Bytes of a device's part of a tree, without the padding of tiles."""
    return sum(size for _, size in local_shapes(tree))


def allocations(dump: pathlib.Path, module: Module, params: Any, layers: set[int]) -> Allocations:
    """Reads the compiler's dump of its buffer assignment; `layers`: lengths of layer stacks."""
    total, values = _read(dump)
    instructions = {i.name: i for c in module.computations.values() for i in c}
    weights = {shape for shape, _ in local_shapes(params) if len(shape) > 1}
    heap = []
    for place in _cover(values):
        arrays = arrays_of(place[0].shape)
        dims = arrays[0].dims if arrays else ()
        if dims in weights:
            kind = "gradients"
        elif len(dims) > 2 and dims[0] in layers:
            kind = "kept by layers"
        else:
            kind = "other"
        origins = (_origin(value.name, instructions) for value in place)
        op_name = next((origin for origin in origins if origin), place[0].name)
        heap.append(Buffer(place[0].size, _plain(place[0].shape), kind, op_name))
    return Allocations(total["arguments"], total["temporaries"], total["other"], heap)
