"""Orbax checkpoints, written and read by region, so no whole array is ever in memory.

Both directions are Orbax TypeHandlers, its interface for new kinds of leaves. `write_params` writes
an ordinary PyTree checkpoint (zarr3, a folder per array), which any Orbax API restores with any
sharding and dtype. `open_params` reads any PyTree checkpoint, including those that training saves.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Shaped

from conversion.errors import ConversionError, listing
from conversion.formats.regions import Region, blocks, chunk_shape, run_blocks
from conversion.keys import Leaf, ParamPath

# --- writing --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array whose regions are made while it is written."""

    leaf: Leaf
    dtype: np.dtype
    read: Callable[[Region], Shaped[np.ndarray, "..."]]

    @property
    def nbytes(self) -> int:
        return self.leaf.size * self.dtype.itemsize


class _LazyArrayHandler(ocp.type_handlers.TypeHandler):
    """Writes LazyArrays block by block."""

    def __init__(self, progress: Callable[[int], None]) -> None:
        self._progress = progress

    def typestr(self) -> str:
        return "np.ndarray"  # a restore without a target gives numpy arrays

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

            def write(region: Region, value: LazyArray = value, store: Any = store) -> int:
                data = value.read(region)
                # `data` belongs to this block alone; not copying it makes writing twice as fast.
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
            # Weights don't compress; uncompressed, they are written at the disk's speed.
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        },
        # Orbax takes a missing chunk for a lost one, so zeros are stored too.
        "store_data_equal_to_fill_value": True,
    }


def write_params(
    directory: epath.PathLike, arrays: Sequence[LazyArray], progress: Callable[[int], None]
) -> None:
    """Writes an Orbax PyTree checkpoint; calls `progress` with the bytes of every block written."""
    registry = ocp.type_handlers.create_type_handler_registry(
        (LazyArray, _LazyArrayHandler(progress))
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_zarr3=True, type_handler_registry=registry
    )
    with ocp.Checkpointer(handler) as checkpointer:
        tree = unflatten_dict({array.leaf.path: array for array in arrays})
        checkpointer.save(epath.Path(directory).absolute(), args=ocp.args.PyTreeSave(tree))


# --- reading --------------------------------------------------------------------------------------


class _Opened:
    """Marks a leaf to open without reading it."""


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
    directory: epath.PathLike, expected: Mapping[ParamPath, Leaf]
) -> dict[ParamPath, ts.TensorStore]:
    """Opens every array of a PyTree checkpoint, in the order of `expected`.

    Raises ConversionError with a list of the arrays that are unknown, missing or misshapen.
    """
    directory = epath.Path(directory).absolute()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        stored = flatten_dict(checkpointer.metadata(directory).item_metadata.tree)
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
    restore_args = unflatten_dict({path: ocp.RestoreArgs(restore_type=_Opened) for path in stored})
    with ocp.Checkpointer(handler) as checkpointer:
        opened = flatten_dict(
            checkpointer.restore(directory, args=ocp.args.PyTreeRestore(restore_args=restore_args))
        )
    return {path: opened[path] for path in expected}
