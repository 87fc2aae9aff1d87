"""The folder that ov2_jax.data.prepare writes, and a finished plan in it.

    manifest.json        what the lengths depend on (fingerprint.py); written first
    lengths/00000.npz    shards: lengths of consecutive records, and which of them were rejected
    table/               the lengths of all records (lengths.RecordLengths)
    plan/                which records share a pack (packing.planning.Packs)
    packed-DIGEST-32/    if asked for: the packs' encoded samples (packed_shards.py)
    rejected.jsonl       the rejected samples
    report.json, report.md
    plan.json            what the plan depends on, and its digest; written last

A file appears under its name when it is whole. A table is a folder of `.npy` files, one for each
field of a NamedTuple of arrays. Local ones are mapped into memory, remote ones are read.
"""

import hashlib
import io
import os
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
from etils import epath
from jaxtyping import Int64, Shaped

from ov2_jax.core.errors import DataError
from ov2_jax.core.files import is_remote, open_binary, read_json, to_path, writing
from ov2_jax.data.packing.planning import Lengths, Packs
from ov2_jax.data.sample import SampleSize

MANIFEST, DONE, REJECTED = "manifest.json", "plan.json", "rejected.jsonl"
TABLE, PLAN = "table", "plan"

Table = TypeVar("Table", bound=tuple)  # a NamedTuple of arrays


def table_files(folder: epath.PathLike, kind: type[tuple]) -> list[epath.Path]:
    """The files of a table, in the order of its fields."""
    return [to_path(folder) / f"{name}.npy" for name in kind._fields]


def write_table(folder: epath.PathLike, table: tuple) -> None:
    """Each file is written whole or not at all, but not all of them together."""
    to_path(folder).mkdir(exist_ok=True)
    for path, array in zip(table_files(folder, type(table)), table, strict=True):
        with writing(path) as part, part.open("wb") as file:
            np.save(file, array)


def read_table(folder: epath.PathLike, kind: type[Table]) -> Table:
    """The fields of `kind`; files of other fields may lie beside them."""
    return kind(*map(_read_array, table_files(folder, kind)))


def _read_array(path: epath.Path) -> Shaped[np.ndarray, " values"]:
    if is_remote(path):
        return np.load(io.BytesIO(path.read_bytes()))
    return np.load(os.fspath(path), mmap_mode="r")


class PlanInfo(NamedTuple):
    """plan.json."""

    digest: str
    inputs: dict[str, Any]  # fingerprint.mixture_inputs
    seed: int  # decides which records of partly read data sets are in
    planned_epochs: int  # of the mixture
    epochs: tuple[int, ...]  # packs of each of them that has any
    samples: int  # in all packs
    packed_files: int  # of packed_folder, 0 if there are none
    packs_per_file: int


class PackPlan:
    """A finished plan and the lengths that it was made of. Small to send to workers.

    Raises DataError if the folder has no finished plan, or one of an earlier version of prepare.
    """

    def __init__(self, folder: epath.PathLike) -> None:
        self.folder = to_path(folder)
        if not (self.folder / DONE).exists():
            there = self.folder.exists()
            problem = "where prepare has not finished" if there else "which does not exist"
            raise DataError(
                f"data.plan is {str(folder)!r}, {problem}; run python -m ov2_jax.data.prepare with "
                f"this config and --out={folder}."
            )
        tables = ((TABLE, Lengths), (PLAN, Packs))
        for path in (p for name, kind in tables for p in table_files(self.folder / name, kind)):
            if not path.exists():
                raise DataError(
                    f"{folder} has no {path.parent.name}/{path.name}, so it is damaged or of an "
                    "earlier version of ov2_jax.data.prepare; prepare the data again into another "
                    "--out."
                )
        done = read_json(self.folder / DONE)
        self.info = PlanInfo(**{**done, "epochs": tuple(done["epochs"])})
        self.packs = sum(self.info.epochs)

    def __getstate__(self) -> dict[str, Any]:
        """Without the tables: another process maps them itself."""
        return {name: value for name, value in self.__dict__.items() if name != "_tables"}

    @cached_property
    def _tables(self) -> tuple[Lengths, Packs]:
        return read_table(self.folder / TABLE, Lengths), read_table(self.folder / PLAN, Packs)

    def members(self, pack: int) -> Int64[np.ndarray, " members"]:
        """Records of a pack, in the order in which place_pack places all of them."""
        members, ends = self._tables[1]
        return members[int(ends[pack - 1]) if pack else 0 : int(ends[pack])]

    def size(self, record: int) -> SampleSize:
        """Tokens and windows of a record; 0 tokens if it was rejected."""
        tokens, windows, ends = self._tables[0]
        begin = int(ends[record - 1]) if record else 0
        return SampleSize(int(tokens[record]), tuple(windows[begin : int(ends[record])].tolist()))

    def packed_files(self) -> list[str]:
        """Files of encoded packs; none unless they were asked for."""
        digest, size = self.info.digest, self.info.packs_per_file
        return [
            packed_file(self.folder, digest, size, number)
            for number in range(self.info.packed_files)
        ]


def packed_folder(digest: str, packs_per_file: int) -> str:
    return f"packed-{digest}-{packs_per_file}"


def packed_file(folder: epath.PathLike, digest: str, packs_per_file: int, number: int) -> str:
    return str(
        to_path(folder) / packed_folder(digest, packs_per_file) / f"{number:05d}.array_record"
    )


def digest_of(*files: epath.PathLike) -> str:
    """A hash of the files' content."""
    found = hashlib.sha256()
    for file in files:
        with open_binary(file) as stream:
            while block := stream.read(1 << 24):
                found.update(block)
    return found.hexdigest()[:16]
