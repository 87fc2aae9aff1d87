"""Lengths of records: shards of consecutive records, and the table of all."""

import io
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Int32, Int64, UInt8

from ov2_jax.core.files import write_file
from ov2_jax.data.encoding.sample_encoder import SampleEncoder
from ov2_jax.data.packing.planning import Lengths
from ov2_jax.data.plan.folder import TABLE, write_table
from ov2_jax.data.rejected import Rejected, rejected_line
from ov2_jax.data.sources.index import RecordSource

_SHARDS = "lengths"


class _Shard(NamedTuple):
    """Lengths of consecutive records, as an .npz file."""

    tokens: Int32[np.ndarray, " records"]  # 0: the record was rejected
    window_counts: Int32[np.ndarray, " records"]
    windows: Int32[np.ndarray, " windows"]  # patches of each window
    dropped_rounds: Int32[np.ndarray, " records"]
    uniform_fallbacks: Int32[np.ndarray, " records"]
    rejected: UInt8[np.ndarray, " bytes"]  # the lines of rejected.jsonl, in order


class RecordLengths(NamedTuple):
    """The lengths of all records. The first three fields are those of planning.Lengths."""

    tokens: Int32[np.ndarray, " records"]  # 0: the record was rejected
    windows: Int32[np.ndarray, " windows"]  # patches of each window
    ends: Int64[np.ndarray, " records"]  # windows of record i are windows[ends[i - 1] : ends[i]]
    dropped_rounds: Int32[np.ndarray, " records"]
    uniform_fallbacks: Int32[np.ndarray, " records"]


def shard_file(folder: epath.Path, number: int) -> epath.Path:
    return folder / _SHARDS / f"{number:05d}.npz"


def finished_shards(folder: epath.Path) -> set[int]:
    there = folder / _SHARDS
    if not there.exists():
        return set()
    return {int(p.stem) for p in there.iterdir() if p.suffix == ".npz" and p.stem.isdigit()}


def measure_shard(
    records: RecordSource, encoder: SampleEncoder, which: range, path: epath.Path
) -> None:
    """Validates the records and writes their lengths. The file is written whole or not at all."""
    columns = np.zeros((4, len(which)), np.int32)
    windows: list[int] = []
    rejected: list[bytes] = []
    for i, record in enumerate(which):
        length = encoder.measure(records[record])
        if isinstance(length, Rejected):
            rejected.append(rejected_line(length))
            continue
        columns[:, i] = (
            length.tokens,
            len(length.windows),
            length.dropped_rounds,
            length.uniform_fallbacks,
        )
        windows += length.windows
    tokens, counts, dropped, fallbacks = columns
    lines = np.frombuffer(b"".join(rejected), np.uint8)
    shard = _Shard(tokens, counts, np.array(windows, np.int32), dropped, fallbacks, lines)
    file = io.BytesIO()
    np.savez(file, **shard._asdict())
    write_file(path, file.getvalue())


def _read_shard(folder: epath.Path, number: int) -> _Shard:
    with np.load(io.BytesIO(shard_file(folder, number).read_bytes())) as arrays:
        return _Shard(**arrays)


def join_shards(folder: epath.Path, shards: int) -> RecordLengths:
    """Writes the table of all records from the finished shards, and returns it."""
    parts = [_read_shard(folder, i) for i in range(shards)]
    joined = _Shard(*map(np.concatenate, zip(*parts, strict=True)))
    table = RecordLengths(
        joined.tokens,
        joined.windows,
        np.cumsum(joined.window_counts, dtype=np.int64),
        joined.dropped_rounds,
        joined.uniform_fallbacks,
    )
    write_table(folder / TABLE, table)
    return table


def read_rejected(folder: epath.Path, shards: int) -> Iterator[bytes]:
    """The JSON lines of all shards, in the order of the records."""
    for i in range(shards):
        yield from _read_shard(folder, i).rejected.tobytes().splitlines(keepends=True)


def usable_lengths(table: RecordLengths) -> tuple[Lengths, Int64[np.ndarray, " usable"]]:
    """The lengths of the records that were not rejected, and the numbers of these records."""
    usable = table.tokens > 0  # the others have no windows either
    lengths = Lengths(table.tokens[usable], table.windows, table.ends[usable])
    return lengths, np.flatnonzero(usable)
