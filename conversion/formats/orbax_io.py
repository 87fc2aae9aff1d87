"""Orbax checkpoints written and read by the slice, so that no whole array is ever in memory.

Both directions are Orbax TypeHandlers, its interface for new kinds of leaves. Written is an
ordinary PyTree checkpoint (zarr3, a folder per array), which any Orbax API restores with any
sharding and dtype; read is any PyTree checkpoint, including those that training saves.
"""

import concurrent.futures
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from conversion.errors import ConversionError, listing
from conversion.keys import Leaf, Path

Index = tuple[slice, ...]

# A chunk is the least that a restoring host reads. 16 MiB splits a gate_proj layer of the 8B
# model (100 MB) in 6 along its output axis and keeps the model at about 1100 files.
CHUNK_BYTES = 16 * 2**20
# What one worker holds at a time. Workers overlap reading, transposing and writing.
BLOCK_BYTES = 32 * 2**20
WORKERS = 3


def chunk_shape(leaf: Leaf, itemsize: int) -> tuple[int, ...]:
    """Chunks of at most CHUNK_BYTES: some layers or experts whole, or one in equal strips."""
    lead, own = leaf.lead, leaf.shape[len(leaf.lead) :]
    room = CHUNK_BYTES // (math.prod(own) * itemsize)
    if len(lead) == 2 and room:
        layers, experts = lead
        # Equal chunks of experts: a host that restores a part of them reads no others.
        fit = max(n for n in range(1, min(experts, room) + 1) if experts % n == 0)
        return (min(layers, room // fit) if fit == experts else 1, fit, *own)
    if room:
        return (*(min(layers, room) for layers in lead), *own)
    shape = [*(1 for _ in lead), *own]
    pieces = math.ceil(math.prod(own) * itemsize / CHUNK_BYTES)
    shape[leaf.split_axis] = math.ceil(shape[leaf.split_axis] / pieces)
    return tuple(shape)


def blocks(
    shape: Sequence[int], chunk: Sequence[int], itemsize: int, axes: Sequence[int]
) -> Iterator[Index]:
    """Regions of whole chunks that tile an array, grown along `axes` up to BLOCK_BYTES."""
    block = [min(c, n) for c, n in zip(chunk, shape, strict=True)]
    for axis in axes:
        room = BLOCK_BYTES // max(1, math.prod(block) * itemsize)
        if room > 1:
            block[axis] = min(block[axis] * room, shape[axis])
    starts = [range(0, n, b) for n, b in zip(shape, block, strict=True)]
    for corner in itertools.product(*starts):
        yield tuple(slice(c, min(c + b, n)) for c, b, n in zip(corner, block, shape, strict=True))


def run_blocks(work: Callable[[Index], int], regions: Iterator[Index]) -> Iterator[int]:
    """Runs `work` on WORKERS threads over the regions; yields its results (bytes done)."""
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        running = {pool.submit(work, region) for region in itertools.islice(regions, WORKERS)}
        while running:
            done, running = concurrent.futures.wait(
                running, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                yield future.result()
            running |= {pool.submit(work, r) for r in itertools.islice(regions, len(done))}


# --- writing --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array that is produced by the region while it is written."""

    leaf: Leaf
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]

    @property
    def nbytes(self) -> int:
        return self.leaf.size * self.dtype.itemsize


class _LazyArrayHandler(ocp.type_handlers.TypeHandler):
    """Writes LazyArrays block by block."""

    def __init__(self, progress: Callable[[int], None]) -> None:
        self._progress = progress

    def typestr(self) -> str:
        return "np.ndarray"  # what it is once stored: restored without a target, numpy arrays

    async def serialize(
        self,
        values: Sequence[LazyArray],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> list[Any]:
        del args
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            chunk = chunk_shape(value.leaf, value.dtype.itemsize)
            store = ts.open(_zarr_spec(info.path, value, chunk), create=True, open=False).result()

            def write(region: Index, value: LazyArray = value, store: Any = store) -> int:
                data = value.read(region)
                # `data` is this block's own: without a copy of it writing is twice as fast.
                store[region].write(data, can_reference_source_data_indefinitely=True).result()
                return data.nbytes

            axes = (value.leaf.split_axis,)
            for count in run_blocks(
                write, blocks(value.leaf.shape, chunk, value.dtype.itemsize, axes)
            ):
                self._progress(count)
        return []

    async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
        raise ConversionError("Lazy arrays are written only.")

    async def deserialize(self, infos: Sequence[Any], args: Any = None) -> Sequence[Any]:
        raise ConversionError("Lazy arrays are written only.")


def _zarr_spec(path: epath.Path, value: LazyArray, chunk: tuple[int, ...]) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "metadata": {
            "shape": value.leaf.shape,
            "data_type": value.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            # Weights don't compress; uncompressed they are written at the disk's speed.
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        },
        # Orbax takes a chunk that isn't there for a lost one, so zeros are stored too.
        "store_data_equal_to_fill_value": True,
    }


def nest(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """Nested dicts from values by path."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value
    return tree


def flatten(tree: Mapping[str, Any], prefix: Path = ()) -> dict[Path, Any]:
    """Values by path from nested dicts."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, (*prefix, name))
        else:
            flat[(*prefix, name)] = value
    return flat


def write_params(
    directory: epath.PathLike, arrays: Sequence[LazyArray], progress: Callable[[int], None]
) -> None:
    """Writes an Orbax PyTree checkpoint; `progress` is told the bytes of every block written."""
    registry = ocp.type_handlers.create_type_handler_registry(
        (LazyArray, _LazyArrayHandler(progress))
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_zarr3=True, type_handler_registry=registry
    )
    with ocp.Checkpointer(handler) as checkpointer:
        tree = nest({array.leaf.path: array for array in arrays})
        checkpointer.save(epath.Path(directory).absolute(), args=ocp.args.PyTreeSave(tree))


# --- reading --------------------------------------------------------------------------------------


class _Opened:
    """Marks a leaf that is to be opened and not read."""


class _OpenHandler(ocp.type_handlers.TypeHandler):
    """Restores a leaf as an open ts.TensorStore."""

    def typestr(self) -> str:
        return "tensorstore"

    async def deserialize(
        self, infos: Sequence[ocp.type_handlers.ParamInfo], args: Any = None
    ) -> Sequence[ts.TensorStore]:
        return [
            await ts.open(
                ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=info.is_ocdbt_checkpoint),
                read=True,
                context=info.ts_context,
            )
            for info in infos
        ]

    async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
        raise ConversionError("Opened arrays are read only.")

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> Sequence[Any]:
        raise ConversionError("Opened arrays are read only.")


def open_params(
    directory: epath.PathLike, expected: Mapping[Path, Leaf]
) -> dict[Path, ts.TensorStore]:
    """Opens every array of a PyTree checkpoint, in the order of `expected`.

    Raises ConversionError listing the arrays that are unknown, missing or misshapen.
    """
    directory = epath.Path(directory).absolute()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        stored = flatten(checkpointer.metadata(directory).item_metadata.tree)
    problems = []
    unknown = sorted(".".join(p) for p in stored.keys() - expected.keys())
    if unknown:
        problems.append(
            listing("Arrays that the model described by config.json does not have", unknown)
        )
    missing = [leaf.name for path, leaf in expected.items() if path not in stored]
    if missing:
        problems.append(listing("Arrays that are missing", missing))
    misshapen = [
        f"{leaf.name}: is {list(stored[path].shape)}, must be {list(leaf.shape)}"
        for path, leaf in expected.items()
        if path in stored and tuple(stored[path].shape) != leaf.shape
    ]
    if misshapen:
        problems.append(listing("Arrays with the wrong shape", misshapen))
    if problems:
        raise ConversionError("\n".join([f"{directory} does not fit its config.json.", *problems]))
    registry = ocp.type_handlers.create_type_handler_registry((_Opened, _OpenHandler()))
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    restore_args = nest({path: ocp.RestoreArgs(restore_type=_Opened) for path in stored})
    with ocp.Checkpointer(handler) as checkpointer:
        opened = flatten(
            checkpointer.restore(directory, args=ocp.args.PyTreeRestore(restore_args=restore_args))
        )
    return {path: opened[path] for path in expected}
