"""Sharded safetensors, read and written in place through memory maps.

The safetensors library reads a tensor into memory of its own, and it writes a file from tensors
that are all in memory. A small machine cannot afford either for a 16 GB model. So here a tensor is
a view of its file: the kernel holds the pages and may drop them, and only what is being copied
takes memory.

Format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, the bytes
of all tensors without gaps).
"""

import dataclasses
import json
import math
import os
import pathlib
import re
import struct
from collections.abc import Iterable, Sequence
from types import TracebackType

import ml_dtypes
import numpy as np
from etils import epath
from jaxtyping import Shaped, UInt8

from conversion.errors import ConversionError, listing

INDEX_NAME = "model.safetensors.index.json"

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
# The dtypes of weights. Quantised and integer weights would need their scales.
WEIGHT_DTYPES = ("float64", "float32", "float16", "bfloat16")


def weight_dtype(name: str) -> np.dtype:
    """The numpy dtype of a weight by name; numpy itself has no "bfloat16"."""
    if name not in WEIGHT_DTYPES:
        raise ConversionError(f"dtype is {name!r}; it must be one of {', '.join(WEIGHT_DTYPES)}.")
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def parse_shard_size(text: str) -> int:
    """The bytes of `5GB`, `512MiB` or a plain number of bytes, the value of --max-shard-size."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+) *([A-Za-z]*)", text)
    size = int(float(match[1]) * _UNITS.get(match[2].upper(), 0)) if match else 0
    if not size:
        raise ConversionError(
            f"--max-shard-size is {text!r}; it must be a size such as 5GB or 512MiB."
        )
    return size


DEFAULT_MAX_SHARD_SIZE = "5GB"  # what transformers writes
DEFAULT_MAX_SHARD_BYTES = parse_shard_size(DEFAULT_MAX_SHARD_SIZE)


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class _Stored(TensorSpec):
    file: pathlib.Path
    offset: int  # from the start of the file


def _read_header(file: pathlib.Path) -> list[_Stored]:
    """Parses one file's header; raises ConversionError if the file is cut off or malformed."""
    size = file.stat().st_size
    with file.open("rb") as f:
        head = f.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else None
        if length is None or 8 + length > size:
            raise ConversionError(
                f"{file} is not a whole safetensors file: its header is cut off. If it was "
                "fetched by git, it may be a Git LFS pointer; fetch the file itself."
            )
        try:
            header = json.loads(f.read(length))
        except ValueError as error:
            raise ConversionError(f"{file} has a malformed safetensors header: {error}") from error
    tensors = []
    for name, raw in header.items():
        if name == "__metadata__":
            continue
        if raw["dtype"] not in _DTYPES:
            raise ConversionError(f"{file}: {name} has the unknown dtype {raw['dtype']!r}.")
        begin, end = raw["data_offsets"]
        spec = _Stored(name, tuple(raw["shape"]), _DTYPES[raw["dtype"]], file, 8 + length + begin)
        if end - begin != spec.nbytes:
            raise ConversionError(
                f"{file}: {name} takes {end - begin} bytes, but {raw['dtype']} {raw['shape']} "
                f"needs {spec.nbytes}; the file is damaged."
            )
        if 8 + length + end > size:
            raise ConversionError(
                f"{file} is cut off: {name} ends at byte {8 + length + end}, the file at {size}. "
                "Fetch it again."
            )
        tensors.append(spec)
    return tensors


def _weight_files(folder: pathlib.Path) -> tuple[list[pathlib.Path], dict[str, str] | None]:
    """The folder's safetensors files, and the index's weight map if there is an index."""
    index = folder / INDEX_NAME
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
        files = [folder / name for name in sorted(set(weight_map.values()))]
        missing = [f.name for f in files if not f.exists()]
        if missing:
            raise ConversionError(listing(f"{index} names files that are not there", missing))
        return files, weight_map
    single = folder / "model.safetensors"
    files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not files:
        has_pickle = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        remedy = " Save its weights as safetensors first." if has_pickle else ""
        raise ConversionError(f"{folder} has no *.safetensors file.{remedy}")
    return files, None


