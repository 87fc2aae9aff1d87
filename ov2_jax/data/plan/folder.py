"""The folder that ov2_jax.data.prepare writes.

    manifest.json        what the lengths depend on (fingerprint.py); written first
    lengths/00000...     shards: lengths of so many records each, and which were set aside
    lengths.safetensors  lengths of all records in one table
    plan.safetensors     which records share a pack
    packed-DIGEST-32/    if asked for: the packs' encoded samples (packed_shards.py)
    rejected.jsonl       samples that were set aside
    report.json, report.md
    plan.json            what the plan depends on, and its digest; written last

Files appear under their names when they are whole. Tables are safetensors files: little-endian
arrays behind a JSON header, which are mapped into memory and not read.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from etils import epath

from ov2_jax.core.errors import DataError
from ov2_jax.core.files import is_remote, read_json, write_file
from ov2_jax.data.sample import SampleSize

MANIFEST, LENGTHS, PLAN, DONE = (
    "manifest.json",
    "lengths.safetensors",
    "plan.safetensors",
    "plan.json",
)
_DTYPES = {"I32": np.int32, "I64": np.int64, "U8": np.uint8}


def write_arrays(path: epath.Path, arrays: Mapping[str, np.ndarray]) -> None:
    write_file(
        path, safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in arrays.items()})
    )


class Arrays:
    """The arrays of a table by name, opened when first asked for; sent to workers as a path."""

    def __init__(self, path: epath.Path) -> None:
        self._path = path
        self._arrays: dict[str, np.ndarray] | None = None

    def __getstate__(self) -> epath.Path:
        return self._path

    def __setstate__(self, path: epath.Path) -> None:
        self.__init__(path)

    def __getitem__(self, name: str) -> np.ndarray:
        if self._arrays is None:
            self._arrays = self._open()
        return self._arrays[name]

    def _open(self) -> dict[str, np.ndarray]:
        if is_remote(str(self._path)):
            return safetensors.numpy.load(self._path.read_bytes())
        with self._path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        arrays = {}
        for name, entry in header.items():
            dtype, (begin, end) = _DTYPES[entry["dtype"]], entry["data_offsets"]
            arrays[name] = np.zeros(entry["shape"], dtype)
            if end > begin:  # an empty file part cannot be mapped
                shape, offset = tuple(entry["shape"]), 8 + size + begin
                arrays[name] = np.memmap(self._path, dtype, "r", offset, shape)
        return arrays


class PlanInfo(NamedTuple):
    """plan.json."""

    digest: str
    inputs: dict[str, Any]  # fingerprint.mixture_inputs
    seed: int  # rules which records of partly drawn data sets are in
    planned_epochs: int  # of the mixture
    epochs: tuple[int, ...]  # packs of each of them that has any
    samples: int  # in all packs
    packed_files: int  # of packed_folder, 0 if there are none
    packs_per_file: int


class Plan:
    """A finished plan and the lengths that it was made of. Small to send to workers.

    Raises DataError where the folder has no finished plan.
    """

    def __init__(self, folder: str | epath.Path) -> None:
        self.folder = epath.Path(folder)
        if not (self.folder / DONE).exists():
            there = self.folder.exists()
            problem = "where prepare has not finished" if there else "which does not exist"
            raise DataError(
                f"data.plan is {str(folder)!r}, {problem}; run python -m ov2_jax.data.prepare with "
                f"this config and --out={folder}."
            )
        done = read_json(self.folder / DONE)
        self.info = PlanInfo(**{**done, "epochs": tuple(done["epochs"])})
        self.packs = sum(self.info.epochs)
        self._lengths, self._plan = Arrays(self.folder / LENGTHS), Arrays(self.folder / PLAN)

    def members(self, pack: int) -> np.ndarray:
        """Records of a pack, int64, in the order in which place_pack places all of them."""
        ends = self._plan["ends"]
        return self._plan["members"][int(ends[pack - 1]) if pack else 0 : int(ends[pack])]

    def size(self, record: int) -> SampleSize:
        ends, windows = self._lengths["ends"], self._lengths["windows"]
        begin = int(ends[record - 1]) if record else 0
        return SampleSize(
            int(self._lengths["tokens"][record]),
            tuple(windows[begin : int(ends[record])].tolist()),
        )

    def packed_files(self) -> list[str]:
        """Files of encoded packs; none unless they were asked for."""
        digest, size = self.info.digest, self.info.packs_per_file
        return [
            packed_file(self.folder, digest, size, number)
            for number in range(self.info.packed_files)
        ]


def packed_folder(digest: str, packs_per_file: int) -> str:
    return f"packed-{digest}-{packs_per_file}"


def packed_file(folder: epath.Path, digest: str, packs_per_file: int, number: int) -> str:
    return str(folder / packed_folder(digest, packs_per_file) / f"{number:05d}.array_record")


def digest_of(*files: epath.Path) -> str:
    """Of the files' content."""
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 24):
                found.update(block)
    return found.hexdigest()[:16]