class SafetensorsFolder:
    """All tensors of a folder with one safetensors file, or several with or without an index."""

    def __init__(self, folder: epath.PathLike) -> None:
        self.folder = pathlib.Path(folder)
        if not self.folder.is_dir():
            raise ConversionError(f"{folder} is not a folder on this machine.")
        files, weight_map = _weight_files(self.folder)
        self.tensors: dict[str, _Stored] = {}
        for file in files:
            for tensor in _read_header(file):
                if tensor.name in self.tensors:
                    raise ConversionError(
                        f"{tensor.name} is in both {self.tensors[tensor.name].file.name} and "
                        f"{file.name} of {folder}."
                    )
                self.tensors[tensor.name] = tensor
        if weight_map is not None:
            stored = {name: tensor.file.name for name, tensor in self.tensors.items()}
            wrong = sorted(k for k in weight_map | stored if weight_map.get(k) != stored.get(k))
            if wrong:
                raise ConversionError(
                    listing(f"{INDEX_NAME} of {folder} disagrees with the files on", wrong)
                )
        self._maps: dict[pathlib.Path, np.memmap] = {}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def array(self, name: str) -> Shaped[np.ndarray, "..."]:
        """A read-only view of the tensor in its file."""
        tensor = self.tensors[name]
        if tensor.file not in self._maps:
            self._maps[tensor.file] = np.memmap(tensor.file, np.uint8, "r")
        return _view(self._maps[tensor.file], tensor, tensor.offset)


def _view(
    buffer: UInt8[np.ndarray, " buffer"], spec: TensorSpec, offset: int
) -> Shaped[np.ndarray, "..."]:
    # np.ndarray instead of .view(), because offsets need not be multiples of the item size.
    return np.ndarray(spec.shape, spec.dtype, buffer=buffer, offset=offset)


def _shards(specs: Sequence[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    """Splits in the given order; a tensor larger than `max_bytes` gets a shard of its own."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


class SafetensorsWriter:
    """Lays out all files of a folder at once and returns writable views of their tensors.

    The space is allocated at the start, so a full disk is an OSError here and not a bus error
    when a page is written. The index is written only if the block ends without an error; the caller
    makes the folder appear atomically.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        specs: Iterable[TensorSpec],
        max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    ) -> None:
        self._folder = pathlib.Path(folder)
        self._specs = list(specs)
        shards = _shards(self._specs, max_shard_bytes)
        names = (
            ["model.safetensors"]
            if len(shards) == 1
            else [
                f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
            ]
        )
        self._views: dict[str, np.ndarray] = {}
        self._maps: list[np.memmap] = []
        self._weight_map: dict[str, str] = {}
        for name, shard in zip(names, shards, strict=True):
            self._allocate(self._folder / name, shard)
            self._weight_map |= {spec.name: name for spec in shard}

    def _allocate(self, file: pathlib.Path, shard: Sequence[TensorSpec]) -> None:
        # Wider types first, so that every tensor is aligned to its item size.
        shard = sorted(shard, key=lambda spec: -spec.dtype.itemsize)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offsets = []
        end = 0
        for spec in shard:
            offsets.append(end)
            header[spec.name] = {
                "dtype": _CODES[spec.dtype],
                "shape": spec.shape,
                "data_offsets": (end, end + spec.nbytes),
            }
            end += spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        with file.open("wb") as f:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(f.fileno(), 0, start + end)
            f.truncate(start + end)  # without posix_fallocate (macOS) the space is not reserved
            f.write(struct.pack("<Q", len(text)) + text)
        mapped = np.memmap(file, np.uint8, "r+")
        self._maps.append(mapped)
        for spec, offset in zip(shard, offsets, strict=True):
            self._views[spec.name] = _view(mapped, spec, start + offset)

    def array(self, name: str) -> Shaped[np.ndarray, "..."]:
        """A writable view of the tensor in its file."""
        return self._views[name]

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._views.clear()
        if kind is not None:
            self._maps.clear()
            return
        for mapped in self._maps:
            mapped.flush()
        self._maps.clear()
        if len(set(self._weight_map.values())) > 1:
            index = {
                "metadata": {
                    "total_parameters": sum(math.prod(spec.shape) for spec in self._specs),
                    "total_size": sum(spec.nbytes for spec in self._specs),
                },
                "weight_map": dict(sorted(self._weight_map.items())),
            }
            (self._folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def copy_into(target: Shaped[np.ndarray, "*shape"], source: Shaped[np.ndarray, "*shape"]) -> None:
    """`target[...] = source`, with a cast if the dtypes differ; fast for transposed matrices.

    One numpy assignment copies a transposed 100 MB matrix at 0.35 GB/s on one core. In strips of 64
    rows of the source both sides stay in the cache: 1.1 GB/s. Copies within a dtype move bits,
    because numpy copies bfloat16 element by element through a function pointer.
    """
    if target.dtype == source.dtype:
        bits = np.dtype(f"u{target.dtype.itemsize}")
        target, source = target.view(bits), source.view(bits)
    if target.ndim < 2:
        target[...] = source
        return
    axis = int(np.argmax(np.abs(source.strides)))
    target, source = np.moveaxis(target, axis, 0), np.moveaxis(source, axis, 0)
    for start in range(0, target.shape[0], 64):
        target[start : start + 64] = source[start : start + 64]
